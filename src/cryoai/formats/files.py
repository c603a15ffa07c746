"""Making folders and writing files so that no reader ever meets half of one."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cryoai.errors import InputError

__all__ = ["atomic_path", "make_empty_folder", "writable_folder"]


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a temporary path beside ``path``; move it into place if the block ends well.

    The temporary name keeps the suffix, because some writers choose the format by it.
    """
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes files private; give the result the permissions of any new file.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def make_empty_folder(path: Path) -> None:
    """Make a folder for results; one that is there already must be empty.

    Raises
    ------
    InputError
        If it is not, or cannot be made or written to.
    """
    if path.is_dir() and any(path.iterdir()):
        raise InputError(f"{path}: the folder is not empty; give a new one or remove it")
    writable_folder(path)


def writable_folder(path: Path) -> None:
    """Make a folder if it is not there yet, and see that it can be written to.

    Raises
    ------
    InputError
        If it cannot.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise InputError(f"{path}: cannot make or write to the folder ({error.strerror}); give another place") from None
