"""Networks, and layers whose second derivatives are fast to compute."""

from metasgd_jax.nn.adapters import from_equinox, from_nnx
from metasgd_jax.nn.block import BatchNorm, ConvBlock, conv_block
from metasgd_jax.nn.conv import Conv, conv_general_dilated, max_pool
from metasgd_jax.nn.networks import MLP, Conv4, KochNet, from_linen
from metasgd_jax.nn.resnet import ResidualBlock, ResNet12
from metasgd_jax.nn.transformer import Transformer, TransformerBlock

__all__ = [
  'MLP',
  'BatchNorm',
  'Conv',
  'Conv4',
  'ConvBlock',
  'KochNet',
  'ResNet12',
  'ResidualBlock',
  'Transformer',
  'TransformerBlock',
  'conv_block',
  'conv_general_dilated',
  'from_equinox',
  'from_linen',
  'from_nnx',
  'max_pool',
]
