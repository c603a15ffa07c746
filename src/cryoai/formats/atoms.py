"""PDB and mmCIF models to electron-scattering maps, by gemmi."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np

from cryoai.errors import InputError
from cryoai.formats.mrc import MrcMap

__all__ = ["MODEL_SUFFIXES", "read_model_as_map"]

MODEL_SUFFIXES = (".pdb", ".ent", ".cif", ".mmcif", ".pdb.gz", ".cif.gz")

# Sharper atoms than the voxels can carry would only alias.
_LEAST_B_IN_SQUARE_VOXELS = 20.0


def read_model_as_map(path: Path, pixel_size_in_angstroms: float) -> MrcMap:
    """The electrostatic potential of the first model in a file, centred in a cube that holds it.

    Scattering factors of electrons (International Tables C, as tabulated in gemmi); waters are left
    out; B factors are those of the file, but no less than the voxels resolve.

    Raises
    ------
    InputError
        If gemmi is not installed, or the file cannot be read or holds no atoms.
    """
    try:
        gemmi = importlib.import_module("gemmi")
    except ImportError:
        raise InputError(f"{path}: models need gemmi; install it with: pip install 'cryoai[simulate]'") from None
    if not path.is_file():
        raise InputError(f"{path}: no such file; give a map in MRC format, or a PDB or mmCIF model")
    try:
        structure = gemmi.read_structure(str(path))
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path}: not a readable model ({reason}); give a PDB or mmCIF file") from None
    structure.remove_waters()
    atoms = [atom for chain in structure[0] for residue in chain for atom in residue] if len(structure) else []
    if not atoms:
        raise InputError(f"{path}: the model has no atoms; give a PDB or mmCIF file with coordinates")
    positions = np.array([atom.pos.tolist() for atom in atoms])
    centre = positions.mean(axis=0)
    # The longest extent about the centre, with room for the atoms themselves.
    n = 2 * int(np.ceil((np.abs(positions - centre).max() + 8) / pixel_size_in_angstroms))
    shift = n // 2 * pixel_size_in_angstroms - centre
    least_b = _LEAST_B_IN_SQUARE_VOXELS * pixel_size_in_angstroms**2
    for atom in atoms:
        atom.pos += gemmi.Position(*shift)
        atom.b_iso = max(atom.b_iso, least_b)
    return MrcMap(_potential(gemmi, structure, n, pixel_size_in_angstroms), pixel_size_in_angstroms)


def _potential(gemmi, structure, n: int, pixel_size_in_angstroms: float):  # type: ignore[no-untyped-def]
    extent = n * pixel_size_in_angstroms
    structure.cell = gemmi.UnitCell(extent, extent, extent, 90, 90, 90)
    structure.spacegroup_hm = "P 1"
    calculator = gemmi.DensityCalculatorE()
    calculator.d_min = 2 * pixel_size_in_angstroms
    calculator.rate = 1
    calculator.set_grid_cell_and_spacegroup(structure)
    calculator.grid.set_size(n, n, n)
    calculator.add_model_density_to_grid(structure[0])
    return np.array(calculator.grid.array, dtype=np.float32).transpose(2, 1, 0).copy()
