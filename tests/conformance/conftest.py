"""Run each test that takes `case` over all cases, each that takes `jit` with and without XLA compilation, and each that
takes `index` over the number of random configurations.
"""

from tests.cases import CASES


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", CASES, ids=str)
    if "index" in metafunc.fixturenames:
        metafunc.parametrize("index", range(metafunc.config.getoption("configurations")))
    if "jit" in metafunc.fixturenames:
        metafunc.parametrize("jit", [False, True], ids=["eager_or_graph", "jit"])
