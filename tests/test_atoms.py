import sys

import numpy as np
import pytest

from cryoai.formats.atoms import read_model_as_map
from stacks import refusal

pytest.importorskip("gemmi")

VOXEL = 1.0


def atom_line(serial, element, xyz, residue="ALA", b_factor=20.0, record="ATOM  "):
    x, y, z = xyz
    name = f" {element:<3}" if len(element) == 1 else f"{element:<4}"
    return (
        f"{record}{serial:5d} {name} {residue:>3} A{serial:4d}    {x:8.3f}{y:8.3f}{z:8.3f}"
        f"{1.0:6.2f}{b_factor:6.2f}          {element:>2}\n"
    )


def write_pdb(path, atoms, **options):
    lines = [atom_line(i, element, xyz, **options) for i, (element, xyz) in enumerate(atoms, 1)]
    path.write_text("".join(lines) + "END\n")
    return path


def centre_of_mass(density):
    axis = np.arange(density.shape[0]) - density.shape[0] // 2
    return np.array([(density.sum(axis=other) * axis).sum() for other in ((0, 1), (0, 2), (1, 2))]) / density.sum()


def value_at(density, xyz):
    centre = density.shape[0] // 2
    x, y, z = (centre + round(c / VOXEL) for c in xyz)
    return density[z, y, x]


def test_a_model_becomes_a_map_with_its_mass_at_the_centre(tmp_path):
    atoms = [("C", (40.0, 10.0, 5.0)), ("C", (46.0, 10.0, 5.0)), ("C", (40.0, 22.0, 5.0)), ("C", (40.0, 10.0, 23.0))]
    made = read_model_as_map(write_pdb(tmp_path / "m.pdb", atoms), VOXEL)
    assert made.pixel_size_in_angstroms == VOXEL
    assert made.density.dtype == np.float32
    assert len(set(made.density.shape)) == 1
    assert made.density.shape[0] % 2 == 0
    np.testing.assert_allclose(centre_of_mass(made.density), 0, atol=0.05)
    # The axes are x, y, z: the atoms lie at these distances from their mean.
    mean = np.mean([xyz for _, xyz in atoms], axis=0)
    here = [value_at(made.density, np.array(xyz) - mean) for _, xyz in atoms]
    assert min(here) > 0.5 * made.density.max()
    swapped = [value_at(made.density, (np.array(xyz) - mean)[::-1]) for _, xyz in atoms]
    assert min(swapped) < 0.1 * made.density.max()


def test_a_heavier_atom_gives_more_density(tmp_path):
    made = read_model_as_map(write_pdb(tmp_path / "m.pdb", [("C", (0, 0, 0)), ("S", (20, 0, 0))]), VOXEL)
    carbon, sulphur = (value_at(made.density, (x, 0, 0)) for x in (-10, 10))
    assert sulphur > 1.3 * carbon > 0


def test_waters_are_left_out(tmp_path):
    protein = [("C", (0, 0, 0)), ("N", (6, 3, 1))]
    dry = write_pdb(tmp_path / "dry.pdb", protein)
    wet = tmp_path / "wet.pdb"
    water = atom_line(9, "O", (30, 30, 30), residue="HOH", record="HETATM")
    wet.write_text(dry.read_text().replace("END\n", water + "END\n"))
    np.testing.assert_array_equal(read_model_as_map(wet, VOXEL).density, read_model_as_map(dry, VOXEL).density)


def test_atoms_are_no_sharper_than_the_voxels_can_carry(tmp_path):
    # With voxels of 2 Å no atom is sharper than B = 20 * 2^2 square Å.
    sharp, limit, blunt = (
        read_model_as_map(write_pdb(tmp_path / f"{b}.pdb", [("C", (0, 0, 0))], b_factor=b), 2.0).density
        for b in (1.0, 80.0, 300.0)
    )
    np.testing.assert_array_equal(sharp, limit)
    assert sharp.max() > 2 * blunt.max()


def test_a_file_that_is_missing_or_no_model_or_empty_is_refused_by_name(tmp_path):
    assert str(tmp_path / "none.pdb") in refusal(read_model_as_map, tmp_path / "none.pdb", VOXEL)
    for name, text in (("empty.pdb", ""), ("remarks.pdb", "REMARK nothing here\nEND\n"), ("junk.cif", "not a cif")):
        path = tmp_path / name
        path.write_text(text)
        assert str(path) in refusal(read_model_as_map, path, VOXEL)
    only_water = write_pdb(tmp_path / "water.pdb", [("O", (0, 0, 0))], residue="HOH")
    assert "no atoms" in refusal(read_model_as_map, only_water, VOXEL)


def test_without_gemmi_it_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gemmi", None)
    path = write_pdb(tmp_path / "m.pdb", [("C", (0, 0, 0))])
    assert "pip install 'cryoai[simulate]'" in refusal(read_model_as_map, path, VOXEL)
