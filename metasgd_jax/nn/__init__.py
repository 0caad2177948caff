"""Networks, and layers that are fast under second derivatives."""

from metasgd_jax.nn.block import BatchNorm, ConvBlock, conv_block
from metasgd_jax.nn.conv import Conv, conv_general_dilated, max_pool
from metasgd_jax.nn.networks import MLP, Conv4, KochNet, from_linen

__all__ = [
  'MLP',
  'BatchNorm',
  'Conv',
  'Conv4',
  'ConvBlock',
  'KochNet',
  'conv_block',
  'conv_general_dilated',
  'from_linen',
  'max_pool',
]
