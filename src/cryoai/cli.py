"""The command line: a table of verbs."""

from __future__ import annotations

import json
import math
import platform
import sys
import traceback
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from cyclopts import App, CycloptsError, Group, Parameter
from numpy.typing import NDArray
from pydantic import ValidationError

from cryoai import __version__
from cryoai.alignment import FrameChange
from cryoai.errors import InputError, RunFailedError
from cryoai.evaluation import PoseErrors, map_errors, pose_errors
from cryoai.formats.atoms import MODEL_SUFFIXES, read_model_as_map
from cryoai.formats.files import make_empty_folder
from cryoai.formats.mrc import MrcMap, read_map
from cryoai.hardware import choose_device, matrix_dtype
from cryoai.inference import PosePredictor, check_output, infer_file
from cryoai.particle_stack import ParticleStack
from cryoai.pose_files import read_poses
from cryoai.report.figures import draw_particles_and_map
from cryoai.runs import RunFolder, finite_or_none
from cryoai.simulation import Microscope, protein_like_phantom, resample_map, simulate
from cryoai.training.loop import reconstruct
from cryoai.training.settings import Preset, Settings, describe
from cryoai.watching import FollowedFolder

__all__ = ["app", "main"]

_SETTINGS = Group("Settings", help="Each can also stand in a TOML file given with --settings.")

app = App(
    name="cryoai",
    help=(
        "Ab initio cryo-EM reconstruction: from particle images with unknown orientations to a map, half maps "
        "and poses.\n\nStart with: cryoai demo"
    ),
    version=__version__,
    help_format="plaintext",
    suppress_keyboard_interrupt=False,  # main has a word to say
)


@app.command(name="demo")
def demo_command(*, out: Path = Path("demo"), seed: int = 0) -> None:
    """Show the whole way on a made-up protein: particles, map, and how right it is. Takes minutes.

    Parameters
    ----------
    out
        Folder for the particles and the run.
    seed
        Of the protein, the particles and the run.
    """
    _require_seed(seed)
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
    _evaluate(result.run, made.truth, made.true_map)
    picture = out / "demo.png"
    images = particles.images(torch.arange(12)).numpy()
    title = f"map from {particles.n_particles:,} particles, {result.half_map_agreement_in_angstroms:.1f} Å"
    draw_particles_and_map(picture, images, read_map(result.run.map), title)
    print(f"\nLook at {picture}, and open {result.run.map} in ChimeraX.")


