"""Deterministic tests, on the backend that KERAS_BACKEND names."""

import itertools
import os
import pathlib

# Two test processes on two cores: one thread each is fastest, and float sums come out in one order.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")
# Compiling takes longer than the few steps that are run.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
# Many tests have JAX compile what another one has compiled, in this run or an earlier one.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parents[1] / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")

import keras
import pytest

from keras_vdrop.layers import base

_TESTS = itertools.count(1)


@pytest.fixture(autouse=True)
def _fresh():
    """Every test starts from one seed, and hears the warning about an unset KL weight for its own layers only."""
    # Collecting garbage takes longer than most tests, and without it what JAX has compiled fills the memory.
    keras.utils.clear_session(free_memory=next(_TESTS) % 20 == 0)
    keras.utils.set_random_seed(0)
    base._unset.clear()
    base._told.clear()


def pytest_report_header():
    return f"keras {keras.__version__} on {keras.backend.backend()}"
