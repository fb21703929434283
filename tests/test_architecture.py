"""Imports go downward only: a module imports from floors below its own (and layers from their base)."""

import ast
import pathlib

import keras_vdrop
from tests.messages import COMMANDS, messages, other_texts

ROOT = pathlib.Path(keras_vdrop.__file__).parent
FLOORS = [
    ["checks", "files", "layouts", "targets", "variables", "version", "warning"],
    ["scores"],
    ["functional"],
    ["sampling", "distributions"],
    ["priors"],
    ["posterior"],
    ["layers"],
    ["costs", "losses"],
    ["outputs"],
    ["pruning", "conversion", "objective", "normalization"],
    ["compaction", "selection", "observation", "diagnosis"],
    ["montecarlo", "callbacks", "metrics"],
    ["plots", "tfp"],
    ["cli"],
    ["__main__"],
]
LEVEL = {name: level for level, names in enumerate(FLOORS) for name in names}
HEAVY = {"tensorflow_probability", "matplotlib", "sklearn", "tensorflow", "jax", "torch"}


def modules():
    return [path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py"]


def place(path):
    return path.relative_to(ROOT).with_suffix("").parts[0]


def imported(tree):
    """(module, names, at module level) of every import."""
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, [], id(node) in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module, [alias.name for alias in node.names], id(node) in top


def test_every_module_has_a_floor():
    assert {place(path) for path in modules()} == set(LEVEL)


def test_imports_go_downward():
    for path in modules():
        for module, names, at_top in imported(ast.parse(path.read_text())):
            if (module or "").split(".")[0] != "keras_vdrop":
                continue
            parts = module.split(".")[1:]
            for target in [parts[0]] if parts else names:
                inside = target == place(path) and (
                    target in ("functional", "scores", "layers", "compaction", "conversion", "montecarlo", "cli")
                )
                below = LEVEL[target] < LEVEL[place(path)]
                assert below or inside or not at_top, f"{path.name} imports {target}"


# What all layers are made of, lowest first, and the modules that are composed of another one.
BASES = ["foreign_arguments", "rematerialization", "stochastic", "drop_in", "weights"]
COMPOSED = {"attention": "dense", "cells": "held", "recurrent": "cells", "variational": "monte_carlo_dropout"}


def test_layers_import_their_bases_and_what_they_are_composed_of_only():
    for path in (ROOT / "layers").glob("*.py"):
        if path.name == "__init__.py":
            continue
        bases = BASES[: BASES.index(path.stem)] if path.stem in BASES else BASES
        for module, _, _ in imported(ast.parse(path.read_text())):
            if (module or "").startswith("keras_vdrop.layers."):
                name = module.removeprefix("keras_vdrop.layers.")
                assert name in bases or COMPOSED.get(path.stem) == name, f"{path.name} imports {module}"


def test_public_keras_only_and_heavy_imports_on_use():
    for path in modules():
        for module, _, at_top in imported(ast.parse(path.read_text())):
            assert not (module or "").startswith("keras.src"), path
            assert not (at_top and (module or "").split(".")[0] in HEAVY), f"{path.name} imports {module} at once"


def test_every_message_is_listed():
    """However it is put together: by `ELBO`, in a table of answers, by a command, with its reason in a variable."""
    found = [text for path in [*modules(), COMMANDS] for _, text in other_texts(path)]
    found += [text for path in modules() for *_, text in messages(path)]
    for part in ("Pruning has collapsed", "The warm-up ends at epoch", "Stack layers", "There is no file", "needs the"):
        assert any(part in text for text in found), part
    assert not any(text.startswith("Return ") for text in found)  # docstrings are left out


def test_messages_say_what_was_given_or_what_to_do():
    for path in modules():
        for line, kind, message in messages(path):
            sentence = message[0].isupper() or message[0] in "`{"  # not a name, and not a reason in a longer message
            if kind in ("ValueError", "TypeError", "warn", "warnings.warn") and sentence and " " in message:
                useful = "{" in message or "Received" in message or "Use `" in message or "Pass `" in message
                assert useful, f"{path.name}:{line}: {message}"
