"""Particle stacks of other makers, and small ones written for a test."""

import pickle
import shutil
import subprocess
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import torch

from cryoai.errors import InputError
from cryoai.formats.mrc import open_stack
from cryoai.formats.star import read_star
from cryoai.particle_stack import ParticleStack

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
WHY_ABSENT = f"needs third-party data in {SHARED}"

needs_shared_data = pytest.mark.skipif(not SHARED.is_dir(), reason=WHY_ABSENT)
needs_relion = pytest.mark.skipif(shutil.which("relion_project") is None, reason="needs RELION's programs in PATH")

OPTICS = {
    "rlnOpticsGroup": [1],
    "rlnOpticsGroupName": ["opticsGroup1"],
    "rlnVoltage": [300],
    "rlnSphericalAberration": [2.7],
    "rlnAmplitudeContrast": [0.1],
    "rlnImagePixelSize": [3.0],
}


def zoo(folder):
    """Parameters: the files of a folder of the parser zoo, or one that is skipped."""
    files = sorted((SHARED / "parser_zoo" / folder).glob("*"))
    if not files:
        return [pytest.param(None, marks=pytest.mark.skip(reason=WHY_ABSENT))]
    return [pytest.param(file, id=file.name) for file in files]


def third_party_array(*parts):
    """The voxels or images of an MRC file, whatever its header lacks."""
    return torch.from_numpy(np.array(open_stack(SHARED.joinpath("stacks", *parts)).map_images(), dtype=np.float32))


class _NumpyUnpickler(pickle.Unpickler):
    """A pickle may call anything when it is loaded; these may build arrays and nothing else."""

    _ALLOWED = frozenset({"_reconstruct", "ndarray", "dtype", "scalar", "_frombuffer"})

    def find_class(self, module, name):
        if module.split(".")[0] == "numpy" and name in self._ALLOWED:
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        raise pickle.UnpicklingError(f"{module}.{name} is not an array of numpy")


def third_party_pickle(*parts):
    with SHARED.joinpath("stacks", *parts).open("rb") as file:
        return _NumpyUnpickler(file).load()


def loop_text(name, columns):
    """A data block, ``columns`` mapping names to equally long lists."""
    head = "".join(f"_{column} #{i}\n" for i, column in enumerate(columns, 1))
    rows = "".join(" ".join(map(str, row)) + "\n" for row in zip(*columns.values(), strict=True))
    return f"data_{name}\n\nloop_\n{head}{rows}\n"


def particle_columns(n, stack="images.mrcs"):
    return {
        "rlnImageName": [f"{i + 1:06d}@{stack}" for i in range(n)],
        "rlnOpticsGroup": [1] * n,
        "rlnDefocusU": [12000 + 100 * i for i in range(n)],
        "rlnDefocusV": [11000 + 100 * i for i in range(n)],
        "rlnDefocusAngle": [10 * i for i in range(n)],
    }


def write_star(path, particles, optics=OPTICS):
    """A STAR file of RELION 3.1, or of 3.0 where ``optics`` is None."""
    text = "" if optics is None else loop_text("optics", optics)
    path.write_text(text + loop_text("particles", particles))
    return path


def write_images(path, images, pixel_size=3.0):
    with mrcfile.new(path) as file:
        file.set_data(np.asarray(images, dtype=np.float32))
        file.set_image_stack()
        file.voxel_size = pixel_size
    return path


def plain_parse(path):
    """The loops of a STAR file as lists of text, for files without quotes: {block: {column: cells}}."""
    blocks = {}
    columns = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        words = line.split("#")[0].split()
        if not words or words[0] == "loop_":
            continue
        if words[0].startswith("data_"):
            columns = blocks.setdefault(words[0][5:], {})
        elif words[0].startswith("_") and len(words) == 1:
            columns[words[0][1:]] = []
        elif words[0].startswith("_"):
            columns[words[0][1:]] = words[1:2]
        else:
            for cells, word in zip(columns.values(), words, strict=False):
                cells.append(word)
    return blocks


def refusal(function, *arguments, **options):
    """The message of the InputError that the call raises, checked to be one line."""
    with pytest.raises(InputError) as caught:
        function(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def correlations(first, second):
    """Pearson correlation (B,) of images (B, n, n)."""
    a, b = (images.flatten(1).double() for images in (first, second))
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))


def files_in(folder):
    return sorted(path.name for path in folder.iterdir())


def third_party_particles(*parts):
    """A stack of other makers, whose STAR file names its images."""
    return ParticleStack.open(SHARED.joinpath("stacks", *parts))


def third_party_particles_renamed(tmp_path, folder, star, images):
    """A stack of other makers, whose STAR file names another stack than the one it came with."""
    star = SHARED / "stacks" / folder / star
    name = read_star(star).images.names[0]
    (tmp_path / name).symlink_to(SHARED / "stacks" / folder / images)
    return ParticleStack.open(star, data_dir=tmp_path)


def run_relion(program, folder, *arguments):
    finished = subprocess.run(
        [shutil.which(program), *arguments], cwd=folder, capture_output=True, text=True, check=False, timeout=120
    )
    assert finished.returncode == 0, finished.stderr
