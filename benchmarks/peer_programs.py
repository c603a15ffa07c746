"""How to start, resume, follow and read the programs that ``peers.py`` compares.

Settings are those that each program recommends itself. RELION's are what the jobs InitialModel and Refine3D of the
graphical interface of version 3.1.3 run when nothing is changed there, as ``relion_pipeliner --addJob`` shows, but
for the diameter of the mask, the threads, the seed, and how often it writes; cryoDRGN's are the defaults of
``cryodrgn abinit``. What they print and the files that they leave say how far they are.
"""

import pickle
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from watched import Phase

__all__ = [
    "CryoaiRun",
    "CryodrgnRun",
    "Program",
    "RelionRefinement",
    "RelionStart",
    "Task",
    "cryodrgn_place",
    "poses_in_boxes",
    "relion_place",
    "rows_with_a_class",
]


@dataclass(frozen=True)
class Task:
    """What all programs are given."""

    stack: Path
    n_particles: int
    n_pixels: int
    mask_diameter_in_angstroms: float
    n_threads: int
    seed: int


@dataclass(frozen=True)
class Program:
    """A program that makes poses and a map from a stack; ``folder`` holds all that it writes.

    ``phases`` are none where only the program knows when it is done. Steps that are done are counted from 1: those
    up to ``checkpoint`` need not be done again by what ``command`` starts, those up to ``last_step`` have results.
    """

    task: Task
    folder: Path

    @property
    def phases(self) -> tuple[Phase, ...]:
        return ()

    @property
    def environment(self) -> dict[str, str]:
        return {"OMP_NUM_THREADS": str(self.task.n_threads)}

    @property
    def stop_file(self) -> Path | None:
        """The file by which it can be asked to stop."""
        return None

    @property
    def start(self) -> str:
        """What it begins with."""
        return "from nothing"

    def version(self) -> str:
        raise NotImplementedError

    def last_step(self) -> int:
        raise NotImplementedError

    def checkpoint(self) -> int:
        return self.last_step()

    def prepare(self) -> None:
        """Make what is to be there before it starts or goes on."""

    def command(self) -> list[str]:
        raise NotImplementedError

    def place(self, log: Path) -> float:
        """Steps that are done, with a fraction, by what it prints."""
        raise NotImplementedError

    def ended_well(self, status: int) -> bool:
        """Whether it is done, by its exit status."""
        return status == 0

    def poses(self) -> Path | None:
        raise NotImplementedError

    def map(self) -> Path | None:
        raise NotImplementedError


def first_line(*command: str) -> str:
    """Of what a program prints."""
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    return said.stdout.strip().splitlines()[0].strip()


# ------------------------------------------------------------------------------ ours


@dataclass(frozen=True)
class CryoaiRun(Program):
    """``cryoai reconstruct`` with nothing set. What was stopped begins again."""

    @property
    def phases(self) -> tuple[Phase, ...]:
        return (Phase("run", (self.task.n_particles,)),)

    def version(self) -> str:
        return "cryoai " + first_line(sys.executable, "-m", "cryoai", "--version")

    def last_step(self) -> int:
        return int((self.folder / "run" / "summary.json").is_file())

    def prepare(self) -> None:
        run = self.folder / "run"
        if run.exists():
            run.rename(self.folder / f"stopped_{len(list(self.folder.glob('stopped_*'))) + 1}")

    def command(self) -> list[str]:
        run = [str(self.task.stack), str(self.folder / "run"), "--seed", str(self.task.seed)]
        return [sys.executable, "-m", "cryoai", "reconstruct", *run]

    def place(self, log: Path) -> float:
        del log
        return self.last_step()

    def ended_well(self, status: int) -> bool:
        """Its status is its verdict, and 0 only if that is solved; the results are there if the summary is."""
        del status
        return bool(self.last_step())

    def poses(self) -> Path | None:
        return self.folder / "run" / "particles.star" if self.last_step() else None

    def map(self) -> Path | None:
        return self.folder / "run" / "map.mrc" if self.last_step() else None


