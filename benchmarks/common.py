"""What the benchmarks share: where data are, and how a result is kept."""

import argparse
import datetime
import gzip
import importlib.metadata
import json
import os
import pathlib
import platform
import shlex
import sys

import numpy as np

RESULTS = pathlib.Path(__file__).parent / "results"


def parser(description):
    """Arguments that every benchmark takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=os.environ.get("KERAS_VDROP_DATA"), help="folder of data (KERAS_VDROP_DATA)")
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds, from 0 on")
    parser.add_argument("--quick", action="store_true", help="made-up data and few steps, to see that it runs")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file for the result; nothing is kept without it")
    return parser


def data_file(folder, *parts):
    """A file below the data folder, or an exit that says what is missing and where to put it."""
    if folder is None:
        sys.exit(
            f"Where are the data? Pass --data DIR with DIR/{'/'.join(parts)}, set KERAS_VDROP_DATA, or use --quick."
        )
    path = pathlib.Path(folder, *parts)
    if not path.is_file():
        sys.exit(f"{path} is missing: put it there, or name another folder by --data.")
    return path


def rt_polarity(folder):
    """Film-review sentences as lists of words, and 1 for a positive one, else 0.

    From `rt-polarity/rt-polarity.{pos,neg}.gz`: the sentence polarity data set 1.0 of Pang and Lee (2005), one
    sentence a line, gzipped, UTF-8.
    """
    sentences, labels = [], []
    for kind, label in (("neg", 0), ("pos", 1)):
        with gzip.open(data_file(folder, "rt-polarity", f"rt-polarity.{kind}.gz"), "rt", encoding="utf-8") as lines:
            found = [line.split() for line in lines if line.strip()]
        sentences += found
        labels += [label] * len(found)
    return sentences, np.array(labels)


def made_up_sentences(count=600, seed=0):
    """Sentences of made-up words, some of which say what the label is: a stand-in for `rt_polarity`."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, count)
    words = rng.integers(0, 200, (count, 12))
    words[:, ::4] = rng.integers(0, 10, (count, 3)) + 10 * labels[:, None]
    return [[f"word{word}" for word in row] for row in words], labels


def split(count, seed=0):
    """Indices of a fixed 80/10/10 split: train, validation, test."""
    order = np.random.default_rng(seed).permutation(count)
    return np.split(order, [int(0.8 * count), int(0.9 * count)])


def spread(values):
    """Mean ± standard deviation over the seeds, as text."""
    return f"{np.mean(values):.2f} ± {np.std(values, ddof=1) if len(values) > 1 else 0.0:.2f}"


def keep(path, result):
    """Write a result with the command, the versions, the machine and the date."""
    if path is None:
        return
    packages = ("keras", "tensorflow", "jax", "torch", "numpy")
    about = {
        "command": shlex.join(["python", *_without_places(sys.argv)]),
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
        "cores": os.cpu_count(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**about, **result}, indent=1) + "\n")
    print(f"\nkept in {path}")


def _without_places(arguments):
    """The command with DIR for the folder of data, which is where it is on one machine only."""
    return ["DIR" if before == "--data" else after for before, after in zip([None, *arguments], arguments)]


def _version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
