"""Making folders and writing files so that no reader ever meets half of one."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cryoai.errors import InputError

__all__ = [
    "atomic_path",
    "check_is_file",
    "check_not_a_pointer",
    "check_text_file",
    "file_fingerprint",
    "is_file",
    "make_empty_folder",
    "read_start",
    "reserve",
    "shown",
    "writable_folder",
]


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


def reserve(path: Path, n_bytes: int) -> None:
    """Make a file of this size, all of it on the disk: a full disk is met here, and not when memory maps are written.

    Raises
    ------
    OSError
        If there is no room; the file is gone again.
    """
    try:
        with path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, n_bytes)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise OSError(error.errno, f"{error.strerror} ({n_bytes / 1e9:.1f} GB are needed)", str(path)) from None


def file_fingerprint(path: Path) -> tuple[int, int]:
    """Size and time of the last change of a file, which tell whether it is still the one that was read."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def is_file(path: Path) -> bool:
    """Whether a file is there; a name that no file can have is none."""
    try:
        return path.is_file()
    except OSError:  # such as a name that is too long
        return False


def check_is_file(path: Path, wanted: str) -> None:
    """See that a file is there.

    Raises
    ------
    InputError
        If it is missing, a folder, or cannot be looked at.
    """
    try:
        if path.is_file():
            return
        fault = "a folder" if path.is_dir() else "no such file"
    except OSError as error:
        fault = f"cannot be read ({error.strerror})"
    raise InputError(f"{path}: {fault}; give {wanted}")


def read_start(path: Path, n_bytes: int) -> bytes:
    """The first bytes of a file that is there, as many as it has.

    Raises
    ------
    InputError
        If it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return file.read(n_bytes)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); see to its permissions, or copy it again"
        ) from None


def check_text_file(path: Path, wanted: str) -> None:
    """See that a file is there and holds text.

    Raises
    ------
    InputError
        If it is missing, empty, or something that people mistake for the file itself.
    """
    check_is_file(path, wanted)
    start = read_start(path, 4096)
    if not start.strip():
        raise InputError(f"{path}: the file is empty; give {wanted}")
    check_not_a_pointer(path, start)
    if b"\0" in start:
        raise InputError(f"{path}: not a text file; give {wanted}")


def check_not_a_pointer(path: Path, start: bytes) -> None:
    """Refuse the short text that version control leaves in the place of a large file.

    Raises
    ------
    InputError
        If the first bytes ``start`` of the file are such a text.
    """
    if start.startswith(b"version https://git-lfs"):
        raise InputError(f"{path}: a Git LFS pointer, not the file itself; fetch it with 'git lfs pull'")
    if start.startswith((b"/annex/objects/", b"../.git/annex", b".git/annex")):
        raise InputError(f"{path}: a git-annex pointer, not the file itself; fetch it with 'git annex get'")


def shown(text: str, n_characters: int = 60) -> str:
    """A piece of a file for a message: in one line, of characters that can be printed, and not too long."""
    start = text if len(text) <= n_characters else f"{text[:n_characters]}..."
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in start)


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
