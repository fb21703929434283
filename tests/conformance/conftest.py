"""Run each test that takes `case` over all cases, and each test that takes `jit` with and without XLA compilation."""

from tests.cases import CASES


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", CASES, ids=str)
    if "jit" in metafunc.fixturenames:
        metafunc.parametrize("jit", [False, True], ids=["eager_or_graph", "jit"])
