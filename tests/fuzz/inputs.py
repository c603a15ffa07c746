"""Inputs of every kind, each following from its number alone, and what is tried with them.

An attempt ends well, or with an InputError of one line; any other end, and anything wrong about what was read, is a
finding.
"""

import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from random import Random

import numpy as np
import torch

from cryoai.errors import InputError
from cryoai.formats.cryodrgn import read_cryodrgn_ctf, read_cryodrgn_poses
from cryoai.formats.mrc import open_stack, read_map
from cryoai.formats.particle_files import read_particles
from cryoai.formats.star import read_star, rewrite_star, write_star
from cryoai.formats.table import PoseColumns
from cryoai.particle_stack import ParticleStack
from cryoai.pose_files import read_poses
from fuzz import mutations, seeds

__all__ = ["KINDS", "FindingError", "Input", "attempt", "make_companions", "make_input"]

_LONGEST_MESSAGE = 1500


class FindingError(AssertionError):
    """What was read, or said, is wrong."""


@dataclass(frozen=True)
class Input:
    """A file to read: its kind, its number, its suffix and what is in it."""

    kind: str
    number: int
    suffix: str
    content: bytes


def make_companions(folder):
    """The files that inputs name or that are read beside them."""
    for name in ("images.mrcs", "my stack.mrcs"):
        (folder / name).write_bytes(seeds.stack_of_companions())
    (folder / "ctf.pkl").write_bytes(pickle.dumps(seeds.CTF))
    (folder / "ctf2.pkl").write_bytes(pickle.dumps(seeds.CTF[:2]))


def make_input(kind, seed, number):
    """Input ``number`` of a kind: every one is another."""
    random = Random(f"{seed} {kind} {number}")
    with warnings.catch_warnings(action="ignore"):
        suffix, content = _MAKERS[kind](random)
    return Input(kind, number, suffix, content)


@cache
def _seeds(name):
    return getattr(seeds, name)()


def _star(random):
    texts = _seeds("star_texts")
    text = random.choice(texts)
    if random.random() < 0.01:
        text = mutations.rarely_large_text(random, text, texts)
    return ".star", mutations.mutated_text(random, text, texts)


def _list(random):
    texts = _seeds("list_texts")
    text = random.choice(texts)
    if random.random() < 0.01:
        text = mutations.rarely_large_text(random, text, texts)
    return ".txt", mutations.mutated_text(random, text, texts)


def _mrc(random):
    files = _seeds("mrc_files")
    return random.choice((".mrc", ".mrcs", ".map")), mutations.mutated_mrc(random, random.choice(files), files)


def _dataset(random):
    files = _seeds("dataset_files")
    if random.random() < 0.5:
        columns = mutations.mutated_columns(random, seeds.dataset_columns())
        content = seeds.dataset_bytes(columns) if columns else files[0]
        return ".cs", content if random.random() < 0.8 else mutations.mutated_dataset(random, content, files)
    content = random.choice(files)
    if content == seeds.GROUP:
        text = content.decode()
        if random.random() < 0.05:
            text = mutations.rarely_large_text(random, text, [text])
        return ".csg", mutations.mutated_text(random, text, [text])
    return ".cs", mutations.mutated_dataset(random, content, files)


def _pickle(random):
    files = _seeds("pickles")
    if random.random() < 0.4:
        value = mutations.mutated_value(random, seeds.pickled_values())
        content = pickle.dumps(value, random.randrange(6))
        if random.random() < 0.7:
            return ".pkl", content
        return ".pkl", mutations.mutated_bytes(random, content, files)
    return ".pkl", mutations.mutated_bytes(random, random.choice(files), files)


_MAKERS: dict[str, Callable[[Random], tuple[str, bytes]]] = {
    "star": _star,
    "cs": _dataset,
    "mrc": _mrc,
    "pickle": _pickle,
    "txt": _list,
}
KINDS = tuple(_MAKERS)