@app.command(name="simulate")
def simulate_command(
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
        _require(0 < value < math.inf, f"{flag} {value}: must be positive and finite")
    low, high = defocus_range
    _require(-math.inf < low <= high < math.inf, f"--defocus-range {low} {high}: two finite numbers in order")
    _require(0 <= amplitude_contrast <= 1, f"--amplitude-contrast {amplitude_contrast}: must be from 0 to 1")
    _require(0 <= shift_std < math.inf, f"--shift-std {shift_std}: must be finite and not negative")
    _require(math.isfinite(spherical_aberration), f"--spherical-aberration {spherical_aberration}: must be finite")
    _require(box >= 32 and box % 2 == 0, f"--box {box}: an even number of at least 32 is needed")
    _require_seed(seed)
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


@app.command(name="reconstruct")
def reconstruct_command(
    particles: Path,
    run_dir: Path,
    *,
    preset: Preset = "auto",
    settings_file: Annotated[Path | None, Parameter(name="--settings")] = None,
    data_dir: Path | None = None,
    settings: Annotated[Settings, Parameter(name="*", group=_SETTINGS)] = Settings(),
) -> None:
    """Reconstruct a map, half maps and every pose from particles with unknown orientations.

    Parameters
    ----------
    particles
        RELION particle STAR file (3.0, 3.1 or later); poses in it are not used.
    run_dir
        New folder for all results.
    preset
        auto: search, encoder and refinement. paper: the published CryoAI, encoder and volume only.
    settings_file
        settings.toml of an earlier run, to repeat it; flags given beside it win.
    data_dir
        Folder that the image paths in the STAR file start from.
    """
    chosen = Settings.assemble(preset, settings_file, settings.model_dump(exclude_unset=True))
    reconstruct(ParticleStack.open(particles, data_dir=data_dir), run_dir, chosen)


@app.command(name="infer")
def infer_command(
    run_dir: Path,
    *paths: Path,
    watch: Path | None = None,
    until_idle: float = math.inf,
    refine: int = 0,
    data_dir: Path | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> None:
    """Pose particles that a run has never seen, with its encoder, each with a confidence.

    cryoai infer RUN_DIR NEW.star OUT.star

    cryoai infer RUN_DIR OUT_DIR --watch DIR

    OUT.star is NEW.star with poses and rlnParticleFigureOfMerit, the probability that the pose is within
    10° of the right one. Particles that do not belong to the map of the run have one near 0. The images must be
    of the run's kind: the same contrast, a box as large or larger, pixels as fine as its encoder's or finer.

    Parameters
    ----------
    run_dir
        Folder of a finished run with an encoder.
    paths
        Particle file and file to write, or with --watch the folder to write to.
    watch
        Folder to follow during data collection: every STAR file in it is posed once it is whole.
    until_idle
        With --watch, end when nothing new has come for so many seconds.
    refine
        Steps of local refinement of every pose at each of three band limits, 3 are plenty, and a search for those that
        do not fit. Slower and finer.
    data_dir
        Folder that the image paths in the STAR file start from.
    """
    _require(0 <= refine <= 20, f"--refine {refine}: from 0 to 20 steps")
    _require(until_idle > 0, f"--until-idle {until_idle}: must be positive")
    if watch is None:
        _require(len(paths) == 2, "infer: give RUN_DIR NEW.star OUT.star, or RUN_DIR OUT_DIR --watch DIR")
        _require(until_idle == math.inf, "--until-idle: is for --watch DIR")
    else:
        _require(len(paths) == 1, "infer: with --watch DIR give RUN_DIR and the folder to write to")
    if watch is None:
        check_output(*paths)
    run = RunFolder.open(run_dir)
    predictor = PosePredictor.of_run(run, n_iterations=refine, device=choose_device(device))

    def pose(source: Path, out: Path) -> None:
        print(infer_file(predictor, source, out, data_dir=data_dir), flush=True)

    if watch is None:
        pose(*paths)
    else:
        FollowedFolder(watch, paths[0], pose, print).follow(until_idle)


@app.command(name="evaluate")
def evaluate_command(
    run_dir: Path,
    *,
    truth: Path,
    true_map: Annotated[Path | None, Parameter(name="--map")] = None,
    as_json: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """Compare the poses and the map of a run with the truth, up to rotation, shift and hand.

    Also written to evaluation.json in the run folder.

    Parameters
    ----------
    truth
        STAR file with the true poses of the same particles in the same order.
    true_map
        True map; any box and pixel size.
    as_json
        Print JSON in place of a table.
    """
    _evaluate(RunFolder.open(run_dir), truth, true_map, as_json=as_json)


@app.command(name="info")
def info_command() -> None:
    """Say what this machine offers and which versions are installed."""
    device = choose_device("auto")
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    print(f"cryoai   {__version__}")
    print(f"device   {device} ({name}), {torch.get_num_threads()} threads, networks in {matrix_dtype(device)}")
    print(f"python   {platform.python_version()} on {platform.platform()}")
    for package in ("torch", "numpy", "scipy", "mrcfile", "roma", "torch-ctf", "finufft"):
        print(f"{package:<8} {version(package)}")


# ------------------------------------------------------------------------------ shared


def _require(fulfilled: bool, rule: str) -> None:
    if not fulfilled:
        raise InputError(rule)


def _require_seed(seed: int) -> None:
    _require(0 <= seed < 2**31, f"--seed {seed}: must be from 0 to {2**31 - 1}")


def _evaluate(run: RunFolder, truth: Path, true_map: Path | None, *, as_json: bool = False) -> None:
    true_poses = read_poses(truth)
    poses = read_poses(run.particles)
    if len(poses) != len(true_poses):
        raise InputError(f"{truth}: {len(true_poses)} particles, but {run.path} has {len(poses)}; give the same ones")
    final = pose_errors(poses, true_poses)
    report: dict[str, Any] = {"poses": _numbers(final)}
    rows = [("final poses", final)]
    if run.encoder_particles.is_file():
        encoder = pose_errors(read_poses(run.encoder_particles), true_poses)
        report["encoder_poses"] = _numbers(encoder)
        rows.append(("encoder's own", encoder))
    if true_map is not None:
        report["map"] = _map_report(run, true_map, final.frame)
    run.write_json(run.evaluation, report)
    if as_json:
        print(json.dumps(report, indent=2))
        return
    print(f"\n{'':<14} {'median':>8} {'< 5°':>7} {'< 10°':>7} {'shift':>8}")
    for label, e in rows:
        print(
            f"{label:<14} {e.median_rotation_error_in_degrees:7.2f}° {e.within_5_degrees:7.1%} "
            f"{e.within_10_degrees:7.1%} {e.median_shift_error_in_angstroms:6.2f} Å"
        )
    print(f"hand: {'mirrored (images alone cannot tell)' if final.mirrored else 'as in the truth'}")
    if "map" in report:
        for threshold in ("0.5", "0.143"):
            period = report["map"][f"resolution_at_fsc_{threshold}"]
            print(f"map against truth: FSC {threshold} at {'no shell' if period is None else f'{period:.1f} Å'}")


def _numbers(errors: PoseErrors) -> dict[str, float | bool]:
    return {k: v for k, v in asdict(errors).items() if k != "frame"}


def _map_report(run: RunFolder, true_map: Path, frame: FrameChange) -> dict[str, Any]:
    found, truth = read_map(run.map), read_map(true_map)
    n, pixel_size = found.density.shape[0], found.pixel_size_in_angstroms
    if truth.density.shape[0] != n or abs(truth.pixel_size_in_angstroms - pixel_size) > 1e-3 * pixel_size:
        truth = resample_map(truth, n, pixel_size)
    errors = map_errors(torch.from_numpy(found.density), torch.from_numpy(truth.density), pixel_size, frame)
    return {
        "resolution_at_fsc_0.5": finite_or_none(errors.resolution_at_half_in_angstroms),
        "resolution_at_fsc_0.143": finite_or_none(errors.resolution_at_0143_in_angstroms),
        "nyquist_in_angstroms": 2 * pixel_size,
        "fsc": [round(float(value), 5) for value in errors.fsc],
    }


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


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit status: 0 done, 1 the run failed, 2 bad input or usage."""
    tokens = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in tokens
    if debug:
        tokens.remove("--debug")
    try:
        app(tokens, exit_on_error=False, print_error=False, result_action="return_value")
    except (InputError, CycloptsError) as error:
        return _fail(describe(error.__cause__) if isinstance(error.__cause__, ValidationError) else error, 2, debug)
    except RunFailedError as error:
        return _fail(error, 1, debug)
    except PermissionError as error:
        return _fail(InputError(f"{error.filename}: no permission to write; give another place"), 2, debug)
    except OSError as error:
        return _fail(RunFailedError(f"{error.filename or 'input or output'}: {error.strerror}"), 1, debug)
    except KeyboardInterrupt:
        print("cryoai: stopped", file=sys.stderr)
        return 130
    return 0


def _fail(error: Exception, status: int, debug: bool) -> int:
    if debug:
        traceback.print_exception(error)
    message = " ".join(str(error).split())
    print(f"cryoai: error: {message}", file=sys.stderr)
    return status
