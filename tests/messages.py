"""Print every message of the package: errors and warnings, and all other text that a user may see.

    python -m tests.messages

A message says what was given, why that is wrong, and what to do instead.
"""

import ast
import importlib.util
import pathlib

PACKAGE = pathlib.Path(importlib.util.find_spec("keras_vdrop").origin).parent
COMMANDS = PACKAGE.with_name("keras_vdrop_cli.py")
WARNINGS = ("warn", "warnings.warn", "sys.exit")


def messages(path):
    """Yield (line, kind, message) of each error and warning in a file; "{...}" stands where a message has a value."""
    for node in ast.walk(ast.parse(path.read_text())):
        call = node.exc if isinstance(node, ast.Raise) else node
        if not isinstance(call, ast.Call) or not call.args:
            continue
        name = ast.unparse(call.func)
        if isinstance(node, ast.Raise) or name in WARNINGS:
            yield call.lineno, name, spelled_out(call.args[0])


def other_texts(path):
    """Yield (line, text) of each string of more than three words that is neither in `messages` nor a docstring.

    Messages that are put together from parts are among them, such as those of `ELBO` and of the commands.
    """
    tree = ast.parse(path.read_text())
    seen = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) or (isinstance(node, ast.Call) and ast.unparse(node.func) in WARNINGS):
            seen.update(id(part) for part in ast.walk(node))
        elif isinstance(node, ast.JoinedStr):
            seen.update(id(part) for value in node.values for part in ast.walk(value))
    for node in ast.walk(tree):
        is_text = isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))
        if is_text and id(node) not in seen and len(spelled_out(node).split()) > 3:
            yield node.lineno, spelled_out(node)


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
    for path in [*sorted(PACKAGE.rglob("*.py")), COMMANDS]:
        found = [*messages(path), *((line, "text", text) for line, text in other_texts(path))]
        for line, kind, message in sorted(found):
            print(f"{path.relative_to(PACKAGE.parent)}:{line}: {kind}\n    {message}\n")
