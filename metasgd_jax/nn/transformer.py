"""A small transformer for sequences of tokens."""

import flax.linen as nn
import jax.numpy as jnp


class TransformerBlock(nn.Module):
  """A pre-norm transformer block: attention and two dense layers, with residual connections.

  The block computes x ← x + attention(norm(x)), then x ← x + dense(gelu(dense(norm(x)))). This is the block of Vaswani
  et al. 2017, section 3.1, with the norm moved to the front as in GPT-2 (Radford et al. 2019).

  Attributes:
    heads: Number of attention heads, a divisor of the width.
    hidden: Number of units between the two dense layers.
    causal: Whether each position attends only to itself and to earlier positions.

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
    """Maps `[B, L, width]` to the same shape."""
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
  """A transformer with embeddings of tokens and positions, pre-norm blocks, a final norm, and logits at each position.

  The position embeddings are learned. The initial embeddings are drawn from N(0, 0.02²), as in GPT-2. The other
  initial weights are the defaults of flax. There is no dropout.

  Attributes:
    tokens: Number of tokens in the vocabulary, V.
    length: Maximum length of a sequence, in tokens.
    width: Width of the residual stream.
    depth: Number of blocks.
    heads: Number of attention heads, a divisor of `width`.
    hidden: Number of units between the two dense layers of a block, by default 4 · width.
    causal: Whether each position attends only to itself and to earlier positions, as for predicting the next token.

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
    """Maps tokens `[B, L]`, integers from 0 to V − 1, to logits `[B, L, V]`.

    Raises:
      ValueError: if the tokens are not integers `[B, L]`, if a sequence is longer than `length`, or if `width` is not a
        multiple of `heads`.
    """
    if x.ndim != 2 or not jnp.issubdtype(x.dtype, jnp.integer):
      raise ValueError(f'Transformer takes integer tokens [B, L], got {x.dtype} {x.shape}; convert or reshape them')
    if x.shape[1] > self.length:
      raise ValueError(
        f'a sequence may have at most {self.length} tokens (length={self.length}), got {x.shape[1]} tokens; '
        'build the Transformer with a greater length'
      )
    if self.width % self.heads:
      raise ValueError(
        f'`width` must be a multiple of `heads`, got width={self.width} and heads={self.heads}; change one of them'
      )
    initial = nn.initializers.normal(0.02)
    places = self.param('places', initial, (self.length, self.width))
    x = nn.Embed(self.tokens, self.width, embedding_init=initial, name='tokens_in')(x)
    x = x + places[None, : x.shape[1]]
    for i in range(self.depth):
      x = TransformerBlock(self.heads, self.hidden or 4 * self.width, self.causal, name=f'block_{i}')(x)
    return nn.Dense(self.tokens, name='tokens_out')(nn.LayerNorm(name='norm_out')(x))
