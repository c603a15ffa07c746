"""demo, simulate: particles whose truth is known."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from cryoai.commands.flags import require, require_seed
from cryoai.commands.judging import evaluate_run
from cryoai.errors import InputError
from cryoai.formats.atoms import MODEL_SUFFIXES, read_model_as_map
from cryoai.formats.files import make_empty_folder
from cryoai.formats.mrc import MrcMap, read_map
from cryoai.particle_stack import ParticleStack
from cryoai.report.figures import draw_particles_and_map
from cryoai.simulation import Microscope, protein_like_phantom, simulate
from cryoai.training.loop import reconstruct
from cryoai.training.settings import Settings

__all__ = ["demo", "simulate_particles"]


def demo(*, out: Path = Path("demo"), seed: int = 0) -> None:
    """Show the whole way on a made-up protein: particles, map, and how right it is. Takes minutes.

    Parameters
    ----------
    out
        Folder for the particles and the run.
    seed
        Of the protein, the particles and the run.
    """
    require_seed(seed)
    make_empty_folder(out)
    print("Simulating 5,000 particles of a protein that never existed (64 px of 3.5 Å, SNR 1) ...", flush=True)
    made = simulate(
        protein_like_phantom(seed),
        out,
        n_particles=5000,
        n_pixels=64,
        pixel_size_in_angstroms=3.5,
        snr=1.0,
        seed=seed,
        shift_standard_deviation_in_angstroms=5.0,
    )
    particles = ParticleStack.open(made.particles)
    result = reconstruct(particles, out / "run", Settings(seed=seed))
    evaluate_run(result.run, made.truth, made.true_map)
    picture = out / "demo.png"
    images = particles.images(torch.arange(12)).numpy()
    title = f"map from {particles.n_particles:,} particles, {result.half_map_agreement_in_angstroms:.1f} Å"
    draw_particles_and_map(picture, images, read_map(result.run.map), title)
    print(f"\nLook at {picture}, and open {result.run.map} in ChimeraX.")


def simulate_particles(
    model: Path,
    out_dir: Path,
    *,
    n_particles: int,
    box: int,
    pixel_size: float,
    snr: float,
    seed: int = 0,
    defocus_table: Path | None = None,
    defocus_range: tuple[float, float] = (8_000.0, 25_000.0),
    voltage: float = 300.0,
    spherical_aberration: float = 2.7,
    amplitude_contrast: float = 0.1,
    shift_std: float = 0.0,
) -> None:
    """Make a particle stack with known poses from a map (MRC) or a model (PDB, mmCIF).

    Writes particles.mrcs and particles.star (what a program may see), truth.star (with poses) and
    truth.mrc (the map at the same box).

    Parameters
    ----------
    model
        Map or model.
    out_dir
        New or empty folder.
    box
        Side of the images in pixels.
    pixel_size
        In Å.
    snr
        Variance of the signal after the CTF over the variance of the noise, over the whole box.
    defocus_table
        NumPy file (rows of U in Å, V in Å, angle in degrees) to draw from, in place of the range.
    defocus_range
        Lowest and highest mean defocus in Å.
    voltage
        In kV.
    spherical_aberration
        In mm.
    shift_std
        Standard deviation of the shifts in each axis, in Å.
    """
    positive = {"--n-particles": n_particles, "--pixel-size": pixel_size, "--snr": snr, "--voltage": voltage}
    for flag, value in positive.items():
        require(0 < value < math.inf, f"{flag} {value}: must be positive and finite")
    low, high = defocus_range
    require(-math.inf < low <= high < math.inf, f"--defocus-range {low} {high}: two finite numbers in order")
    require(0 <= amplitude_contrast <= 1, f"--amplitude-contrast {amplitude_contrast}: must be from 0 to 1")
    require(0 <= shift_std < math.inf, f"--shift-std {shift_std}: must be finite and not negative")
    require(math.isfinite(spherical_aberration), f"--spherical-aberration {spherical_aberration}: must be finite")
    require(box >= 32 and box % 2 == 0, f"--box {box}: an even number of at least 32 is needed")
    require_seed(seed)
    source = _read_source(model, pixel_size)
    microscope = Microscope(
        voltage_in_kilovolts=voltage,
        spherical_aberration_in_mm=spherical_aberration,
        amplitude_contrast=amplitude_contrast,
        defocus_range_in_angstroms=defocus_range,
        defocus_table=None if defocus_table is None else _read_defocus_table(defocus_table),
    )
    make_empty_folder(out_dir)
    made = simulate(
        source,
        out_dir,
        n_particles=n_particles,
        n_pixels=box,
        pixel_size_in_angstroms=pixel_size,
        snr=snr,
        seed=seed,
        microscope=microscope,
        shift_standard_deviation_in_angstroms=shift_std,
    )
    print(f"{made.particles}: {n_particles:,} particles of {box} px, SNR measured {made.measured_snr:.4f}")


def _read_source(path: Path, pixel_size_in_angstroms: float) -> MrcMap:
    if str(path).lower().endswith(MODEL_SUFFIXES):
        # Half the pixel of the images, so that the map is not what limits them.
        return read_model_as_map(path, pixel_size_in_angstroms / 2)
    return read_map(path)


def _read_defocus_table(path: Path) -> NDArray[np.float64]:
    try:
        table = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InputError(f"--defocus-table {path}: not readable as a NumPy file ({error}); give an .npy file") from None
    if table.ndim != 2 or table.shape[1] != 3 or len(table) == 0 or not np.isfinite(table).all():
        raise InputError(
            f"--defocus-table {path}: has shape {table.shape}; finite rows of U (Å), V (Å), angle (°) are needed"
        )
    return np.asarray(table, dtype=np.float64)
