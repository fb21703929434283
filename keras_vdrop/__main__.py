"""`python -m keras_vdrop demo`, `report` and `compact`."""

import argparse
import importlib.util
import math
import os
import pathlib
import sys
import zipfile

from keras_vdrop.files import replace


def main(arguments=None):
    """Run a command line and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m keras_vdrop", description="Variational dropout for Keras 3.")
    commands = parser.add_subparsers(dest="command", required=True)

    demo = commands.add_parser("demo", help="train, prune and compare a small network on scikit-learn's digits")
    demo.add_argument(
        "--out",
        default="demo",
        help="folder for the model and the plot; gets a number if it is not empty (default: %(default)s)",
    )
    demo.add_argument("--seed", type=_seed, default=0, help="seed of the split, the weights and the noise (default: 0)")
    demo.add_argument("--quick", action="store_true", help="train for few epochs, only to check that it runs")
    demo.add_argument("--beta", type=_beta, default=0.3, help="weight of the KL; 1 is the ELBO (default: %(default)s)")

    report = commands.add_parser("report", help="print how many weights a saved model needs in each layer")
    compact = commands.add_parser(
        "compact", help="save a smaller model of Keras's own layers with the same predictions"
    )
    for command in (report, compact):
        command.add_argument("model", type=pathlib.Path, help="a .keras file")
        command.add_argument("--threshold", type=_finite, help="threshold on log alpha (default: that of each layer)")
    compact.add_argument("-o", "--out", type=pathlib.Path, required=True, help="the .keras file to write")
    compact.add_argument(
        "--data",
        type=pathlib.Path,
        help="an .npz file of inputs on which the two models are compared; its arrays are sorted by name",
    )
    compact.add_argument("--force", action="store_true", help="overwrite an existing file")

    options = parser.parse_args(arguments)
    run = {"demo": _demo, "report": _report, "compact": _compact}[options.command]
    try:
        return run(options, commands.choices[options.command])
    except OSError as error:
        print(f"{parser.prog} {options.command}: {_one_line(error)}", file=sys.stderr)
        return 1


def _finite(text):
    """Parse an argument of the command line as a finite number."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a finite number. Received: {text}")
    return value


def _beta(text):
    value = _finite(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be ≥ 0. Received: {text}")
    return value


def _seed(text):
    value = int(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"must be an int from 0 to 2³² − 1. Received: {text}")
    return value


def _demo(options, parser):
    missing = [name for name in ("sklearn", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        parser.error(f"the demo needs {' and '.join(missing)}: pip install 'keras-vdrop[demo]'")
    _check_writable(_nearest_folder(pathlib.Path(options.out)))
    from keras_vdrop import demo

    return demo.run(options.out, options.seed, options.quick, options.beta)


def _report(options, parser):
    from keras_vdrop.pruning import sparsity

    model = _load(options.model, parser)
    _or_error(parser, lambda: print(sparsity(model, options.threshold)))


def _compact(options, parser):
    if options.out.suffix != ".keras":
        parser.error(f"--out must end in .keras, Keras's format. Received: {options.out}")
    if options.out.exists() and not options.force:
        parser.error(f"{options.out} already exists. Choose another file, or pass --force.")
    if not options.out.parent.is_dir():
        parser.error(f"There is no folder {options.out.parent}.")
    if options.out.is_dir():
        parser.error(f"--out must be a file. Received: {options.out}, a folder")
    _check_writable(options.out.parent)
    from keras_vdrop.compaction import compact
    from keras_vdrop.costs import file_sizes

    if options.data is not None:
        _check_arrays(options.data, parser)
    model = _load(options.model, parser)
    x = None if options.data is None else _arrays(options.data, len(model.inputs), parser)
    small = _or_error(parser, lambda: compact(model, options.threshold, x))
    before = file_sizes(options.model)  # `options.out` may be the same file
    replace(options.out, small.save)
    small.summary()
    for path, (plain, gzipped) in ((options.model, before), (options.out, file_sizes(options.out))):
        print(f"{path}: {plain:,} bytes, {gzipped:,} gzipped")


def _check_writable(folder):
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"The folder {folder} can't be written to.")


def _nearest_folder(path):
    """Return the folder, or if it does not exist, its nearest parent that does."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


def _load(path, parser):
    import keras

    if not path.is_file():
        parser.error(f"There is no file {path}.")
    try:
        return keras.saving.load_model(path, compile=False)
    except Exception as error:  # a damaged file may raise any exception
        raise OSError(f"{path} can't be loaded as a model: {type(error).__name__}: {error}") from error


def _check_arrays(path, parser):
    if not path.is_file():
        parser.error(f"There is no file {path}.")
    if not zipfile.is_zipfile(path):
        parser.error(f"{path} is not an .npz file. Write one with numpy.savez.")


def _arrays(path, count, parser):
    """Return the array of a file if `count` is 1, else the list of its arrays in the order of their names."""
    import numpy as np

    try:
        with np.load(path) as file:
            arrays = {name: file[name] for name in sorted(file.files)}
    except Exception as error:  # a damaged file may raise any exception
        raise OSError(f"{path} can't be read: {type(error).__name__}: {error}") from error
    if len(arrays) != count:
        parser.error(f"The model needs one array for each input: {count}. Received: {path} with {', '.join(arrays)}")
    x = list(arrays.values())
    return x[0] if count == 1 else x


def _or_error(parser, action):
    """Return the action's result; report any exception, whose type depends on the backend, as a usage error."""
    try:
        return action()
    except Exception as error:
        parser.error(_one_line(error))


def _one_line(error):
    return " ".join(str(error).split())


if __name__ == "__main__":
    sys.exit(main())
