"""Data of the image benchmarks: MNIST, Fashion-MNIST, or made-up images instead."""

import os
import pathlib

import common
import numpy as np


def load(folder, name, validation=False):
    """Load images for training and for evaluation.

    Args:
        folder: Folder of NAME.npz with x_train, y_train, x_test, y_test: images of 28×28 bytes, and labels. None for
            the folder in which `keras.datasets` saves its files.
        name: "mnist", "fashion_mnist"; or None for made-up images.
        validation: If True, "test" is the last sixth of the training images, and the test images are unused.

    Returns:
        {"train": (x, y), "test": (x, y)}, with x (N, 28, 28, 1) in [0, 1] and y (N,).
    """
    if name is None:
        files = _made_up()
    else:
        with np.load(common.data_file(folder or _keras_datasets(), f"{name}.npz")) as file:
            files = {part: (file[f"x_{part}"], file[f"y_{part}"]) for part in ("train", "test")}
    if validation:
        x, y = files["train"]
        cut = len(x) * 5 // 6
        files = {"train": (x[:cut], y[:cut]), "test": (x[cut:], y[cut:])}
    return {part: (scaled(x), y.astype("int32")) for part, (x, y) in files.items()}


def scaled(images):
    """Scale images of bytes, (N, 28, 28), to [0, 1], and add an axis of channels: (N, 28, 28, 1)."""
    return images[..., None].astype("float32") / 255


def _made_up(count=1000, seed=0):
    """Make noise images with one bright row, whose position encodes the label."""
    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, 100, (count, 28, 28)), rng.integers(0, 10, count)
    x[np.arange(count), 2 * y + 4] = 255
    cut = count * 4 // 5
    return {"train": (x[:cut], y[:cut]), "test": (x[cut:], y[cut:])}


def _keras_datasets():
    folder = pathlib.Path(os.environ.get("KERAS_HOME", "~/.keras"), "datasets").expanduser()
    return folder if folder.is_dir() else None