# ------------------------------------------------------------------------------ attempts


def attempt(kind, path):
    """Read a file in all the ways that its kind is read; returns how many of them read it.

    Raises
    ------
    FindingError
        If a refusal is no good line, or what was read contradicts itself.
    """
    n_read = 0
    for read in _ATTEMPTS[kind]:
        try:
            read(path)
        except InputError as error:
            _check_message(str(error), path)
        else:
            n_read += 1
    return n_read


def _require(fulfilled, *what):
    if not fulfilled:
        raise FindingError(*what)


def _check_message(message, path):
    _require(message.startswith((str(path.parent), "--")), "the message does not start with a file", message[:500])
    _require(message.isprintable(), "the message is not one line that can be printed", message[:500])
    _require(len(message) < _LONGEST_MESSAGE, "the message is too long", len(message), message[:500])


def _check_table(table):
    n = len(table)
    _require(n > 0, "no rows")
    for item in fields(table):
        values = getattr(table, item.name)
        if isinstance(values, np.ndarray):
            _require(values.shape == (n,), item.name, values.shape)
            _require(np.isfinite(values).all(), item.name, "not finite")
            # What is computed with is in single precision.
            _require(np.isfinite(values.astype(np.float32)).all(), item.name, "not finite in single precision")
    for values in (table.pixel_size_in_angstroms, table.voltage_in_kilovolts):
        _require((values.astype(np.float32) > 0).all(), "not positive")
    images = table.images
    _require(images.stack.shape == images.index.shape == (n,), "references")
    _require(images.stack.min() >= 0 and images.stack.max() < len(images.names), "stack out of range")
    _require(images.index.min() >= 0, "image out of range")
    _require(all(isinstance(name, str) and name for name in images.names), "names")
    if table.poses is not None:
        _check_poses(table.poses, n)


def _check_poses(poses, n):
    for values, size in ((poses.angles_in_degrees, 3), (poses.origins_in_angstroms, 2)):
        _require(values.shape == (n, size), "shape of poses", values.shape)
        _require(np.isfinite(values.astype(np.float32)).all(), "poses are not finite")


def _other_poses(n):
    random = np.random.default_rng(0)
    return PoseColumns(random.uniform(-180, 180, (n, 3)).round(3), random.normal(size=(n, 2)).round(3))


def _images(table):
    """Name of the stack of each particle, and number of its image."""
    return [table.images.names[stack] for stack in table.images.stack], table.images.index.tolist()


def _check_same(table, again, poses):
    _require(len(table) == len(again), "another number of rows", len(table), len(again))
    for values, others in zip(_images(table), _images(again), strict=True):
        _require(values == others, "other images")
    for item in fields(table):
        values = getattr(table, item.name)
        if isinstance(values, np.ndarray) and item.name != "rows":
            _require(np.array_equal(values, getattr(again, item.name)), item.name)
    _require(np.allclose(again.poses.angles_in_degrees, poses.angles_in_degrees, atol=1e-6, rtol=0), "angles")
    # Six decimals of a pixel in files of RELION 3.0.
    places = 1e-6 * np.maximum(1, table.pixel_size_in_angstroms)[:, None]
    _require((np.abs(again.poses.origins_in_angstroms - poses.origins_in_angstroms) <= places).all(), "origins")


def _read_table(path):
    table = read_particles(path)
    _check_table(table)
    poses, copy = _other_poses(len(table)), path.with_name("again.star")
    if table.star is not None:
        # Beside its source, so that what it names is found; not over it, so that it can be written twice.
        rewrite_star(copy, table, table.star, poses, {"cryoaiScore": np.arange(len(table))})
        again = read_star(copy)
        _check_same(table, again, poses)
        _require(again.ignored == table.ignored, "ignored", table.ignored, again.ignored)
        part = table.take(np.arange(len(table))[::-2])
        rewrite_star(copy, part, table.star, _other_poses(len(part)), {})
        _check_same(part, read_star(copy), _other_poses(len(part)))
    elif _is_plain(table):
        write_star(copy, table, np.full(len(table), seeds.N_PIXELS), poses, {})
        again = read_star(copy)
        _require(_images(again) == _images(table), "other images")
        _require(
            np.allclose(again.defocus_u_in_angstroms, table.defocus_u_in_angstroms, rtol=1e-12, atol=1e-6), "defocus"
        )


