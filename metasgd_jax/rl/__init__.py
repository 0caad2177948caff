"""Reinforcement learning: a task is a Markov decision process, and an inner step is a policy-gradient step."""

from metasgd_jax.rl.advantages import (
  MAML_ADVANTAGES,
  AdvantageConfig,
  advantages,
  discounted_returns,
  fit_linear,
  generalized_advantages,
  linear_features,
  normalize,
)
from metasgd_jax.rl.gymnasium_host import collect_on_host, policy_gradient_on_host
from metasgd_jax.rl.learner import (
  Experience,
  PolicyGradient,
  RolloutRequest,
  mean_return,
  policy_gradient,
  policy_learner,
  returns_by_step,
  task_distribution,
)
from metasgd_jax.rl.meta_step import trpo_meta_step
from metasgd_jax.rl.navigation import Navigation, navigation
from metasgd_jax.rl.pendulum import Pendulum, PendulumConfig, pendulum
from metasgd_jax.rl.policies import Gaussian, gaussian
from metasgd_jax.rl.rollout import collect, rollout, undiscounted_return
from metasgd_jax.rl.surrogate import dice, likelihood_ratio, score
from metasgd_jax.rl.training import init, train
from metasgd_jax.rl.trpo import TrpoConfig, TrpoInfo, conjugate_gradient, fisher_product, trpo_update
from metasgd_jax.rl.types import Environment, Policy, Trajectories

__all__ = [
  'MAML_ADVANTAGES',
  'AdvantageConfig',
  'Environment',
  'Experience',
  'Gaussian',
  'Navigation',
  'Pendulum',
  'PendulumConfig',
  'Policy',
  'PolicyGradient',
  'RolloutRequest',
  'Trajectories',
  'TrpoConfig',
  'TrpoInfo',
  'advantages',
  'collect',
  'collect_on_host',
  'conjugate_gradient',
  'dice',
  'discounted_returns',
  'fisher_product',
  'fit_linear',
  'gaussian',
  'generalized_advantages',
  'init',
  'likelihood_ratio',
  'linear_features',
  'mean_return',
  'navigation',
  'normalize',
  'pendulum',
  'policy_gradient',
  'policy_gradient_on_host',
  'policy_learner',
  'returns_by_step',
  'rollout',
  'score',
  'task_distribution',
  'train',
  'trpo_meta_step',
  'trpo_update',
  'undiscounted_return',
]
