"""Networks, and layers whose second derivatives are fast to compute."""

from metasgd_jax.nn.adapters import from_equinox as from_equinox, from_linen as from_linen, from_nnx as from_nnx
from metasgd_jax.nn.block import BatchNorm as BatchNorm, ConvBlock as ConvBlock, conv_block as conv_block
from metasgd_jax.nn.conv import Conv as Conv, conv_general_dilated as conv_general_dilated, max_pool as max_pool
from metasgd_jax.nn.networks import MLP as MLP, Conv4 as Conv4, KochNet as KochNet
from metasgd_jax.nn.resnet import ResidualBlock as ResidualBlock, ResNet12 as ResNet12
from metasgd_jax.nn.transformer import Transformer as Transformer, TransformerBlock as TransformerBlock
