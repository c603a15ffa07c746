"""How fast an encoder learns: accuracy against synthetic images seen, with the true volume held fixed.

    python benchmarks/encoder.py OUT.json STACK... [--seconds 100] [--encoders polar convolutional]

A STACK is a folder made by ``cryoai simulate``. The volume and the noise are those of the truth, the
encoder is trained by the Amortized stage as in a run, and it is asked about images of the stack that it
has not seen. ``a hypothesis within 20°`` counts images for which any hypothesis is that near;
``most probable`` is the encoder's own choice without a look at the volume; ``likeliest`` is the best of all
hypotheses by likelihood under the volume.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch

from cryoai.bootstrap import Reference
from cryoai.encoder import ConvolutionalEncoder, PolarEncoder, PoseEncoder
from cryoai.formats.mrc import read_map
from cryoai.fourier import resize_map
from cryoai.model import CryoAI, matched_filter, unfiltered
from cryoai.noise import NoiseSpectrum, log_likelihood
from cryoai.particle_stack import ParticleStack
from cryoai.particles import PreparedParticles, prepare_particles
from cryoai.pose_files import read_poses
from cryoai.poses import Poses, angular_distance_in_degrees
from cryoai.training.stages import Amortized, Estimate
from cryoai.volumes import SampledVolume, VoxelVolume
from provenance import provenance

BOX, RADIUS, N_JUDGED = 32, 12, 2000


def true_reference(particles: PreparedParticles, poses: Poses, density: torch.Tensor) -> Reference:
    """The true map at the scale of the images, and the noise that it leaves in them."""
    imaging = particles.imaging(RADIUS)
    n = min(5000, particles.n_particles)
    batch = particles.batch(torch.arange(n), RADIUS)
    clean = imaging.predict(SampledVolume.from_map(density, RADIUS), poses[:n], batch.optics)
    scale = float((clean.conj() * batch.coefficients).real.sum() / clean.abs().square().sum())
    return Reference(density * scale, RADIUS, NoiseSpectrum.of_residuals(batch.coefficients - scale * clean, imaging))


def make_encoder(name: str, particles: PreparedParticles) -> PoseEncoder:
    max_shift = 0.1 * particles.n_pixels * particles.pixel_size_in_angstroms
    if name.startswith("polar"):
        width = int(name.removeprefix("polar") or 128)
        return PolarEncoder(particles.disc, RADIUS, n_hypotheses=16, max_shift_in_angstroms=max_shift, width=width)
    width = int(name.removeprefix("convolutional") or 16)
    return ConvolutionalEncoder(particles.disc, n_hypotheses=8, max_shift_in_angstroms=max_shift, width=width)


@torch.no_grad()
def accuracy(model: CryoAI, particles: PreparedParticles, reference: Reference, truth: Poses) -> dict[str, object]:
    model.eval()
    precision, volume = reference.noise.precision(model.imaging), reference.sampled()
    nearest, probable, likeliest = [], [], []
    # The last images: training looks at few images of the stack, and hardly at these.
    for batch in particles.batches(torch.arange(particles.n_particles)[-N_JUDGED:], 250, RADIUS):
        hypotheses = model.encode(batch, precision)
        distance = angular_distance_in_degrees(
            hypotheses.poses.rotations, truth.rotations[batch.indices.cpu(), None].to(precision.device)
        )
        predicted = model.imaging.predict(volume, hypotheses.poses, batch.optics)
        best = log_likelihood(batch.coefficients[:, None], predicted, precision).argmax(1)
        nearest.append(distance.min(1).values)
        probable.append(distance.gather(1, hypotheses.log_probabilities.argmax(1)[:, None])[:, 0])
        likeliest.append(distance.gather(1, best[:, None])[:, 0])
    model.train()
    named = {"a_hypothesis": nearest, "most_probable": probable, "likeliest": likeliest}
    return {
        f"{name}_{measure}": round(float(value), 4)
        for name, parts in named.items()
        for measure, value in (
            ("median_in_degrees", torch.cat(parts).median()),
            ("within_20_degrees", (torch.cat(parts) < 20).float().mean()),
        )
    }


def measure(stack: Path, name: str, given: argparse.Namespace, scratch: Path) -> dict[str, object]:
    torch.manual_seed(given.seed)
    truth = read_poses(stack / "truth.star")
    source = ParticleStack.open(stack / "particles.star")
    device = torch.device(given.device)
    particles = prepare_particles(source, source.n_pixels, scratch / "images", device=device).cropped(BOX)
    density = resize_map(torch.from_numpy(read_map(stack / "truth.mrc").density), BOX).to(device)
    reference = true_reference(particles, truth.to(device), density)
    encoder = make_encoder(name, particles)
    model = CryoAI(
        encoder,
        VoxelVolume(reference.density),
        particles.imaging(RADIUS),
        {"matched": matched_filter, "plain": unfiltered}[given.input],
    ).to(device)
    stage = Amortized(
        particles,
        Estimate(reference=reference),
        model,
        n_steps=given.steps,
        n_fit_steps=0,
        wake_batch_size=32,
        sleep_batch_size=given.batch_size,
        wake_interval=given.wake_interval,
        first_radius=RADIUS,
        learning_rate=given.learning_rate,
        volume_learning_rate=1e-30,  # held fixed
        shift_std_in_angstroms=0.02 * BOX * particles.pixel_size_in_angstroms,
        generator=torch.Generator().manual_seed(given.seed),
    )
    curve, seconds = [], 0.0
    while not stage.finished:
        started = time.monotonic()
        stage.step()
        seconds += time.monotonic() - started
        if stage.steps_done % max(1, given.steps // 6) == 0:
            seen = stage.steps_done * given.batch_size
            point = {"images_seen": seen, "seconds": round(seconds, 1)}
            curve.append(point | accuracy(model, particles, reference, truth))
            print(name, stack.name, curve[-1], flush=True)
    return {"parameters": sum(p.numel() for p in encoder.parameters()), "curve": curve}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("stacks", type=Path, nargs="+")
    parser.add_argument("--encoders", nargs="+", default=["polar", "convolutional"], help="a number sets the width")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch-size", type=int, default=192)
    parser.add_argument("--wake-interval", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--input", choices=["matched", "plain"], default="matched")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    report: dict[str, object] = {
        **provenance(given.device),
        "settings": {k: str(v) for k, v in vars(given).items() if k not in ("out", "stacks")},
    }
    for stack in given.stacks:
        with tempfile.TemporaryDirectory() as scratch:
            report[stack.name] = {name: measure(stack, name, given, Path(scratch)) for name in given.encoders}
    given.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
