"""What Refinement can reach: the poses that the true map gives, the map that the true poses give, and its rate.

    python benchmarks/refinement.py OUT.json STACK [--device cpu]

STACK is a folder made by ``cryoai simulate``.

- **Poses**: every image refined from its true pose against the true map, at the whole band and with the noise
  that this map leaves: no local refinement that does not know the truth can be expected to do better.
- **Map**: half maps at the true poses: where their own FSC falls to 0.143, and where that of both together with the
  truth falls to 0.5.
- **Rate**: one round of Refinement at the whole band from the true poses, without the comparison of the half maps after
  it. Beside it the least time that the device needs for what cannot be left out: the bytes of the lattice that are
  read and added to, at the rate of a large copy, and the arithmetic, at that of a large matrix product. The nearer of
  the two is the bound.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from cryoai.alignment import FrameChange
from cryoai.evaluation import map_errors, pose_errors
from cryoai.formats.mrc import read_map
from cryoai.half_maps import HalfMaps
from cryoai.noise import Fit, NoiseSpectrum
from cryoai.particle_stack import ParticleStack
from cryoai.particles import PreparedParticles, prepare_particles
from cryoai.pose_files import read_poses
from cryoai.poses import Poses, assign_poses, blank_poses, selected_poses
from cryoai.refinement import refine_poses
from cryoai.runs import finite_or_none
from cryoai.symmetry.groups import PointGroup
from cryoai.training.settings import RefinementSettings
from cryoai.training.stages import Estimate, ParticlePoses, Refinement
from cryoai.training.stages.base import half_sets_at
from cryoai.volumes import SampledVolume
from provenance import provenance
from step_profile import synchronise

SEED = 0
N_STEPS = RefinementSettings().n_iterations
# Enough for the steps to come to rest.
N_STEPS_OF_BOUND = 4 * N_STEPS
N_FOR_NOISE, CHUNK = 2000, 256

# Of each coefficient of an image. The transform and its gradient, four complex numbers, at eight corners in each step;
# the transform alone for the last likelihood and for the fit to the other half; three sums read and written.
BYTES = N_STEPS * 8 * 4 * 8 + 2 * 8 * 8 + 8 * 3 * 2 * 4
# A step: interpolation 128, CTF and phases 20, derivatives by rotation 36 and by shift 4, prediction and residual 8,
# their weights 12, normal equations 120. Two predictions and an insertion: 32 + 26 each and 100.
OPERATIONS = N_STEPS * 328 + 2 * 58 + 100


# ------------------------------------------------------------------------------ bounds


def poses_by_true_map(particles: PreparedParticles, truth: Tensor, true_poses: Poses) -> dict[str, float]:
    """Errors of the poses to which images are refined against the true map (n, n, n)."""
    imaging = particles.imaging(particles.disc.max_radius)
    some = torch.arange(min(N_FOR_NOISE, particles.n_particles))
    batch, poses = particles.batch(some), selected_poses(true_poses, some)
    predicted = imaging.predict(SampledVolume.from_map(truth, imaging.max_radius), poses, batch.optics)
    # The particles come in units of their own.
    gain = float((predicted.conj() * batch.coefficients).real.sum() / predicted.abs().square().sum())
    noise = NoiseSpectrum.of_residuals(batch.coefficients - gain * predicted, imaging)
    volume = SampledVolume.from_map(gain * truth, imaging.max_radius, with_gradient=True)
    found = blank_poses(particles.n_particles, particles.disc.device)
    for rows in torch.arange(particles.n_particles).split(CHUNK):
        start, batch = selected_poses(true_poses, rows), particles.batch(rows)
        refined = refine_poses(batch, start, volume, imaging, noise.precision(imaging), N_STEPS_OF_BOUND)
        assign_poses(found, rows, refined.poses)
    errors = pose_errors(found.to("cpu"), true_poses.to("cpu"))
    return {
        "median_rotation_error_in_degrees": round(errors.median_rotation_error_in_degrees, 4),
        "within_5_degrees": round(errors.within_5_degrees, 4),
        "median_shift_error_in_angstroms": round(errors.median_shift_error_in_angstroms, 4),
    }


def map_by_true_poses(estimate: Estimate, truth: Tensor, pixel_size_in_angstroms: float) -> dict[str, float | None]:
    """Resolutions of the half maps, and of both together against the true map (n, n, n), in their mask."""
    half_maps, half_sets = estimate.half_maps, estimate.half_sets
    assert half_maps is not None
    assert half_sets is not None
    unmoved = FrameChange(torch.eye(3), mirrored=False, shift=torch.zeros(3))
    found, mask = half_maps.combined(half_sets).cpu(), half_maps.mask.cpu()
    errors = map_errors(found, truth.cpu(), pixel_size_in_angstroms, unmoved, mask)
    return {
        "half_maps_fsc_0.143_at_angstroms": finite_or_none(half_maps.resolution_in_angstroms),
        "truth_fsc_0.5_at_angstroms": finite_or_none(errors.resolution_at_half_in_angstroms),
    }


# ------------------------------------------------------------------------------ rate


def rate_of_a_round(particles: PreparedParticles, estimate: Estimate, half_set: Tensor) -> dict[str, float | str | int]:
    """Particles a second of one round at the whole band, and the share of what the device allows."""
    stage = Refinement(particles, estimate, half_set, (), PointGroup.named("C1"), max_rounds=1, n_iterations=N_STEPS)
    state = stage.state()
    stage.restore(replace(state, round=replace(state.round, band_limit=particles.disc.max_radius)))
    device, chunks = particles.disc.device, stage.task.chunks
    stage.step()
    # The last one also compares the half maps.
    seconds = timed(lambda: [stage.step() for _ in chunks[1:-1]], device)
    rate = (particles.n_particles - len(chunks[0]) - len(chunks[-1])) / seconds
    n_coefficients = particles.disc.n_coefficients()
    by_memory = copy_rate(device) / (BYTES * n_coefficients)
    by_arithmetic = product_rate(device) / (OPERATIONS * n_coefficients)
    return {
        "band_limit_in_shells": particles.disc.max_radius,
        "particles_per_second": round(rate, 1),
        "bytes_per_particle": BYTES * n_coefficients,
        "operations_per_particle": OPERATIONS * n_coefficients,
        "particles_per_second_by_memory": round(by_memory, 1),
        "particles_per_second_by_arithmetic": round(by_arithmetic, 1),
        "bound_by": "memory" if by_memory < by_arithmetic else "arithmetic",
        "share_of_bound": round(rate / min(by_memory, by_arithmetic), 4),
    }


def copy_rate(device: torch.device) -> float:
    """Bytes a second that a large copy reads and writes."""
    source = torch.ones(64 * 2**20, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / least_time(lambda: target.copy_(source), device)


def product_rate(device: torch.device) -> float:
    """Operations a second of a large matrix product in single precision."""
    n = 8192 if device.type == "cuda" else 1024
    first, second = torch.randn(2, n, n, device=device)
    return 2 * n**3 / least_time(lambda: first @ second, device)


def least_time(work: Callable[[], object], device: torch.device) -> float:
    return min(timed(work, device) for _ in range(10))


def timed(work: Callable[[], object], device: torch.device) -> float:
    synchronise(device)
    started = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - started


# ------------------------------------------------------------------------------ command


@torch.no_grad()
def measured(folder: Path, device: torch.device) -> dict[str, object]:
    stack = ParticleStack.open(folder / "particles.star")
    truth = torch.from_numpy(read_map(folder / "truth.mrc").density).to(device)
    poses = read_poses(folder / "truth.star").to(device)
    half_set = torch.randint(2, (len(poses),), generator=torch.Generator().manual_seed(SEED))
    with tempfile.TemporaryDirectory() as scratch:
        particles = prepare_particles(stack, stack.n_pixels, Path(scratch) / "images", device=device)
        sets = half_sets_at(poses, particles, half_set)
        none = torch.zeros(len(poses), dtype=torch.bool, device=device)
        placed = ParticlePoses(poses, none, none, none, None, poses, Fit.blank(len(poses), device))
        half_maps = HalfMaps.of(sets, particles.pixel_size_in_angstroms)
        estimate = Estimate(particles=placed, half_sets=sets, half_maps=half_maps)
        return {
            "n_particles": len(poses),
            "box_in_pixels": particles.n_pixels,
            "pixel_size_in_angstroms": particles.pixel_size_in_angstroms,
            "poses_by_true_map": poses_by_true_map(particles, truth, poses),
            "map_by_true_poses": map_by_true_poses(estimate, truth, particles.pixel_size_in_angstroms),
            "round": rate_of_a_round(particles, estimate, half_set),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("stack", type=Path)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    report = {
        **provenance(given.device),
        "stack": given.stack.name,
        **measured(given.stack, torch.device(given.device)),
    }
    print(json.dumps(report, indent=1))
    given.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
