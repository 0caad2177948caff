"""Ensembles: one learner with several sets of meta-parameters, whose predictions are averaged."""

import jax
import jax.numpy as jnp

from metasgd_jax.types import Learner, equal_by_arguments


@equal_by_arguments
def ensemble(learner: Learner) -> Learner:
  """Builds an ensemble of E members. Each member adapts separately, and the class probabilities are averaged.

  The outputs are the logarithms of the mean probabilities. `meta` has the structure of the given learner's `meta`, with
  a leading axis `[E]` on each leaf. The members can be checkpoints of one training run, as in MAML++ (Antoniou et al.
  2019, section 5.2). `init` returns the meta-parameters of one member, so map `init` over E keys to get E different
  members, as in the example. The ensemble is meant for evaluation, not for training: its `loss` is the mean of the
  losses of the separate members.

  Args:
    learner: Learner of each member. Its outputs must be logits `[Q, N]`.

  Example:
    >>> one = ms.learners.prototypical(ms.nn.from_linen(ms.nn.MLP(outputs=8)), way=3)
    >>> support = ms.Batch(jnp.arange(3.0).reshape(3, 1), jnp.arange(3))
    >>> keys = jax.random.split(jax.random.key(0), 4)
    >>> metas = jax.vmap(one.init, (0, None))(keys, ms.Episode(support, support))  # Four members.
    >>> learner = ms.learners.ensemble(one)
    >>> learner.predict(learner.adapt(metas, support, jax.random.key(1)), support.x).shape
    (3, 3)
  """

  def adapt(meta, support, key=None):
    return jax.vmap(lambda one: learner.adapt(one, support, key))(meta)

  def path(meta, support, key=None):
    return jax.vmap(lambda one: learner.path(one, support, key), out_axes=1)(meta)  # The steps come first.

  def predict(adapted, x):
    logits = jax.vmap(lambda one: learner.predict(one, x))(adapted)  # [E, Q, N]
    return jax.nn.logsumexp(jax.nn.log_softmax(logits), 0) - jnp.log(logits.shape[0])

  def loss(meta, episode, key):
    losses, info = jax.vmap(lambda one: learner.loss(one, episode, key))(meta)
    return jnp.mean(losses), jax.tree.map(jnp.mean, info)

  return Learner(learner.init, adapt, path, predict, loss)
