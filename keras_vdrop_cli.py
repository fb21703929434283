"""The command `keras-vdrop`: it reads and checks arguments before it imports the package, which takes seconds."""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import pathlib
import re
import runpy
import sys
import zipfile
from collections.abc import Callable, Iterable, Sequence
from typing import Any

PLOTS = ("log_alpha_by_layer.png", "weight_histogram.png")  # what `report` draws


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
        arguments: List of strings, or None for those of the process.

    Returns:
        The exit status: 0, or 1 if the command failed.

    Raises:
        SystemExit: With status 2 for wrong arguments, and 0 after `--help` and `--version`.
    """
    parser, commands = _parsers()
    options = parser.parse_args(arguments)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # or TensorFlow logs to stderr
    check, run = {
        "demo": (_check_demo, _demo),
        "report": (_check_report, _report),
        "compact": (_check_compact, _compact),
    }[options.command]
    try:
        check(options, commands.choices[options.command])
        return run(options)
    except (OSError, ValueError) as error:
        message = re.sub(r"\x1b\[[0-9;]*m", "", str(error))  # Keras colours its messages
        print(f"{parser.prog} {options.command}: {' '.join(message.split())}", file=sys.stderr)
        return 1


def _parsers() -> tuple[argparse.ArgumentParser, Any]:
    parser = argparse.ArgumentParser(prog="keras-vdrop", description="Variational dropout for Keras 3.")
    parser.add_argument("--version", action="version", version=f"keras-vdrop {_version()}")
    commands = parser.add_subparsers(dest="command", required=True)

    demo = commands.add_parser("demo", help="train, prune and compare a small network on scikit-learn's digits")
    demo.add_argument(
        "--out",
        type=pathlib.Path,
        default="demo",
        help="folder for the model and the plot; gets a number if it is not empty (default: %(default)s)",
    )
    demo.add_argument("--seed", type=_seed, default=0, help="seed of the split, the weights and the noise (default: 0)")
    demo.add_argument("--quick", action="store_true", help="train for few epochs, only to check that it runs")
    demo.add_argument("--beta", type=_beta, default=0.3, help="weight of the KL; 1 is the ELBO (default: %(default)s)")

    report = commands.add_parser("report", help="print how many weights a saved model needs in each layer")
    report.add_argument("--plots", type=pathlib.Path, metavar="FOLDER", help="folder in which to save the plots")
    report.add_argument("--html", type=pathlib.Path, metavar="FILE", help="page to write, with the table and the plots")

    compact = commands.add_parser(
        "compact", help="save a smaller model of Keras's own layers with the same predictions"
    )
    compact.add_argument("-o", "--out", type=pathlib.Path, required=True, help="the .keras file to write")
    compact.add_argument(
        "--data",
        type=pathlib.Path,
        help="an .npz file of inputs on which the two models are compared; its arrays are sorted by name",
    )
    for command in (report, compact):
        command.add_argument("model", type=pathlib.Path, help="a .keras file")
        command.add_argument("--threshold", type=_finite, help="threshold on log alpha (default: that of each layer)")
        command.add_argument("--force", action="store_true", help="overwrite existing files")
    return parser, commands


def _version() -> str:
    """Return the package's version without importing the package."""
    path = pathlib.Path(__file__).with_name("keras_vdrop") / "version.py"
    return runpy.run_path(str(path))["__version__"]


# Types of arguments


def _number(kind: Callable[[str], float], in_range: Callable[[float], bool], text: str, expected: str) -> float:
    """Return a number of a given type and range; argparse reports the error with the name of the argument."""
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not in_range(value):
        raise argparse.ArgumentTypeError(f"must be {expected}. Received: {text}")
    return value


def _finite(text: str) -> float:
    return _number(float, math.isfinite, text, "a finite number")


def _beta(text: str) -> float:
    return _number(float, lambda value: 0 <= value < math.inf, text, "a finite number ≥ 0")


def _seed(text: str) -> float:
    return _number(int, lambda value: 0 <= value < 2**32, text, "an int from 0 to 2³² − 1")


# Checks of the files and of what is installed


def _check_demo(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    _check_installed("the demo needs", ("scikit-learn", "matplotlib"), parser)
    _check_writable(_nearest_folder(options.out))


def _check_report(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    _check_model(options.model, parser)
    if options.plots or options.html:
        _check_installed("the plots need", ("matplotlib",), parser)
    if options.plots:
        if options.plots.exists() and not options.plots.is_dir():
            parser.error(f"--plots must be a folder. Received: {options.plots}, a file")
        for name in PLOTS:
            _check_free(options.plots / name, options.force, parser)
        _check_writable(_nearest_folder(options.plots))
    if options.html:
        _check_new_file("--html", options.html, (".html", ".htm"), options.force, parser)


def _check_compact(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    _check_model(options.model, parser)
    _check_new_file("--out", options.out, (".keras",), options.force, parser)
    if options.data is not None:
        _check_file(options.data, parser)
        if not zipfile.is_zipfile(options.data):
            parser.error(f"{options.data} is not an .npz file. Write one with numpy.savez.")


# The module that each distribution installs.
_MODULES = {"scikit-learn": "sklearn", "matplotlib": "matplotlib"}


def _check_installed(what: str, modules: Iterable[str], parser: argparse.ArgumentParser) -> None:
    missing = [name for name in modules if importlib.util.find_spec(_MODULES[name]) is None]
    if missing:
        parser.error(f"{what} {' and '.join(missing)}, which cannot be imported: pip install {' '.join(missing)}")


def _check_model(path: pathlib.Path, parser: argparse.ArgumentParser) -> None:
    _check_file(path, parser)
    if path.suffix not in (".h5", ".hdf5") and not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is not a .keras file, or is damaged. Write one with model.save.")


def _check_file(path: pathlib.Path, parser: argparse.ArgumentParser) -> None:
    if not path.is_file():
        parser.error(f"There is no file {path}.")


def _check_new_file(
    name: str, path: pathlib.Path, suffixes: tuple[str, ...], force: bool, parser: argparse.ArgumentParser
) -> None:
    if path.suffix not in suffixes:
        parser.error(f"{name} must end in {suffixes[0]}. Received: {path}")
    if path.is_dir():
        parser.error(f"{name} must be a file. Received: {path}, a folder")
    _check_free(path, force, parser)
    if not path.parent.is_dir():
        parser.error(f"There is no folder {path.parent}.")
    _check_writable(path.parent)


def _check_free(path: pathlib.Path, force: bool, parser: argparse.ArgumentParser) -> None:
    if path.exists() and not force:
        parser.error(f"{path} already exists. Choose another place, or pass --force.")


def _check_writable(folder: pathlib.Path) -> None:
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"Cannot write to the folder {folder}.")


def _nearest_folder(path: pathlib.Path) -> pathlib.Path:
    """Return the folder, or if it does not exist, its nearest parent that does."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())


# Commands: each imports the package


def _demo(options: argparse.Namespace) -> int:
    from keras_vdrop.cli import demo

    return demo.run(options.out, options.seed, options.quick, options.beta)


def _report(options: argparse.Namespace) -> int:
    from keras_vdrop.cli import report

    return report.run(options.model, options.threshold, options.plots, options.html)


def _compact(options: argparse.Namespace) -> int:
    from keras_vdrop.cli import compact

    return compact.run(options.model, options.out, options.threshold, options.data)


if __name__ == "__main__":
    sys.exit(main())
