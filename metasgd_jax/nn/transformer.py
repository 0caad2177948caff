"""A small transformer on sequences of tokens."""

import flax.linen as nn
import jax.numpy as jnp


class TransformerBlock(nn.Module):
  """Attention and two dense layers, each added to its input, which is normalised before it (pre-norm).

  x ← x + attention(norm(x)), x ← x + dense(gelu(dense(norm(x)))): Vaswani et al. 2017, section 3.1, with the norm
  moved to the front as in GPT-2 (Radford et al. 2019).

  Attributes:
    heads: of attention; a divisor of the width.
    hidden: units between the two dense layers.
    causal: whether a place sees none after it.

  Example:
    >>> block = ms.nn.TransformerBlock(heads=2, hidden=16, causal=True)
    >>> jax.eval_shape(lambda key, x: block.init_with_output(key, x)[0], jax.random.key(0), jnp.zeros((2, 5, 8))).shape
    (2, 5, 8)
  """

  heads: int
  hidden: int
  causal: bool

  @nn.compact
  def __call__(self, x):
    """`[B, L, width]` → the same shape."""
    batch, length, width = x.shape
    normed = nn.LayerNorm(name='norm_attention')(x)
    parts = [nn.Dense(width, use_bias=False, name=n)(normed) for n in ('query', 'key', 'value')]
    q, k, v = (p.reshape(batch, length, self.heads, -1) for p in parts)
    mask = nn.make_causal_mask(jnp.zeros((batch, length))) if self.causal else None
    seen = nn.dot_product_attention(q, k, v, mask=mask).reshape(batch, length, width)
    x = x + nn.Dense(width, use_bias=False, name='out')(seen)
    normed = nn.LayerNorm(name='norm_dense')(x)
    return x + nn.Dense(width, name='dense_out')(nn.gelu(nn.Dense(self.hidden, name='dense_in')(normed)))


class Transformer(nn.Module):
  """Tokens and learned places, blocks, a norm, and a dense layer to each token's logits.

  Weights of embeddings N(0, 0.02²), as GPT-2's; the others flax's. Nothing is dropped out.

  Attributes:
    tokens: V, of the vocabulary.
    length: the most places.
    width: of the residual stream.
    depth: blocks.
    heads: of attention; a divisor of width.
    hidden: units between a block's two dense layers; 4 width where left out.
    causal: whether a place sees none after it, as for predicting the next token.

  Example:
    >>> module = ms.nn.Transformer(tokens=7, length=10, width=8, depth=1, heads=2)
    >>> model = ms.nn.from_linen(module)
    >>> theta = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 10), jnp.int32))
    >>> jax.jit(model.apply)(theta, jnp.zeros((2, 10), jnp.int32)).shape
    (2, 10, 7)
  """

  tokens: int
  length: int
  width: int = 64
  depth: int = 2
  heads: int = 4
  hidden: int | None = None
  causal: bool = True

  @nn.compact
  def __call__(self, x):
    """Tokens `[B, L]`, integers 0 to V − 1 → logits `[B, L, V]`.

    Raises:
      ValueError: other ranks or dtypes, sequences that are too long, or a width that is no multiple of the heads.
    """
    if x.ndim != 2 or not jnp.issubdtype(x.dtype, jnp.integer):
      raise ValueError(f'Transformer takes integer tokens [B, L], got {x.dtype} {x.shape}')
    if x.shape[1] > self.length:
      raise ValueError(f'sequences may have {self.length} places, got {x.shape[1]}; build it with a greater length')
    if self.width % self.heads:
      raise ValueError(f'width must be a multiple of heads, got width={self.width} and heads={self.heads}')
    initial = nn.initializers.normal(0.02)
    places = self.param('places', initial, (self.length, self.width))
    x = nn.Embed(self.tokens, self.width, embedding_init=initial, name='tokens_in')(x)
    x = x + places[None, : x.shape[1]]
    for i in range(self.depth):
      x = TransformerBlock(self.heads, self.hidden or 4 * self.width, self.causal, name=f'block_{i}')(x)
    return nn.Dense(self.tokens, name='tokens_out')(nn.LayerNorm(name='norm_out')(x))
