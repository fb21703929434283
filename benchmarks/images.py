"""What the benchmarks on images share: MNIST, Fashion-MNIST, and made-up images in their place."""

import os
import pathlib

import common
import numpy as np


def load(folder, name, validation=False):
    """The images in two parts, to learn from and to judge by.

    Args:
        folder: Of NAME.npz with x_train, y_train, x_test, y_test: images of 28×28 bytes, and labels. None for where
            `keras.datasets` keeps it.
        name: "mnist", "fashion_mnist"; or None for made-up images.
        validation: Whether to judge by the last sixth of the training images in place of the test images.

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
    """Bytes (N, 28, 28) as (N, 28, 28, 1) in [0, 1]."""
    return images[..., None].astype("float32") / 255


def _made_up(count=1000, seed=0):
    """Noise with a bright bar where the label says."""
    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, 100, (count, 28, 28)), rng.integers(0, 10, count)
    x[np.arange(count), 2 * y + 4] = 255
    cut = count * 4 // 5
    return {"train": (x[:cut], y[:cut]), "test": (x[cut:], y[cut:])}


def _keras_datasets():
    folder = pathlib.Path(os.environ.get("KERAS_HOME", "~/.keras"), "datasets").expanduser()
    return folder if folder.is_dir() else None
