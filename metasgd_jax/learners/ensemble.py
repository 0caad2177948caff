"""Several meta-parameters of one learner, asked together."""

import jax
import jax.numpy as jnp

from metasgd_jax.types import Learner


def ensemble(learner: Learner) -> Learner:
  """Builds the learner of E members: log of the mean of their probabilities, each member having adapted by itself.

  `meta` is the learner's with E in front of each leaf, such as checkpoints of one training, as in MAML++ (Antoniou et
  al. 2019, section 5.2). `init` gives E different starts only if it is mapped over keys. It is to be tested, not
  trained: `loss` is the mean of the members' own.

  Args:
    learner: whose outputs are logits `[Q, N]`.

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
    steps_first = jax.vmap(lambda one: learner.path(one, support, key), out_axes=1)
    return steps_first(meta)

  def predict(adapted, x):
    logits = jax.vmap(lambda one: learner.predict(one, x))(adapted)  # [E, Q, N]
    return jax.nn.logsumexp(jax.nn.log_softmax(logits), 0) - jnp.log(logits.shape[0])

  def loss(meta, episode, key):
    losses, info = jax.vmap(lambda one: learner.loss(one, episode, key))(meta)
    return jnp.mean(losses), jax.tree.map(jnp.mean, info)

  return Learner(learner.init, adapt, path, predict, loss)