def _is_plain(table):
    """Whether six decimals are enough for the pixel size and voltage: others are no microscope's."""
    return min(table.pixel_size_in_angstroms.min(), table.voltage_in_kilovolts.min()) > 1e-6


def _read_poses(path):
    poses = read_poses(path, extent_in_angstroms=48.0)
    n = len(poses)
    _require(n > 0 and poses.rotations.shape == (n, 3, 3) and poses.shifts_in_angstroms.shape == (n, 2), "shape")
    _require(bool(poses.shifts_in_angstroms.isfinite().all()), "shifts are not finite")
    errors = poses.rotations @ poses.rotations.transpose(1, 2) - torch.eye(3)
    _require(float(errors.abs().max()) < 1e-4, "no rotations")


def _open_particles(path):
    particles = ParticleStack.open(path)
    _check_table(particles.table)
    optics = particles.optics
    for item in fields(optics):
        _require(bool(getattr(optics, item.name).isfinite().all()), "optics", item.name)
    _require(len(particles.optics_group) == particles.n_particles, "groups")
    _require(particles.n_pixels == seeds.N_PIXELS, "box", particles.n_pixels)
    images = particles.images(torch.arange(min(3, particles.n_particles)))
    _require(bool(images.isfinite().all()), "images")


def _open_images(path):
    stack = open_stack(path)
    _require(0 < stack.n_whole <= stack.n_images, "images", stack.n_whole, stack.n_images)
    images = stack.map_images()
    _require(images.shape == (stack.n_whole, stack.n_rows, stack.n_columns), "shape", images.shape)
    _require(images.dtype.kind in "fiu", "type", images.dtype)
    _require(images.offset >= 1024, "images that begin in the header", images.offset)
    np.array(images[-1, -1])


def _read_map(path):
    found = read_map(path)
    n = len(found.density)
    _require(found.density.shape == (n, n, n) and found.density.dtype == np.float32, "shape", found.density.shape)
    _require(np.isfinite(found.density).all(), "not finite")
    _require(0 < np.float32(found.pixel_size_in_angstroms) < np.inf, "pixel size", found.pixel_size_in_angstroms)


def _read_with_ctf(ctf):
    def read(path):
        _check_table(read_particles(path, ctf=path.with_name(ctf)))

    return read


def _read_as_ctf(path):
    _check_table(read_particles(path.with_name("images.mrcs"), ctf=path))


def _read_with_passthrough(path):
    good = path.with_name("good.cs")
    if not good.exists():
        good.write_bytes(_seeds("dataset_files")[0])
    for main, other in ((path, good), (good, path)):
        _check_table(read_particles(main, passthrough=[other]))


def _read_cryodrgn(path):
    try:
        ctf = read_cryodrgn_ctf(path)
    except InputError as error:
        _check_message(str(error), path)
        poses = read_cryodrgn_poses(path)
        _check_poses(poses.columns(48.0), len(poses))
    else:
        _require(ctf.extent_in_angstroms.shape == (len(ctf),), "extent")


_ATTEMPTS: dict[str, tuple[Callable[[Path], None], ...]] = {
    "star": (_read_table, _read_poses, _open_particles),
    "cs": (_read_table, _read_poses, _open_particles, _read_with_passthrough),
    "mrc": (_open_images, _read_map, _read_table, _read_with_ctf("ctf2.pkl")),
    "pickle": (_read_cryodrgn, _read_poses, _read_as_ctf),
    "txt": (_read_table, _read_with_ctf("ctf.pkl"), _open_particles),
}
