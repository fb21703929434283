"""Files that are whole or not there."""

import os
import pathlib


def replace(path, write):
    """Have a file written beside its place, and put there once it is whole: what is there is not lost before.

    Args:
        path: Of the file.
        write: Callable that takes the path to write to, of the same suffix.

    Raises:
        OSError: Where it can't be written; nothing is left of it.
    """
    path = pathlib.Path(path)
    if path.exists() and not os.access(path, os.W_OK):
        raise PermissionError(f"{path} can't be written to.")
    beside = path.with_name(f".{path.stem}-{os.getpid()}{path.suffix}")
    try:
        write(beside)
        os.replace(beside, path)
    except RuntimeError as error:  # of h5py, which says so of a disk that is full
        raise OSError(f"{path} can't be written: {error}") from error
    finally:
        beside.unlink(missing_ok=True)
