"""Pytest configuration: deterministic tests on the backend that KERAS_BACKEND names, by default the quick ones."""

import collections
import contextlib
import gc
import itertools
import os
import pathlib
from unittest import mock

# One thread each is fastest for two test processes on two cores. It also fixes the order of float sums.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")
# By default TensorFlow uses oneDNN on recent CPUs only. Elsewhere it has no convolution for "channels_first".
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
# Optimised compilation would take longer than the few steps that the tests run.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
# Many tests compile the same functions in JAX. The cache reuses them within a run and across runs.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parents[1] / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")

import keras
import pytest

from keras_vdrop.layers import stochastic
from tests.cases import Case

# Only a type checker reads this file: it makes mistakes on purpose.
collect_ignore = ["typed_user.py"]
_TESTS = itertools.count(1)


@pytest.fixture(autouse=True)
def _fresh():
    """Reset the random seed and the record of warnings about an unset KL weight before each test."""
    # Collecting garbage takes longer than most tests, but without it JAX's compiled functions fill the memory.
    with _kept_kernels():
        keras.utils.clear_session(free_memory=next(_TESTS) % 20 == 0)
        keras.utils.set_random_seed(0)
    stochastic._unset.clear()
    stochastic._told.clear()


@contextlib.contextmanager
def _kept_kernels():
    """Keep TensorFlow's cache of kernels within the context; making them again slows down the next test.

    Both functions that empty the cache are replaced: the one that Keras asks before it does so, and the setter of
    TensorFlow's own global seed, which nothing in the tests depends on.
    """
    with contextlib.ExitStack() as stack:
        if keras.backend.backend() == "tensorflow":
            stack.enter_context(mock.patch("tensorflow.executing_eagerly", return_value=False))
            stack.enter_context(mock.patch("tensorflow.random.set_seed"))
        yield


def pytest_addoption(parser):
    text = "run the slow tests and all cases too; without it, only files named on the command line run in full"
    parser.addoption("--full", action="store_true", help=text)
    text = "number of random configurations of each layer; by default 15 with --full, else 3, or 1 on JAX and PyTorch"
    parser.addoption("--configurations", type=int, help=text)


def pytest_configure(config):
    text = "slow(keep=0): without --full, only the first `keep` parameter sets of the test run; one on JAX and PyTorch"
    config.addinivalue_line("markers", text)
    text = "any_backend: without --full, the test runs on TensorFlow only; it does not depend on the backend"
    config.addinivalue_line("markers", text)
    if config.option.configurations is None:
        config.option.configurations = 15 if _is_full(config) else 1 if _is_other_backend() else 3


def pytest_report_header(config):
    return f"keras {keras.__version__} on {keras.backend.backend()}, {'all' if _is_full(config) else 'quick'} tests"


def pytest_collection_modifyitems(config, items):
    """Without `--full`, deselect rare cases and slow tests."""
    if _is_full(config):
        return
    functions = collections.defaultdict(list)
    for item in items:
        functions[item.nodeid.partition("[")[0]].append(item)
    quick = {item for of_function in functions.values() for item in _quick(of_function)}
    config.hook.pytest_deselected(items=[item for item in items if item not in quick])
    items[:] = [item for item in items if item in quick]


def pytest_collection_finish():
    """Exclude what has been imported from collections of garbage, which are then ten times as fast."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter, config):
    if not _is_full(config):
        terminalreporter.write_line("These were the quick tests. `pytest --full` runs the slow ones and all cases too.")


def _is_full(config):
    named = any(".py" in argument for argument in config.args)
    return config.getoption("full") or named


def _is_other_backend():
    return keras.backend.backend() != "tensorflow"


def _quick(items):
    """Return those of the items of one test function that run without `--full`."""
    if _is_other_backend() and items[0].get_closest_marker("any_backend"):
        return []
    typical = [item for item in items if not any(_is_rare(value) for value in _parameters(item))] or items[:1]
    slow = items[0].get_closest_marker("slow")
    if slow is None:
        return typical
    keep = slow.kwargs.get("keep", 0)
    return typical[: min(keep, 1) if _is_other_backend() else keep]


def _parameters(item):
    return item.callspec.params.values() if hasattr(item, "callspec") else ()


def _is_rare(value):
    return isinstance(value, Case) and value.is_rare