# ------------------------------------------------------------------------------ RELION


@dataclass(frozen=True)
class RelionStart(Program):
    """``relion_refine --sgd --denovo_3dref``: a map from nothing by stochastic gradient descent."""

    prefix: str

    @property
    def phases(self) -> tuple[Phase, ...]:
        few, many = (min(n, self.task.n_particles) for n in (100, 500))
        # As updateSubsetSize of its ml_optimiser.cpp counts.
        between = tuple(min(100 + round(i / 200 * 400), self.task.n_particles) for i in range(200))
        return (
            Phase("initial", (few,) * 50),
            Phase("in between", between, like="initial"),
            Phase("final", (many,) * 50, like="in between"),
        )

    @property
    def stop_file(self) -> Path | None:
        return self.folder / "RELION_JOB_ABORT_NOW"

    def version(self) -> str:
        return first_line(f"{self.prefix}refine", "--version").replace(" version:", "")

    def last_step(self) -> int:
        return relion_last_step(self.folder, ("optimiser.star", "model.star", "data.star", "class001.mrc"))

    def prepare(self) -> None:
        clear_relion_flags(self.folder)

    def command(self) -> list[str]:
        flags = (
            "--sgd_ini_iter 50 --sgd_inbetween_iter 200 --sgd_fin_iter 50 --sgd_ini_resol 35 --sgd_fin_resol 15 "
            "--sgd_ini_subset 100 --sgd_fin_subset 500 --sgd --denovo_3dref --ctf --K 1 --sym C1 --flatten_solvent "
            "--zero_mask --dont_combine_weights_via_disc --pool 3 --pad 2 --skip_gridding --oversampling 1 "
            "--healpix_order 1 --offset_range 6 --offset_step 4 "
            # The interface has every tenth written; a stop loses what was not.
            "--sgd_write_iter 1"
        )
        command = [f"{self.prefix}refine", *relion_start(self, flags), "--j", str(self.task.n_threads)]
        return [*command, "--pipeline_control", f"{self.folder}/"]

    def place(self, log: Path) -> float:
        return relion_place(end_of(log))

    def poses(self) -> Path | None:
        """Of the particles that were in a subset so far, each from its last time."""
        step = self.last_step()
        if step == 0:
            return None
        return rows_with_a_class(self.folder / f"run_it{step:03d}_data.star", self.folder / "poses.star")

    def map(self) -> Path | None:
        step = self.last_step()
        return self.folder / f"run_it{step:03d}_class001.mrc" if step else None


