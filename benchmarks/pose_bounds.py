"""The Cramér-Rao bound of the pose of one image, when map, optics and noise are known.

    python benchmarks/pose_bounds.py OUT.json STACK_FOLDER...

A STACK_FOLDER is what ``cryoai simulate`` made. For white noise of known variance the covariance of any
unbiased estimate of (rotation, shift) is at least the inverse of the Fisher information, whose entries are
inner products of the derivatives of the predicted image. The errors reported are drawn from a normal
distribution with that covariance: their median is the best median that any method can reach. Beside it stands
the resolution of the map reconstructed from the true poses, which no estimated poses can be expected to beat.
"""

import argparse
import json
import math
import tempfile
from pathlib import Path

import torch

from cryoai.alignment import FrameChange
from cryoai.evaluation import map_errors
from cryoai.formats.mrc import MrcMap, read_map
from cryoai.noise import NoiseSpectrum
from cryoai.particle_stack import ParticleStack
from cryoai.particles import PreparedParticles, prepare_particles
from cryoai.pose_files import read_poses
from cryoai.poses import Poses
from cryoai.reconstruction import HalfSets
from cryoai.runs import finite_or_none
from cryoai.volumes import SampledVolume
from provenance import provenance

_N_IMAGES = 500
_N_DRAWS = 200


def bounds(folder: Path) -> dict[str, float | None]:
    stack = ParticleStack.open(folder / "particles.star")
    truth = read_map(folder / "truth.mrc")
    poses = read_poses(folder / "truth.star")
    with tempfile.TemporaryDirectory() as scratch:
        particles = prepare_particles(stack, stack.n_pixels, Path(scratch) / "images")
        return pose_bound(particles, poses, truth) | map_bound(particles, poses, truth)


def map_bound(particles: PreparedParticles, poses: Poses, truth: MrcMap) -> dict[str, float | None]:
    halves = HalfSets.empty(particles.n_pixels)
    imaging = particles.imaging(particles.disc.max_radius)
    precision = particles.power(torch.arange(len(poses)), imaging.max_radius).precision(imaging)
    for chunk, rows in enumerate(torch.arange(len(poses)).split(256)):
        halves.sums[chunk % 2].add(particles.batch(rows), poses[rows], imaging, precision)
    density = halves.combined(halves.half_maps())
    unmoved = FrameChange(torch.eye(3), mirrored=False, shift=torch.zeros(3))
    errors = map_errors(density, torch.from_numpy(truth.density), particles.pixel_size_in_angstroms, unmoved)
    return {"map_from_true_poses_fsc_0.5_at_angstroms": finite_or_none(errors.resolution_at_half_in_angstroms)}


def pose_bound(particles: PreparedParticles, all_poses: Poses, truth: MrcMap) -> dict[str, float | None]:
    rows = torch.arange(_N_IMAGES)
    batch, poses = particles.batch(rows), all_poses[rows]
    imaging = particles.imaging(particles.disc.max_radius)
    volume = SampledVolume.from_map(torch.from_numpy(truth.density), imaging.max_radius, with_gradient=True)
    points = imaging.points(poses.rotations, batch.optics)
    values, gradients = volume.with_gradient(points)
    transfer = imaging.ctf(batch.optics) * imaging.shift_phases(poses.shifts_in_angstroms, batch.optics)
    predicted = transfer * values
    scale = float((predicted.conj() * batch.coefficients).real.sum() / predicted.abs().square().sum())
    noise = NoiseSpectrum.of_residuals(batch.coefficients - scale * predicted, imaging)
    by_rotation = torch.linalg.cross(points.to(gradients.dtype), gradients) * transfer[..., None]
    per_angstrom = imaging.coordinates / batch.optics.pixel_size_in_angstroms[:, None, None]
    by_shift = predicted[..., None] * (2j * math.pi * per_angstrom)
    jacobian = scale * torch.cat([by_rotation, by_shift], dim=-1) * noise.precision(imaging).sqrt()[:, None]
    # The real and the imaginary part of a coefficient each have half of its variance.
    columns = torch.view_as_real(jacobian.transpose(1, 2).contiguous()).flatten(2).double()
    covariance = torch.linalg.inv(2 * columns @ columns.transpose(1, 2))
    draws = torch.randn(_N_IMAGES, _N_DRAWS, 5, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    errors = draws @ torch.linalg.cholesky(covariance).transpose(1, 2)
    rotation = torch.rad2deg(errors[..., :3].norm(dim=-1))
    return {
        "median_rotation_error_in_degrees": round(float(rotation.median()), 3),
        "within_5_degrees": round(float((rotation < 5).double().mean()), 4),
        "median_shift_error_in_angstroms": round(float(errors[..., 3:].norm(dim=-1).median()), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("folders", type=Path, nargs="+")
    given = parser.parse_args()
    report = provenance()
    for folder in given.folders:
        report[folder.name] = bounds(folder)
        print(folder.name, report[folder.name], flush=True)
    given.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
