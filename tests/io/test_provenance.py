from metasgd_jax.io import provenance


def test_provenance_names_versions_and_device():
  about = provenance.collect()
  assert {'python', 'jax', 'optax', 'flax', 'metasgd_jax'} <= set(about['versions'])
  assert about['device']['kind']
  assert about['jax_settings']['jax_enable_x64'] is False
