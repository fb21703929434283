"""Every test here that takes `case` runs over all cases; one that takes `jit`, with and without compilation."""

from tests.cases import CASES


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", CASES, ids=str)
    if "jit" in metafunc.fixturenames:
        metafunc.parametrize("jit", [False, True], ids=["eager_or_graph", "jit"])
