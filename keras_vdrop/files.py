"""Writing files atomically."""

import os
import pathlib
from collections.abc import Callable
from typing import Any


def replace(path: str | os.PathLike, write: Callable[[pathlib.Path], Any]) -> None:
    """Write a file next to its destination and move it there when it is complete, replacing an existing file.

    Args:
        path: Path of the file.
        write: Callable that writes to the path it is given, which has the same suffix.

    Raises:
        OSError: If the file cannot be written. An existing file is kept, and no partial file is left behind.
    """
    path = pathlib.Path(path)
    if path.exists() and not os.access(path, os.W_OK):
        raise PermissionError(f"Cannot write to {path}, which is read-only. Choose another path.")
    beside = path.with_name(f".{path.stem}-{os.getpid()}{path.suffix}")
    try:
        write(beside)
        os.replace(beside, path)
    except RuntimeError as error:  # h5py raises it when the disk is full
        raise OSError(f"Cannot write {path}: {error}") from error
    finally:
        beside.unlink(missing_ok=True)
