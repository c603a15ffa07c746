"""Real images: does the map of 101 beta-galactosidase particles look more like the molecule than like controls?

    python benchmarks/real_images.py OUT.json PARTICLES.star REFERENCE.mrc [--seed 0]

The map is reconstructed with defaults and aligned to the reference in the hand that fits better, because
images do not tell the hand. In that hand it is then aligned to three targets: the reference, its mirror
image, and the reference with random phases beyond 25 Å. Reported is the correlation of the transforms up
to the resolution of the map. The reference takes no part in the reconstruction.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from cryoai.alignment import align_maps, change_frame
from cryoai.formats.mrc import read_map
from cryoai.fourier import invert_transform, shells_of_volume, transform_map
from cryoai.simulation import resample_map
from provenance import provenance

_RANDOM_BEYOND_IN_ANGSTROMS = 25.0


def correlation(first: Tensor, second: Tensor, max_shell: int) -> float:
    """Real correlation of two transforms in shells 1 to ``max_shell``."""
    shells, weights = shells_of_volume(first.shape[0])
    inside = (shells > 0) & (shells <= max_shell)
    a, b, w = transform_map(first)[inside], transform_map(second)[inside], weights[inside]
    norms = (a.abs().square() * w).sum() * (b.abs().square() * w).sum()
    return float(((a * b.conj()).real * w).sum() / norms.sqrt())


def aligned_correlation(found: Tensor, target: Tensor, max_shell: int) -> float:
    change = align_maps(found, target, max_radius=max_shell, try_mirror=False)
    return round(correlation(change_frame(found, change), target, max_shell), 4)


def phase_randomised(density: Tensor, last_kept_shell: int, seed: int) -> Tensor:
    """The map with the phases of white noise beyond a shell; its amplitudes stay."""
    shells, _ = shells_of_volume(density.shape[0])
    spectrum = transform_map(density)
    noise = transform_map(torch.randn(density.shape, generator=torch.Generator().manual_seed(seed)))
    random = spectrum.abs() * noise / noise.abs().clamp_min(1e-12)
    return invert_transform(torch.where(shells > last_kept_shell, random, spectrum), density.shape[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("particles", type=Path)
    parser.add_argument("reference", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        started = time.monotonic()
        command = [sys.executable, "-m", "cryoai", "reconstruct", given.particles, run, "--seed", given.seed]
        subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
        seconds = time.monotonic() - started
        summary = json.loads((run / "summary.json").read_text())
        found = read_map(run / "map.mrc")
    n, pixel_size = found.density.shape[0], found.pixel_size_in_angstroms
    density = torch.from_numpy(found.density)
    reference = torch.from_numpy(resample_map(read_map(given.reference), n, pixel_size).density)
    max_shell = int(n * pixel_size / summary["resolution_in_angstroms"])
    hand = align_maps(density, reference, max_radius=max_shell)
    density = change_frame(density, hand)
    kept = int(n * pixel_size / _RANDOM_BEYOND_IN_ANGSTROMS)
    # z -> -z about the centre n // 2
    mirrored = reference.flip(0).roll(1, 0)
    report = {
        **provenance(),
        "particles": given.particles.name,
        "seed": given.seed,
        "seconds": round(seconds, 1),
        "contrast": summary["contrast"],
        "start_agreement": summary["start_agreement"],
        "resolution_in_angstroms": summary["resolution_in_angstroms"],
        "hand_was_reversed": hand.mirrored,
        "correlation": {
            "reference": aligned_correlation(density, reference, max_shell),
            "mirrored": aligned_correlation(density, mirrored, max_shell),
            "phase_randomised": [
                aligned_correlation(density, phase_randomised(reference, kept, seed), max_shell) for seed in range(5)
            ],
        },
    }
    given.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