@dataclass(frozen=True)
class RelionRefinement(Program):
    """``relion_refine_mpi --auto_refine --split_random_halves``, from a reference cut off at 60 Å.

    It splits the particles among processes only, of which there are a leader and one for each half.
    """

    prefix: str
    mpirun: str
    reference: Path

    @property
    def environment(self) -> dict[str, str]:
        # In a container everyone is root.
        return {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}

    @property
    def start(self) -> str:
        return f"from the map of {'cryoai' if self.reference.name == 'map.mrc' else 'its initial model'} at 60 Å"

    @property
    def stop_file(self) -> Path | None:
        return self.folder / "RELION_JOB_ABORT_NOW"

    def version(self) -> str:
        return first_line(f"{self.prefix}refine", "--version").replace(" version:", "")

    def last_step(self) -> int:
        return relion_last_step(
            self.folder, ("optimiser.star", "half1_model.star", "half2_model.star", "data.star", "half1_class001.mrc")
        )

    def prepare(self) -> None:
        clear_relion_flags(self.folder)

    def command(self) -> list[str]:
        flags = (
            f"--auto_refine --split_random_halves --ref {self.reference} --firstiter_cc --ini_high 60 "
            "--dont_combine_weights_via_disc --pool 3 --pad 2 --skip_gridding --ctf --flatten_solvent --zero_mask "
            "--oversampling 1 --healpix_order 2 --auto_local_healpix_order 4 --offset_range 5 --offset_step 2 --sym C1 "
            "--low_resol_join_halves 40 --norm --scale"
        )
        # The leader has nothing to compute, and must not take a core for waiting.
        mpi = [self.mpirun, "--oversubscribe", "--bind-to", "none", "--mca", "mpi_yield_when_idle", "1", "-n", "3"]
        threads = ["--j", str(max(1, self.task.n_threads // 2))]
        control = ["--pipeline_control", f"{self.folder}/"]
        return [*mpi, f"{self.prefix}refine_mpi", *relion_start(self, flags), *threads, *control]

    def place(self, log: Path) -> float:
        return relion_place(end_of(log))

    def poses(self) -> Path | None:
        return self._of_last_step("run_data.star", "data.star")

    def map(self) -> Path | None:
        return self._of_last_step("run_class001.mrc", "half1_class001.mrc")

    def _of_last_step(self, final: str, ending: str) -> Path | None:
        step = self.last_step()
        if (self.folder / final).is_file():
            return self.folder / final
        return self.folder / f"run_it{step:03d}_{ending}" if step else None


def relion_start(program: RelionStart | RelionRefinement, flags: str) -> list[str]:
    """The arguments that begin a run of RELION, or go on with it; what was set is then in its files."""
    out = ["--o", str(program.folder / "run")]
    step, task = program.checkpoint(), program.task
    if step:
        return ["--continue", str(program.folder / f"run_it{step:03d}_optimiser.star"), *out]
    # With a seed of 0 it takes the same images into the subset of every iteration.
    seed = ["--random_seed", str(task.seed + 1)]
    diameter = ["--particle_diameter", f"{task.mask_diameter_in_angstroms:g}"]
    return [*out, "--i", str(task.stack), *flags.split(), *diameter, *seed]


def relion_last_step(folder: Path, endings: tuple[str, ...]) -> int:
    """The last iteration of which all files are there; 0 if there is none."""
    numbers = [int(path.name[6:9]) for path in folder.glob(f"run_it[0-9][0-9][0-9]_{endings[0]}")]
    whole = [n for n in numbers if all((folder / f"run_it{n:03d}_{ending}").is_file() for ending in endings)]
    return max(whole, default=0)


def clear_relion_flags(folder: Path) -> None:
    """Remove the files by which RELION was asked to stop, and said how it ended."""
    for path in folder.glob("RELION_JOB_*"):
        path.unlink()


def end_of(log: Path, n_bytes: int = 100_000) -> str:
    """The last part of a file, which holds more than one bar of progress."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - n_bytes))
        return file.read().decode(errors="replace")


def relion_place(printed: str) -> float:
    """Iterations that RELION has done, with the share of the present one that its last bar of progress shows.

    Examples
    --------
    >>> relion_place(" Expectation iteration 3\\n   9/  18 sec ..............................~~(,_,\\">")
    2.5
    """
    started = list(re.finditer(r"[Ii]teration (\d+)", printed))
    if not started:
        return 0.0
    number, after = int(started[-1][1]), printed[started[-1].end() :]
    if "Maximization" in after:
        return float(number)
    # A bar of 60 dots, each time printed over the last one.
    bars = re.findall(r"(?:sec|min|hrs) (\.*)~", after)
    return number - 1 + (min(len(bars[-1]), 60) / 60 if bars else 0.0)


def rows_with_a_class(data: Path, out: Path) -> Path:
    """A copy of a STAR file of RELION without the particles that have been in no class, and so have no pose."""
    lines = data.read_text().splitlines()
    header = next(line for line in lines if line.startswith("_rlnClassNumber"))
    place = int(header.split("#")[1]) - 1
    kept = [line for line in lines if "@" not in line or line.split()[place] != "0"]
    out.write_text("\n".join(kept) + "\n")
    return out


# ------------------------------------------------------------------------------ cryoDRGN


@dataclass(frozen=True)
class CryodrgnRun(Program):
    """``cryodrgn abinit --zdim 0``: a pretraining on random poses, three epochs of pose search, 27 of descent.

    Its sign is that of the images of RELION, which it inverts as it does its CTF: nothing is to be set.
    """

    executable: str

    @property
    def phases(self) -> tuple[Phase, ...]:
        n = self.task.n_particles
        return (
            Phase("pretraining", (min(n, 10_000),)),
            Phase("pose search", (n,) * 3),
            # An image at one pose, forward and backward: so is pretraining.
            Phase("descent", (n,) * 27, like="pretraining"),
        )

    def version(self) -> str:
        return first_line(self.executable, "--version")

    def last_step(self) -> int:
        epochs = [int(path.name.split(".")[1]) for path in self.folder.glob("weights.*.pkl")]
        whole = [n for n in epochs if (self.folder / f"pose.{n}.pkl").is_file()]
        return max(whole, default=-1) + 1

    def checkpoint(self) -> int:
        """Resumed after the last epoch of pose search, version 4.3.1 gives all particles the same pose."""
        step = self.last_step()
        return step - 1 if step == 4 else step

    def prepare(self) -> None:
        ctf = self.folder / "ctf.pkl"
        if ctf.is_file():
            return
        # Without this column it takes not 0 but NaN, and all that follows is NaN without a word.
        absent = [] if "_rlnPhaseShift" in self.task.stack.read_text() else ["--ps", "0"]
        command = [self.executable, "parse_ctf_star", str(self.task.stack), *absent, "-o", str(ctf)]
        subprocess.run(command, check=True, capture_output=True)

    def command(self) -> list[str]:
        task, step = self.task, self.checkpoint()
        resumed = ["--load", str(self.folder / f"weights.{step - 1}.pkl")] if step else []
        return [
            *(self.executable, "abinit", str(task.stack), "-o", str(self.folder), "--zdim", "0", "--no-amp"),
            *("--ctf", str(self.folder / "ctf.pkl"), "--datadir", str(task.stack.parent), "--seed", str(task.seed)),
            *("--max-threads", str(task.n_threads), "--checkpoint", "1", "--log-interval", "16", "--no-analysis"),
            *resumed,
        ]

    def place(self, log: Path) -> float:
        return cryodrgn_place(end_of(log), self.phases[0].images_of_steps[0])

    def poses(self) -> Path | None:
        step = self.last_step()
        if step < 2:  # those of pretraining are random
            return None
        return poses_in_boxes(self.folder / f"pose.{step - 1}.pkl", self.task.n_pixels, self.folder / "poses.pkl")

    def map(self) -> Path | None:
        step = self.last_step()
        return self.folder / f"reconstruct.{step - 1}.mrc" if step else None


def cryodrgn_place(printed: str, n_pretraining: int) -> float:
    """Epochs that cryoDRGN has done, that of pretraining among them, with the share of the present one.

    Examples
    --------
    >>> cryodrgn_place("# [Train Epoch: 2/30] [250/1000 particles]", 1000)
    2.25
    """
    found = [0.0]
    for epoch, done, n in re.findall(r"\[Train Epoch: (\d+)/\d+\] \[(\d+)/(\d+) particles\]", printed):
        found.append(int(epoch) + min(1.0, int(done) / (int(n) if int(epoch) else n_pretraining)))
    found += [int(epoch) + 1.0 for epoch in re.findall(r"Epoch: (\d+) finished", printed)]
    return max(found)


def poses_in_boxes(poses: Path, n_pixels: int, out: Path) -> Path:
    """A copy of the poses that ``abinit`` writes, with shifts as fractions of the box.

    So they are in all other files of cryoDRGN; ``abinit`` writes those that its ``translate_ht`` takes, in pixels.
    """
    with poses.open("rb") as file:
        rotations, shifts = pickle.load(file)
    with out.open("wb") as file:
        pickle.dump((np.asarray(rotations), np.asarray(shifts) / n_pixels), file)
    return out
