"""Print every message with which the package raises an error or warns.

    python -m tests.messages

A message says what was given, why that is wrong, and what to do instead.
"""

import ast
import importlib.util
import pathlib

PACKAGE = pathlib.Path(importlib.util.find_spec("keras_vdrop").origin).parent


def messages(path):
    """Yield (line, kind, message) of each error and warning in a file; "{...}" stands where a message has a value."""
    for node in ast.walk(ast.parse(path.read_text())):
        call = node.exc if isinstance(node, ast.Raise) else node
        if not isinstance(call, ast.Call) or not call.args:
            continue
        name = ast.unparse(call.func)
        if isinstance(node, ast.Raise) or name in ("warn", "warnings.warn", "sys.exit"):
            yield call.lineno, name, spelled_out(call.args[0])


def spelled_out(node):
    """Return the text of a string expression, with what it inserts as source in braces."""
    return ast.unparse(node) if not isinstance(node, (ast.Constant, ast.JoinedStr)) else "".join(_parts(node))


def _parts(node):
    if isinstance(node, ast.Constant):
        yield str(node.value)
    else:
        for value in node.values:
            yield str(value.value) if isinstance(value, ast.Constant) else f"{{{ast.unparse(value.value)}}}"


if __name__ == "__main__":
    for path in sorted(PACKAGE.rglob("*.py")):
        for line, kind, message in messages(path):
            print(f"{path.relative_to(PACKAGE.parent)}:{line}: {kind}\n    {message}\n")
