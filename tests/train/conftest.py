"""Compiled steps are kept on disk between tests: many train the same tiny model."""

import jax
import pytest


@pytest.fixture(scope="session", autouse=True)
def compile_cache(tmp_path_factory):
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs",
             "jax_persistent_cache_min_entry_size_bytes")
    before = {n: getattr(jax.config, n) for n in names}
    for name, value in zip(names, (str(tmp_path_factory.mktemp("compiled")), 0.0, -1)):
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
