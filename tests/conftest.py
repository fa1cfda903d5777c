"""Test configuration: eight virtual CPU devices, strict dtypes, real data only where it is."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tiny programs, compiled by the hundred: without optimisation the suite takes little more than half the time.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

import hypothesis
import jax
import pytest

hypothesis.settings.register_profile("distill_jax", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("distill_jax")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

DATA = Path(os.environ.get("DISTILL_JAX_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


FULL = 3 << 30
"""Resident bytes of a worker from which it forgets its compiled programs after a module of tests."""


@pytest.fixture(autouse=True, scope="module")
def bounded_memory():
    """Compiled programs stay in memory for good, and a worker compiles thousands of them."""
    yield
    status = Path("/proc/self/statm")
    if status.is_file() and int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") > FULL:
        jax.clear_caches()


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of the real public data. Tests that use it skip where it is absent."""
    if not DATA.is_dir():
        pytest.skip(f"real data not at {DATA}; set DISTILL_JAX_DATA to its folder")
    return DATA
