"""What a training step spends its time on, and its share of the rate at which the device multiplies matrices.

    python benchmarks/step_profile.py OUT.json STACK [--device cpu] [--encoder polar]

STACK is a folder made by ``cryoai simulate``. Steps of the Amortized stage with default settings are profiled
apart: asleep (synthetic images, encoder) and awake (images of the data, encoder, FourierNet). The
floating-point operations are counted by PyTorch; the peak is that of a large matrix product in the type
that the networks use, measured in the same process.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from cryoai.encoder import EncoderArchitecture
from cryoai.hardware import matrix_dtype
from cryoai.model import CryoAI
from cryoai.particle_stack import ParticleStack
from cryoai.particles import prepare_particles
from cryoai.training.settings import AmortizedSettings
from cryoai.training.stages import Amortized, Estimate
from cryoai.volumes import FourierNetVolume
from provenance import provenance

REPEATS = 20
SIZE = {"cpu": 2048, "cuda": 8192}


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak_rate(device: torch.device) -> float:
    """Operations a second of a large matrix product."""
    n = SIZE[device.type]
    a, b = (torch.randn(n, n, device=device).to(matrix_dtype(device)) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        synchronise(device)
        started = time.perf_counter()
        a @ b
        synchronise(device)
        best = min(best, time.perf_counter() - started)
    return 2 * n**3 / best


def make_stage(stack: Path, device: torch.device, kind: str, scratch: Path) -> Amortized:
    chosen = AmortizedSettings()
    source = ParticleStack.open(stack / "particles.star")
    particles = prepare_particles(source, source.n_pixels, scratch / "images", device=device).cropped(chosen.box)
    extent = particles.n_pixels * particles.pixel_size_in_angstroms
    architecture = EncoderArchitecture(
        kind=kind,  # type: ignore[arg-type]
        n_hypotheses=chosen.n_hypotheses if kind == "polar" else 8,
        width=chosen.encoder_width if kind == "polar" else 16,
        max_shift_in_angstroms=chosen.max_shift_in_boxes * extent,
        symmetrization="none",
    )
    encoder = architecture.build(particles.disc, chosen.max_radius)
    model = CryoAI(encoder, FourierNetVolume(chosen.box, sampling_oversampling=1), particles.imaging(chosen.max_radius))
    return Amortized(
        particles,
        Estimate(),
        model.to(device),
        n_steps=10_000,
        n_fit_steps=0,
        wake_batch_size=chosen.wake_batch_size,
        sleep_batch_size=chosen.sleep_batch_size,
        wake_interval=chosen.wake_interval,
        first_radius=chosen.max_radius,
        learning_rate=1e-4,
        volume_learning_rate=1e-5,
        shift_std_in_angstroms=0.02 * extent,
        generator=torch.Generator().manual_seed(0),
    )


def measure(stage: Amortized, awake: bool, device: torch.device, peak: float) -> dict[str, object]:
    """Seconds, operations and the costliest operators of steps that are awake, or asleep."""

    def step() -> None:
        stage.steps_done = 0 if awake else 1
        stage.step()

    step()
    with FlopCounterMode(display=False) as counter:
        step()
    step()
    synchronise(device)
    started = time.perf_counter()
    for _ in range(REPEATS):
        step()
    synchronise(device)
    seconds = (time.perf_counter() - started) / REPEATS
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as profiler:
        step()
        synchronise(device)
    own = "self_cpu_time_total" if device.type == "cpu" else "self_device_time_total"
    events = sorted(profiler.key_averages(), key=lambda e: -getattr(e, own))
    total = sum(getattr(e, own) for e in events)
    return {
        "milliseconds": round(1e3 * seconds, 2),
        "gigaflop": round(counter.get_total_flops() / 1e9, 3),
        "share_of_matrix_peak": round(counter.get_total_flops() / seconds / peak, 3),
        "largest_shares_of_time": {e.key: round(getattr(e, own) / total, 3) for e in events[:12]},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("stack", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--encoder", choices=["polar", "convolutional"], default="polar")
    given = parser.parse_args()
    device = torch.device(given.device)
    peak = peak_rate(device)
    report: dict[str, object] = {
        **provenance(given.device),
        "encoder": given.encoder,
        "matrix_peak_in_gigaflop_per_second": round(peak / 1e9, 1),
        "type": str(matrix_dtype(device)),
    }
    with tempfile.TemporaryDirectory() as scratch:
        stage = make_stage(given.stack, device, given.encoder, Path(scratch))
        for name, awake in (("asleep", False), ("awake", True)):
            report[name] = measure(stage, awake, device, peak)
    print(json.dumps(report, indent=1))
    given.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
