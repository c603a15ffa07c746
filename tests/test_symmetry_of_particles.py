"""The point group of real particles in any frame, from noisy half maps of their models."""

from pathlib import Path

import pytest
import torch

from cryoai.formats.atoms import read_model_as_map
from cryoai.formats.mrc import read_map
from cryoai.fourier import HalfLattice, invert_transform, translation_phases
from cryoai.simulation import exact_transform, protein_like_phantom
from cryoai.symmetry.detection import find_symmetry
from oracles import random_rotations
from stacks import SHARED, needs_shared_data
from test_symmetry_detection import half_maps, likely

N, LAST_SHELL = 36, 8


def moved(source, pixel_size):
    """A map resampled, rotated and shifted, by a non-uniform Fourier transform."""
    lattice = HalfLattice(N, N // 2, 1)
    points, inside = lattice.frequencies().double(), lattice.radii() < N / 2
    rotation, shift = random_rotations(1, seed=5)[0], torch.tensor([1.7, -1.2, 0.8]).double()
    values = torch.zeros(len(points), dtype=torch.complex64)
    phases = translation_phases(shift, points[inside]).to(torch.complex64)
    values[inside] = exact_transform(source, points[inside] @ rotation / pixel_size) * phases
    return invert_transform(lattice.fill_in(values / N), N)


def candidates(source, pixel_size):
    return find_symmetry(*half_maps(moved(source, pixel_size), 2 * N // 6), LAST_SHELL)


@needs_shared_data
@pytest.mark.parametrize(
    ("path", "pixel_size", "group"),
    [
        ("models/8bk7.cif", 6.5, "D2"),
        ("models/6vxx.cif", 6.5, "C3"),
        ("models/4hhb.cif", 2.8, "C2"),
        ("models/1wcm_rnapol2.pdb", 6.0, "C1"),
        ("volumes/80S_4ug0_4A_80.mrc", 9.0, "C1"),
        ("volumes/betagal_D2_3.54A_100.mrc", 7.0, "D2"),
    ],
    ids=lambda value: Path(value).stem if isinstance(value, str) else None,
)
def test_the_group_of_a_particle_is_named_first(path, pixel_size, group):
    if path.endswith(".mrc"):
        source = read_map(SHARED / path)
    else:
        pytest.importorskip("gemmi")
        source = read_model_as_map(SHARED / path, 2.0)
    found = candidates(source, pixel_size)
    assert (likely(found) or ["C1"])[0] == group
    # The subunits of haemoglobin are nearly alike: it resembles D2.
    resembled = [c.group.name for c in found if not c.is_likely]
    assert resembled == (["D2"] if path == "models/4hhb.cif" else [])


def test_a_made_up_asymmetric_complex_has_no_group():
    assert likely(candidates(protein_like_phantom(3), 5.0)) == []
