"""Following a folder: particle files are posed as they arrive, while data are being collected."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from cryoai.errors import InputError
from cryoai.formats.files import writable_folder

__all__ = ["FollowedFolder"]


@dataclass
class FollowedFolder:
    """Every STAR file in a folder is handed over once it is whole, and again if it changes later.

    A file counts as whole when it has not changed between two looks and everything that it names can
    be read; one that cannot be read is tried again when it, or time, has moved on. Results stand in
    another folder under the same name; those that are newer than their file are not made again.

    Parameters
    ----------
    source, results
        Folders. ``results`` is made if need be.
    pose
        Called with a particle file and the file to write.
    say
        Called with a line for people.
    seconds_between_looks
        How often the folder is looked at.

    Raises
    ------
    InputError
        If the source is no folder, or the results cannot be written.
    """

    source: Path
    results: Path
    pose: Callable[[Path, Path], None]
    say: Callable[[str], None]
    seconds_between_looks: float = 5.0
    _seen: dict[Path, tuple[int, int]] = field(default_factory=dict, init=False)
    _posed: dict[Path, tuple[int, int]] = field(default_factory=dict, init=False)
    _told: dict[Path, str] = field(default_factory=dict, init=False)
    _stirs: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        if not self.source.is_dir():
            raise InputError(f"--watch {self.source}: no such folder; give the folder in which particle files arrive")
        writable_folder(self.results)
        if self.source.resolve() == self.results.resolve():
            raise InputError(f"--watch {self.source}: the results cannot go to the same folder; give another one")

    def follow(self, seconds_of_silence: float) -> None:
        """Look until nothing new has come for so long; for ever if that is infinite."""
        # A file is posed at the second look at the earliest: silence needs several.
        pause = min(self.seconds_between_looks, seconds_of_silence / 4)
        quiet_since = time.monotonic()
        while time.monotonic() - quiet_since < seconds_of_silence:
            if self.look() or self._stirs:
                quiet_since = time.monotonic()
            time.sleep(pause)

    def look(self) -> int:
        """One look at the folder; returns how many files were posed."""
        self._stirs = False
        visible = (path for path in self.source.glob("*.star") if not path.name.startswith("."))
        return sum(self._try(path) for path in sorted(visible))

    def _try(self, path: Path) -> bool:
        try:
            status = path.stat()
        except OSError:
            return False  # taken away since
        state = (status.st_size, status.st_mtime_ns)
        result = self.results / path.name
        settled = self._seen.get(path) == state
        self._seen[path] = state
        if not settled:
            self._stirs = True
            return False
        if path not in self._posed and result.is_file() and result.stat().st_mtime_ns >= status.st_mtime_ns:
            self._posed[path] = state  # by an earlier process
        if self._posed.get(path) == state:
            return False
        try:
            self.pose(path, result)
        except InputError as error:
            # Said once: its images may be on their way.
            if self._told.get(path) != str(error):
                self.say(f"{path.name} is left until it is whole: {error}")
            self._told[path] = str(error)
            return False
        self._posed[path] = state
        return True
