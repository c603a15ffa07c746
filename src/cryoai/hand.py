"""The other hand of a finished run: map, poses, encoder and volume mirrored together.

The mirror image is the one through the centre, ``V'(r) = V(-r)``: rotations commute with it, so that a
symmetric particle keeps the operators of its group. (A mirror plane takes T to another orientation.) An
image is a slice, ``F(k) = V(R [k, 0])`` (docs/conventions.md), and stays what it is at the pose
``R' = R diag(-1, -1, 1)``, with the same shift. Everywhere this is a change of signs or of places, so that
nothing is rounded and two flips give every byte back:

* RELION's psi is turned by 180°, rot and tilt stay;
* an encoder, which says the first two columns of ``R``, says both reversed in its last layer, and the shift
  of its frame is reversed;
* a FourierNet says the complex conjugate, which is the transform of the mirror image, in its last layer.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cryoai.errors import InputError
from cryoai.formats.mrc import open_stack, read_map
from cryoai.formats.star import read_star
from cryoai.formats.star.lines import star_lines, tokens
from cryoai.runs import RunFolder

__all__ = ["HandFlip", "flip_hand"]

# New files are gathered in the first folder. It takes the second name when all are there, and from then on
# the flip is as good as done: whoever comes next can move them into place.
_UNFINISHED, _COMPLETE = ".hand-unfinished", ".hand-complete"

_TURNED = "rlnAnglePsi"
_DECIMAL = re.compile(r"(-?)((?:0|[1-9]\d*)(?:\.\d+)?)")
_FLIPPED = re.compile(r'("hand_flipped"\s*:\s*)(true|false)')
_FLIPPED_FIRST = '{\n  "hand_flipped": true,'
_MIRRORED = re.compile(r'("mirrored"\s*:\s*)(true|false)')

# The first six numbers that the last layer of an encoder says are the first two columns (x, y, z) of the rotation.
_ROTATION_LAYERS = re.compile(r"encoder\.(?:encoder\.)?(?:head\.2|rotation_heads\.\d+\.5)\.(?:weight|bias)")
_BOTH_COLUMNS = slice(0, 6)
_SHIFT_OF_FRAME = "frame.shift"
# The second number that the modulant of a FourierNet says is the factor of the imaginary part.
_COMPLEX_LAYERS = re.compile(r"modulant\.output\.(?:weight|bias)")
_IMAGINARY_PART = slice(1, 2)
_VOXELS = "density"
_BYTES_PER_NUMBER = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True)
class HandFlip:
    """What was changed.

    Attributes
    ----------
    files
        Names in the run folder, in order.
    flipped
        Whether the run now has the other hand than the one that it came out with.
    finished_an_earlier_one
        Whether an earlier flip had been cut short and was only brought to its end.
    """

    files: tuple[str, ...]
    flipped: bool
    finished_an_earlier_one: bool

    def __str__(self) -> str:
        done = "an earlier flip was cut short and is finished now" if self.finished_an_earlier_one else "mirrored"
        hand = "the other hand than it came out with" if self.flipped else "the hand that it came out with"
        return (
            f"{done}: {', '.join(self.files)}\nThe run now has {hand}. "
            "Poses that were exported or inferred with it before have the hand that it had then."
        )


def flip_hand(run: RunFolder) -> HandFlip:
    """Give a finished run the other hand, or its own one back: every file that knows a hand, or none.

    Maps, poses, encoder and volume are mirrored together, so that the poses belong to the map and the encoder
    poses new particles on it. ``summary.json`` says ``hand_flipped``; what an evaluation says of the hand
    is changed too. The copy of the input stays, and what was exported or inferred elsewhere keeps the hand that the
    run had then. Flipped twice, all files are what they were to the last byte. What was cut short while files
    were moved into place is brought to its end by flipping again.

    Raises
    ------
    InputError
        If map or particles are missing, or a file is not as a run writes it; nothing is changed then.
    """
    complete = run.path / _COMPLETE
    left_over = complete.is_dir()
    if not left_over:
        _prepare(run, complete)
    names = tuple(sorted(path.name for path in complete.iterdir()))
    for name in names:
        (complete / name).replace(run.path / name)
    complete.rmdir()
    return HandFlip(names, bool(_read_json(run.summary).get("hand_flipped", False)), left_over)


def _prepare(run: RunFolder, complete: Path) -> None:
    """Write all new files to a folder of their own, which appears under its name once it holds them all."""
    unfinished = run.path / _UNFINISHED
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    try:
        for path, write in _changes(run):
            write(path, unfinished / path.name)
            shutil.copymode(path, unfinished / path.name)
        unfinished.replace(complete)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _changes(run: RunFolder) -> Iterable[tuple[Path, Callable[[Path, Path], None]]]:
    """Every file that knows a hand, and what writes its mirror image."""
    for path in (run.map, run.particles):
        if not path.is_file():
            raise InputError(f"{path}: no such file; a run folder with its map and particles is needed")
    maps = (run.map, *run.half_maps, run.mask, run.sharpened_map, run.local_resolution)
    everything = [
        *((path, _write_mirrored_map) for path in maps),
        *((path, _write_turned_particles) for path in (run.particles, run.encoder_particles)),
        (run.encoder_weights, _write_encoder),
        (run.volume_weights, _write_volume),
        (run.summary, _write_summary),
        (run.evaluation, _write_evaluation),
    ]
    return [(path, write) for path, write in everything if path.is_file()]


# ------------------------------------------------------------------------------ maps


def _write_mirrored_map(source: Path, target: Path) -> None:
    read_map(source)  # finds fault with what is no whole map
    stack = open_stack(source)
    content = bytearray(source.read_bytes())
    shape = (stack.n_images, stack.n_rows, stack.n_columns)
    _mirror_voxels(content, stack.data_offset_in_bytes, shape, stack.dtype.itemsize)
    target.write_bytes(content)


def _mirror_voxels(content: bytearray, start: int, shape: tuple[int, ...], bytes_per_voxel: int) -> None:
    """Reverse x, y and z about index ``n // 2``, in place: each voxel is moved as it is.

    The first planes of an even box have no partner on the other side and take each other's place, as on a
    circle.
    """
    n = shape[0]
    voxels = np.frombuffer(content, np.dtype((np.void, bytes_per_voxel)), int(np.prod(shape)), start).reshape(shape)
    reversed_axis = (2 * (n // 2) - np.arange(n)) % n
    voxels[:] = voxels[np.ix_(reversed_axis, reversed_axis, reversed_axis)]


# ------------------------------------------------------------------------------ poses


def _write_turned_particles(source: Path, target: Path) -> None:
    """The same file to the last character, but for psi."""
    table = read_star(source)
    assert table.star is not None
    if _TURNED not in table.star.columns:
        raise InputError(f"{source}: the column {_TURNED} is missing; a run folder with poses is needed")
    place, n_rows = table.star.columns.index(_TURNED), 0
    # Line ends are kept: these are the same lines as those without them.
    with (
        source.open(encoding="utf-8", newline="") as before,
        target.open("w", encoding="utf-8", newline="") as after,
    ):
        for line, text in zip(star_lines(source), before, strict=True):
            if line.kind == "row" and line.block == table.star.block:
                n_rows += 1
                text = _with_word_turned(text, tokens(line.text), place, f"{source}: {_TURNED} of row {n_rows}")
            after.write(text)
    if n_rows != len(table):
        raise InputError(f"{source}: its particles do not stand in a loop; a file that a run wrote is needed")


def _with_word_turned(text: str, words: list[str], place: int, named: str) -> str:
    """A line with the word in a place turned as an angle, and all else as it is."""
    start = end = 0
    for word in words[: place + 1]:
        start = text.index(word, end)
        end = start + len(word)
    return text[:start] + _turned(words[place], named) + text[end:]


def _turned(angle: str, named: str) -> str:
    """An angle from -180 to 180 degrees after half a turn, with as many digits; its own inverse.

    The other sign, and what is left to 180. Zero has a sign, too: else 180 and -180 would be lost.

    Examples
    --------
    >>> _turned("-30.250000", "psi"), _turned("180.0", "psi"), _turned("-0.0", "psi")
    ('149.750000', '0.0', '-180.0')
    """
    match = _DECIMAL.fullmatch(angle)
    if match is None or Decimal(match[2]) > 180:
        raise InputError(f"{named} is '{angle}'; a decimal number from -180 to 180 is needed, as a run writes it")
    sign, size = match.groups()
    rest = 180 - Decimal(size)
    if Decimal(size) not in (0, 180):
        sign = "" if sign else "-"
    return f"{sign}{rest:f}"


# ------------------------------------------------------------------------------ networks


@dataclass(frozen=True)
class _StoredTensor:
    """Where a tensor lies in a safetensors file."""

    shape: tuple[int, ...]
    bytes_per_number: int
    start_in_bytes: int


def _write_encoder(source: Path, target: Path) -> None:
    content, tensors = _read_weights(source)
    last = [tensor for name, tensor in tensors.items() if _ROTATION_LAYERS.fullmatch(name)]
    if not last:
        raise InputError(f"{source}: not an encoder of this program; run reconstruct again")
    for tensor in last:
        _change_signs(content, tensor, _BOTH_COLUMNS)
    if _SHIFT_OF_FRAME in tensors:
        _change_signs(content, tensors[_SHIFT_OF_FRAME], slice(None))
    target.write_bytes(content)


def _write_volume(source: Path, target: Path) -> None:
    content, tensors = _read_weights(source)
    last = [tensor for name, tensor in tensors.items() if _COMPLEX_LAYERS.fullmatch(name)]
    if _VOXELS in tensors:
        voxels = tensors[_VOXELS]
        _mirror_voxels(content, voxels.start_in_bytes, voxels.shape, voxels.bytes_per_number)
    elif not last:
        raise InputError(f"{source}: not a volume of this program; run reconstruct again")
    for tensor in last:
        _change_signs(content, tensor, _IMAGINARY_PART)
    target.write_bytes(content)


def _change_signs(content: bytearray, tensor: _StoredTensor, rows: slice) -> None:
    """Change the sign bits of the numbers in some rows of a tensor, in place, so that zeros come back as well."""
    n_bytes = int(np.prod(tensor.shape)) * tensor.bytes_per_number
    numbers: NDArray[np.uint8] = np.frombuffer(content, np.uint8, n_bytes, tensor.start_in_bytes)
    # The last byte of a number stands last, and the sign is its highest bit.
    numbers.reshape(*tensor.shape, tensor.bytes_per_number)[..., -1][rows] ^= 0x80


def _read_weights(path: Path) -> tuple[bytearray, dict[str, _StoredTensor]]:
    """The bytes of a safetensors file, and where in them its tensors of real numbers lie.

    The library would write what it reads in an order and padding of its own.
    """
    content = bytearray(path.read_bytes())
    try:
        start = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:start])
        header.pop("__metadata__", None)
        tensors = {}
        for name, about in header.items():
            if about["dtype"] in _BYTES_PER_NUMBER:
                first, end = (start + offset for offset in about["data_offsets"])
                tensors[name] = _StoredTensor(tuple(about["shape"]), _BYTES_PER_NUMBER[about["dtype"]], first)
                if end > len(content):
                    raise ValueError(f"{name} ends after the file")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not a whole safetensors file ({error}); run reconstruct again") from None
    return content, tensors


# ------------------------------------------------------------------------------ what is said of the hand


def _write_summary(source: Path, target: Path) -> None:
    """Say that the hand is flipped, or take that back.

    A summary that says nothing is one of a run that never was flipped, and says nothing after two flips.
    """
    _read_json(source)
    text = _read_text(source)
    if text.startswith(_FLIPPED_FIRST):
        text = text.replace(_FLIPPED_FIRST, "{", 1)
    elif _FLIPPED.search(text):
        text = _FLIPPED.sub(_toggled, text)
    else:
        text = text.replace("{", _FLIPPED_FIRST, 1)
    _write_text(target, text)


def _write_evaluation(source: Path, target: Path) -> None:
    """All numbers stay; what was mirrored against the truth no longer is, and the reverse."""
    _read_json(source)
    _write_text(target, _MIRRORED.sub(_toggled, _read_text(source)))


def _toggled(match: re.Match[str]) -> str:
    return match[1] + ("false" if match[2] == "true" else "true")


def _read_json(path: Path) -> dict[str, object]:
    try:
        values = json.loads(_read_text(path))
    except ValueError as error:
        raise InputError(f"{path}: not readable as JSON ({error}); restore the file that the run wrote") from None
    if not isinstance(values, dict) or not values:
        raise InputError(f"{path}: holds no fields; restore the file that the run wrote")
    return values


def _read_text(path: Path) -> str:
    return path.read_bytes().decode("utf-8")


def _write_text(path: Path, text: str) -> None:
    path.write_bytes(text.encode("utf-8"))
