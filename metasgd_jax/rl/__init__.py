"""Reinforcement learning: a task is a Markov decision process, and an inner step is a policy-gradient step."""

from metasgd_jax.rl.advantages import (
  MAML_ADVANTAGES as MAML_ADVANTAGES,
  AdvantageConfig as AdvantageConfig,
  advantages as advantages,
  discounted_returns as discounted_returns,
  fit_linear as fit_linear,
  generalized_advantages as generalized_advantages,
  linear_features as linear_features,
  normalize as normalize,
)
from metasgd_jax.rl.categorical import Categorical as Categorical, categorical as categorical
from metasgd_jax.rl.gymnasium_host import (
  collect_on_host as collect_on_host,
  policy_gradient_on_host as policy_gradient_on_host,
)
from metasgd_jax.rl.learner import (
  Experience as Experience,
  PolicyGradient as PolicyGradient,
  RolloutRequest as RolloutRequest,
  mean_return as mean_return,
  policy_gradient as policy_gradient,
  policy_learner as policy_learner,
  returns_by_step as returns_by_step,
  task_distribution as task_distribution,
)
from metasgd_jax.rl.meta_step import trpo_meta_step as trpo_meta_step
from metasgd_jax.rl.navigation import Navigation as Navigation, navigation as navigation
from metasgd_jax.rl.pendulum import Pendulum as Pendulum, PendulumConfig as PendulumConfig, pendulum as pendulum
from metasgd_jax.rl.policies import Gaussian as Gaussian, gaussian as gaussian
from metasgd_jax.rl.rollout import collect as collect, rollout as rollout, undiscounted_return as undiscounted_return
from metasgd_jax.rl.surrogate import dice as dice, likelihood_ratio as likelihood_ratio, score as score
from metasgd_jax.rl.training import init as init, train as train
from metasgd_jax.rl.trpo import (
  TrpoConfig as TrpoConfig,
  TrpoInfo as TrpoInfo,
  conjugate_gradient as conjugate_gradient,
  fisher_product as fisher_product,
  trpo_update as trpo_update,
)
from metasgd_jax.rl.types import Environment as Environment, Policy as Policy, Trajectories as Trajectories
