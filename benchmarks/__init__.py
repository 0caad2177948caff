"""Benchmarks that compare metasgd_jax with other libraries and with plain JAX."""

ALPHA = 0.1
"""Initial learning rate α of the inner step, in every program that is compared."""
