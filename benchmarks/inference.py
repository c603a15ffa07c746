"""What `cryoai infer` is worth: speed, accuracy and calibration on particles that the run has never seen.

    python benchmarks/inference.py OUT.json RUN TRAINED NEW [--others NOISE OTHER...] [--refine 0 3]

TRAINED and NEW are folders made by ``cryoai simulate`` from one map with different seeds; RUN is a run on
TRAINED. The others are folders with particles that do not belong: another molecule, or pure noise (made
here, with the optics of NEW, if called ``noise``). Errors are measured in the frame of the run's final
poses of TRAINED, so that nothing is fitted to the particles under test.
"""

import argparse
import itertools
import json
import tempfile
import time
from pathlib import Path

import mrcfile
import numpy as np
import torch

from cryoai.evaluation import pose_errors
from cryoai.inference import RIGHT_IN_DEGREES, Inferred, PosePredictor
from cryoai.particle_stack import ParticleStack
from cryoai.pose_files import read_poses
from cryoai.poses import Poses, angular_distance_in_degrees
from cryoai.runs import RunFolder
from provenance import provenance

KEPT = 0.95
BINS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.95, 0.99, 1.0001)


def make_noise(like: Path, folder: Path) -> Path:
    """Particles of pure noise with the metadata of another folder."""
    with mrcfile.open(like / "particles.mrcs") as file:
        shape = file.data.shape
    mrcfile.write(folder / "particles.mrcs", np.random.default_rng(0).standard_normal(shape).astype(np.float32))
    (folder / "particles.star").write_text((like / "particles.star").read_text())
    return folder


def errors(found: Poses, truth: Poses, run: RunFolder, trained_truth: Poses) -> torch.Tensor:
    frame = pose_errors(read_poses(run.particles), trained_truth).frame
    return angular_distance_in_degrees(frame.of_poses(found).rotations, truth.rotations)


def calibration(confidence: torch.Tensor, right: torch.Tensor) -> list[dict[str, float]]:
    rows = []
    for low, high in itertools.pairwise(BINS):
        members = (confidence >= low) & (confidence < high)
        if bool(members.any()):
            said, was = float(confidence[members].mean()), float(right[members].float().mean())
            rows.append({"from": low, "n": int(members.sum()), "said": round(said, 3), "right": round(was, 3)})
    return rows


def accuracy(found: Inferred, error: torch.Tensor) -> dict[str, float]:
    return {
        "median_in_degrees": round(float(error.median()), 3),
        "within_10_degrees": round(float((error < RIGHT_IN_DEGREES).float().mean()), 4),
        "median_confidence": round(float(found.confidence.median()), 4),
    }


def measure(given: argparse.Namespace, n_iterations: int, scratch: Path) -> dict[str, object]:
    run = RunFolder.open(given.run)
    started = time.monotonic()
    predictor = PosePredictor.of_run(run, n_iterations=n_iterations, device=torch.device(given.device))
    report: dict[str, object] = {"seconds_to_load_and_calibrate": round(time.monotonic() - started, 2)}
    trained_truth, truth = read_poses(given.trained / "truth.star"), read_poses(given.new / "truth.star")
    stack = ParticleStack.open(given.new / "particles.star")
    seconds = []
    for _ in range(3):
        started = time.monotonic()
        found = predictor.infer(stack)
        seconds.append(time.monotonic() - started)
    report["images_per_second"] = round(stack.n_particles / min(seconds))
    error = errors(found.poses, truth, run, trained_truth)
    report["new"] = accuracy(found, error)
    on_trained = predictor.infer(ParticleStack.open(given.trained / "particles.star"))
    report["trained"] = accuracy(on_trained, errors(on_trained.poses, trained_truth, run, trained_truth))
    report["calibration"] = calibration(found.confidence, error < RIGHT_IN_DEGREES)
    limit = float(torch.quantile(found.confidence, 1 - KEPT))
    report["confidence_that_keeps_95_percent"] = round(limit, 5)
    for folder in given.others:
        source = make_noise(given.new, scratch) if folder.name == "noise" else folder
        other = predictor.infer(ParticleStack.open(source / "particles.star"))
        report[f"{folder.name}_below_it"] = round(float((other.confidence < limit).float().mean()), 4)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("trained", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--others", type=Path, nargs="*", default=[])
    parser.add_argument("--refine", type=int, nargs="+", default=[0, 3])
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    report: dict[str, object] = {
        **provenance(given.device),
        "stacks": [given.trained.name, given.new.name],
    }
    for n_iterations in given.refine:
        with tempfile.TemporaryDirectory() as scratch:
            report[f"refine_{n_iterations}"] = measure(given, n_iterations, Path(scratch))
        print(json.dumps(report[f"refine_{n_iterations}"], indent=1), flush=True)
    given.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
