"""`keras-vdrop compact`: save the smaller model."""

import os

from keras_vdrop.cli.files import load_inputs, load_model
from keras_vdrop.compaction import compact
from keras_vdrop.costs import file_sizes
from keras_vdrop.files import replace


def run(
    path: str | os.PathLike,
    out: str | os.PathLike,
    threshold: float | None = None,
    data: str | os.PathLike | None = None,
) -> int:
    """Compact a saved model, save the result, and print its layers and the sizes of both files.

    Args:
        path: Path of a .keras file.
        out: Path of the .keras file to write; it may be `path`.
        threshold: As for `compact`.
        data: Path of an .npz file of inputs on which the two models are compared, or None.

    Returns:
        The exit status, 0.

    Raises:
        OSError: If a file cannot be read or written.
        ValueError: If the model has no smaller counterpart, or the inputs do not fit it.
    """
    model = load_model(path)
    x = None if data is None else load_inputs(data, model)
    try:
        small = compact(model, threshold, x)
    except Exception as error:  # inputs of a wrong shape raise what the backend raises
        raise ValueError(str(error)) from error
    before = file_sizes(path)  # `out` may be the same file
    replace(out, small.save)
    small.summary()
    for each, (plain, gzipped) in ((path, before), (out, file_sizes(out))):
        print(f"{each}: {plain:,} bytes, {gzipped:,} gzipped")
    return 0
