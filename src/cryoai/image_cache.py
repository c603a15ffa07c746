"""Images at the working box that are kept for other runs: a folder, with one folder in it for each set of images."""

from __future__ import annotations

import fcntl
import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import torch

from cryoai.errors import InputError
from cryoai.formats.files import writable_folder
from cryoai.formats.snapshots import DamagedSnapshotError, read_snapshot, write_snapshot
from cryoai.fourier import FourierDisc
from cryoai.particle_stack import ParticleStack
from cryoai.particles import PreparedParticles, Quarantine, prepare_particles

__all__ = ["CachedImages"]

# To be raised whenever the same images are prepared to other values, or the record has other fields.
_VERSION = 1
_N_DIGITS = 32
_SECONDS_BETWEEN_TRIES = 0.2


@dataclass(frozen=True, eq=False)
class CachedImages:
    """The place in a cache of the images of some particles at a working box, whether they are there yet or not.

    The images are there when their record is, which is written last. Only one process at a time makes them; it may be
    killed, and what it wrote is then never read. The sign of the contrast, and what share of the images may be
    unusable, have no influence on what is stored.

    Attributes
    ----------
    path
        Folder of its own, named by all that the stored values depend on.
    stack
        The particles, in the order that they are stored in.
    n_pixels
        The working box.
    max_faulty_share
        Of the images, so many may be unusable; they are left out.
    device
        Where the images are normalised, and where batches of them go.
    """

    path: Path
    stack: ParticleStack
    n_pixels: int
    max_faulty_share: float
    device: torch.device

    @classmethod
    def place(
        cls, cache: Path, stack: ParticleStack, n_pixels: int, *, max_faulty_share: float, device: torch.device
    ) -> CachedImages:
        """The one in the folder ``cache`` for these particles; nothing is made or read there yet."""
        key = repr((_VERSION, stack.fingerprint_of_images(), n_pixels))
        name = hashlib.sha256(key.encode()).hexdigest()[:_N_DIGITS]
        return cls(cache.absolute() / name, stack, n_pixels, max_faulty_share, device)

    @property
    def images(self) -> Path:
        return self.path / "images.f16"

    @property
    def record(self) -> Path:
        """All but the images themselves: optics, the images that cannot be used, the statistics of the contrast."""
        return self.path / "record.safetensors"

    @property
    def lock(self) -> Path:
        """Held while the images are made; it stays, because another process may have it open."""
        return self.path / "lock"

    @property
    def unfinished(self) -> Path:
        return self.path / "unfinished.f16"

    def find(self) -> PreparedParticles | None:
        """The images, with the contrast that their statistics speak for; None if they are not there, or damaged.

        Raises
        ------
        InputError
            If more images cannot be used than are tolerated.
        """
        try:
            stored: PreparedParticles = read_snapshot(self.record, self.device)
            size = self.images.stat().st_size
        except (DamagedSnapshotError, OSError):
            return None
        if size != stored.n_bytes:
            return None
        # The record may have been made elsewhere: in another folder, from moved stacks, on another device.
        found = replace(
            stored,
            path=self.images,
            disc=FourierDisc.of_box(self.n_pixels, device=self.device),
            faults=self.stack.named_anew(stored.faults),
        )
        Quarantine(self.stack, self.max_faulty_share).note(found.faults)
        return found

    def make(self, *, progress: Callable[[int], object], say: Callable[[str], object]) -> PreparedParticles:
        """Prepare the images and put them there; or, where another process is at it, wait and take its own.

        Parameters
        ----------
        progress
            Called with the number of particles done, again and again with 0 while another process is waited for.
        say
            Called with a line about anything unusual.

        Raises
        ------
        InputError
            If the folder cannot be written to, or more images cannot be used than are tolerated.
        OSError
            If the disk is full; what was written is gone again.
        """
        writable_folder(self.path)
        with self._locked(progress, say):
            found = self.find()
            if found is not None:
                return found
            if self.record.exists():
                say(f"the images at the working box in {self.path} are damaged: made again")
            return self._made(progress)

    def _made(self, progress: Callable[[int], object]) -> PreparedParticles:
        self.record.unlink(missing_ok=True)
        share, device = self.max_faulty_share, self.device
        try:
            made = prepare_particles(
                self.stack, self.n_pixels, self.unfinished, max_faulty_share=share, device=device, progress=progress
            )
            self.unfinished.replace(self.images)
            made = replace(made, path=self.images)
            write_snapshot(self.record, made)
        except BaseException:
            for useless in (self.unfinished, self.images):
                useless.unlink(missing_ok=True)
            raise
        return made

    @contextmanager
    def _locked(self, progress: Callable[[int], object], say: Callable[[str], object]) -> Iterator[None]:
        """Keep other processes from making the same; a lock ends with the process that holds it, however that ends."""
        with self.lock.open("w") as file:
            if not self._is_ours(file):
                say(f"another process is preparing the same images in {self.path}: waiting for it")
                while not self._is_ours(file):
                    progress(0)
                    time.sleep(_SECONDS_BETWEEN_TRIES)
            yield

    def _is_ours(self, file: IO[str]) -> bool:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            raise InputError(
                f"{self.path}: this file system cannot lock files ({error.strerror}); give a cache on another"
            ) from None
        return True
