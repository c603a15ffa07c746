"""One set of particles in every form that it can come in: the results must be the same.

    python benchmarks/same_particles.py OUT.json STACK [--variants ...] [--flags ...]

STACK is a folder made by ``cryoai simulate``. The set is given as it is (STAR 3.1), as STAR 3.0, as a
cryoSPARC dataset, with shuffled rows, with inverted contrast, as half-precision images, and with four images
spoiled (NaN, infinite, constant, cut off). Each is reconstructed from the same seed and compared with the
first: the worst FSC of the maps within the resolution, and the differences of the poses.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import mrcfile
import numpy as np
import torch

from cryoai.comparison import compare_poses
from cryoai.evaluation import particle_mask
from cryoai.formats.mrc import read_map
from cryoai.fourier import fourier_shell_correlation
from cryoai.particle_stack import ParticleStack
from cryoai.particles import PreparedParticles, prepare_particles
from cryoai.pose_files import read_poses
from cryoai.poses import Poses
from cryoai.reconstruction import ReconstructionSums
from provenance import provenance

SPOILED = (17, 4321, 7777)


def columns_of(stack: Path) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """The optics and the particles of a simulated STAR file, as text."""
    tables: list[dict[str, list[str]]] = []
    for line in (stack / "particles.star").read_text().splitlines():
        words = line.split()
        if line.startswith("data_"):
            tables.append({})
        elif line.startswith("_"):
            tables[-1][words[0][1:]] = []
        elif words and words[0] != "loop_" and not line.startswith("#"):
            for cells, word in zip(tables[-1].values(), words, strict=True):
                cells.append(word)
    return tables[0], tables[1]


def write_loops(path: Path, tables: dict[str, dict[str, list[str]]]) -> Path:
    with path.open("w") as file:
        for name, columns in tables.items():
            file.write(f"data_{name}\n\nloop_\n" + "".join(f"_{column}\n" for column in columns))
            file.writelines(" ".join(row) + "\n" for row in zip(*columns.values(), strict=True))
            file.write("\n")
    return path


def as_it_is(stack: Path, folder: Path) -> Path:
    optics, particles = columns_of(stack)
    (folder / "particles.mrcs").symlink_to(stack / "particles.mrcs")
    return write_loops(folder / "particles.star", {"optics": optics, "particles": particles})


def relion_30(stack: Path, folder: Path) -> Path:
    optics, particles = columns_of(stack)
    (folder / "particles.mrcs").symlink_to(stack / "particles.mrcs")
    n, pixel_size = len(particles["rlnImageName"]), float(optics["rlnImagePixelSize"][0])
    shared = {name: optics[name] * n for name in ("rlnVoltage", "rlnSphericalAberration", "rlnAmplitudeContrast")}
    # micrometres on the detector over the magnification
    detector = {"rlnDetectorPixelSize": [f"{5.0:.6f}"] * n, "rlnMagnification": [f"{5e4 / pixel_size:.9f}"] * n}
    del particles["rlnOpticsGroup"]
    return write_loops(folder / "particles.star", {"images": particles | shared | detector})


def cryosparc(stack: Path, folder: Path) -> Path:
    optics, particles = columns_of(stack)
    (folder / "particles.mrcs").symlink_to(stack / "particles.mrcs")
    n, box = len(particles["rlnImageName"]), int(optics["rlnImageSize"][0])
    fields = {
        "uid": np.arange(1, n + 1, dtype=np.uint64) * np.uint64(2654435761),
        "blob/path": np.full(n, b">particles.mrcs"),
        "blob/idx": np.array([int(name.split("@")[0]) - 1 for name in particles["rlnImageName"]], dtype=np.uint32),
        "blob/shape": np.full((n, 2), box, dtype=np.uint32),
        "blob/psize_A": np.full(n, float(optics["rlnImagePixelSize"][0]), dtype=np.float32),
        "ctf/accel_kv": np.full(n, float(optics["rlnVoltage"][0]), dtype=np.float32),
        "ctf/cs_mm": np.full(n, float(optics["rlnSphericalAberration"][0]), dtype=np.float32),
        "ctf/amp_contrast": np.full(n, float(optics["rlnAmplitudeContrast"][0]), dtype=np.float32),
        "ctf/df1_A": np.array(particles["rlnDefocusU"], dtype=np.float32),
        "ctf/df2_A": np.array(particles["rlnDefocusV"], dtype=np.float32),
        "ctf/df_angle_rad": np.deg2rad(np.array(particles["rlnDefocusAngle"], dtype=np.float64)).astype(np.float32),
        "ctf/phase_shift_rad": np.zeros(n, dtype=np.float32),
        "ctf/bfactor": np.zeros(n, dtype=np.float32),
    }
    kinds = [(name, values.dtype, values.shape[1:]) for name, values in fields.items()]
    table = np.empty(n, dtype=kinds)
    for name, values in fields.items():
        table[name] = values
    with (folder / "particles.cs").open("wb") as file:
        np.save(file, table)
    return folder / "particles.cs"


def shuffled(stack: Path, folder: Path) -> Path:
    optics, particles = columns_of(stack)
    (folder / "particles.mrcs").symlink_to(stack / "particles.mrcs")
    order = np.random.default_rng(0).permutation(len(particles["rlnImageName"]))
    particles = {name: [cells[i] for i in order] for name, cells in particles.items()}
    return write_loops(folder / "particles.star", {"optics": optics, "particles": particles})


def with_images(stack: Path, folder: Path, dtype: type, gain: float) -> Path:
    path = as_it_is(stack, folder)
    (folder / "particles.mrcs").unlink()
    with mrcfile.mmap(stack / "particles.mrcs") as file:
        images, voxel = file.data, float(file.voxel_size.x)
        with mrcfile.new(folder / "particles.mrcs") as new:
            new.set_data((gain * images).astype(dtype))
            new.set_image_stack()
            new.voxel_size = voxel
    return path


def inverted(stack: Path, folder: Path) -> Path:
    return with_images(stack, folder, np.float32, -1.0)


def half_precision(stack: Path, folder: Path) -> Path:
    return with_images(stack, folder, np.float16, 1.0)


def spoiled(stack: Path, folder: Path) -> Path:
    path = as_it_is(stack, folder)
    (folder / "particles.mrcs").unlink()
    shutil.copyfile(stack / "particles.mrcs", folder / "particles.mrcs")
    with mrcfile.mmap(folder / "particles.mrcs", mode="r+") as file:
        file.data[SPOILED[0], 3, 3], file.data[SPOILED[1], 0, 0] = np.nan, np.inf
        file.data[SPOILED[2]] = 1.25
    with (folder / "particles.mrcs").open("r+b") as raw:
        raw.truncate((folder / "particles.mrcs").stat().st_size - 1000)
    return path


VARIANTS = {
    "STAR 3.1": as_it_is,
    "STAR 3.0": relion_30,
    "cryoSPARC": cryosparc,
    "shuffled rows": shuffled,
    "inverted contrast": inverted,
    "half-precision images": half_precision,
    "four images spoiled": spoiled,
}


def run_of(variant: str, stack: Path, folder: Path, flags: list[str]) -> tuple[Path, float]:
    made = folder / "input"
    made.mkdir(parents=True)
    particles = VARIANTS[variant](stack, made)
    started = time.monotonic()
    command = [sys.executable, "-m", "cryoai", "reconstruct", particles, folder / "run", *flags]
    subprocess.run([*map(str, command)], check=True, stdout=subprocess.DEVNULL)
    return folder / "run", time.monotonic() - started


def reconstructed(particles: PreparedParticles, rows: torch.Tensor, poses: Poses) -> torch.Tensor:
    """The map of the images ``rows`` (M,) at poses (M,), in closed form."""
    imaging = particles.imaging(particles.disc.max_radius)
    precision = (imaging.shells > 0).float()
    sums = ReconstructionSums.empty(particles.n_pixels, imaging.max_radius)
    for places in torch.arange(len(rows)).split(500):
        sums.add(particles.batch(rows[places]), poses[places], imaging, precision)
    return sums.solve(1e-3 * sums.mean_weight())


def compared(run: Path, reference: Path, truth: Path, scratch: Path) -> dict[str, object]:
    """Differences of a run from the first one, up to the frame, and from the truth.

    Runs whose numbers differ in the last digit end in frames of their own. To turn a map costs its highest
    frequencies, so poses are turned instead: both maps are made from the images of the first run.
    """
    between = compare_poses(run / "particles.star", reference / "particles.star")
    mine, theirs = (torch.from_numpy(rows) for rows in (between.matching.first, between.matching.second))
    summary = json.loads((run / "summary.json").read_text())
    first = json.loads((reference / "summary.json").read_text())
    stack = ParticleStack.open(first["particles"])
    particles = prepare_particles(stack, summary["box_in_pixels"], scratch, sign=first["contrast"]["sign"])
    turned = between.errors.frame.of_poses(read_poses(run / "particles.star")[mine])
    maps = [
        reconstructed(particles, theirs, poses) for poses in (turned, read_poses(reference / "particles.star")[theirs])
    ]
    fsc = fourier_shell_correlation(*(density * particle_mask(len(density)) for density in maps))
    last = round(len(maps[0]) * summary["pixel_size_in_angstroms"] / summary["resolution_in_angstroms"])
    errors = compare_poses(run / "particles.star", truth).errors
    stored = [read_map(path / "map.mrc").density for path in (run, reference)]
    return {
        "map_is_the_same_file": bool(np.array_equal(*stored)),
        "worst_fsc_with_the_first_to_the_resolution": round(float(fsc[1 : last + 1].min()), 5),
        "resolution_in_angstroms": summary["resolution_in_angstroms"],
        "median_rotation_from_the_first_in_degrees": round(between.errors.median_rotation_error_in_degrees, 4),
        "within_5_degrees_of_the_first": round(between.errors.within_5_degrees, 4),
        "median_rotation_error_in_degrees": round(errors.median_rotation_error_in_degrees, 3),
        "within_5_degrees": round(errors.within_5_degrees, 4),
        "n_quarantined": summary["n_quarantined"],
        "contrast_sign": summary["contrast"]["sign"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("stack", type=Path)
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--work", type=Path, help="where the runs are kept; default: a temporary folder")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="passed on to cryoai reconstruct")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = given.work or Path(name)
        report = {**provenance(), "stack": given.stack.name, "flags": given.flags, "results": {}}
        first = work / "STAR_3.1" / "run"
        for variant in given.variants:
            run, seconds = run_of(variant, given.stack.resolve(), work / variant.replace(" ", "_"), given.flags)
            found = {
                "seconds": round(seconds, 1),
                **compared(run, first, given.stack / "truth.star", work / "images.f16"),
            }
            report["results"][variant] = found
            print(variant, found, flush=True)
            given.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
