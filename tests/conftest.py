"""Pytest configuration: deterministic tests on the backend that KERAS_BACKEND names."""

import itertools
import os
import pathlib

# One thread each is fastest for two test processes on two cores. It also fixes the order of float sums.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")
# Optimised compilation would take longer than the few steps that the tests run.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
# Many tests compile the same functions in JAX. The cache reuses them within a run and across runs.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parents[1] / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")

import keras
import pytest

from keras_vdrop.layers import stochastic

# Only a type checker reads this file: it makes mistakes on purpose.
collect_ignore = ["typed_user.py"]
_TESTS = itertools.count(1)


@pytest.fixture(autouse=True)
def _fresh():
    """Reset the random seed and the record of warnings about an unset KL weight before each test."""
    # Collecting garbage takes longer than most tests, but without it JAX's compiled functions fill the memory.
    keras.utils.clear_session(free_memory=next(_TESTS) % 20 == 0)
    keras.utils.set_random_seed(0)
    stochastic._unset.clear()
    stochastic._told.clear()


def pytest_report_header():
    return f"keras {keras.__version__} on {keras.backend.backend()}"
