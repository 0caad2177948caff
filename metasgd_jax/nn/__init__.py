"""Networks that stay fast under second derivatives."""

from metasgd_jax.nn.conv import BatchNorm, Conv, conv, max_pool
from metasgd_jax.nn.networks import MLP, Conv4, from_linen

__all__ = ['MLP', 'BatchNorm', 'Conv', 'Conv4', 'conv', 'from_linen', 'max_pool']
