"""Inference: poses for particles that the encoder has never seen, each with a confidence.

One streaming pass: an image is read, normalised, shown to the encoder, and the likeliest of the most
probable hypotheses under the map of the run is its pose. No image is read twice or kept. With local
refinement, those few that then do not fit are also searched for.

The confidence (:mod:`cryoai.confidence`) goes by the fit of image and prediction, the encoder's own
probability, and the lead over the next answer.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import roma
import safetensors
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from cryoai.alignment import FrameChange
from cryoai.bootstrap import BootstrapSchedule, Reference
from cryoai.confidence import RIGHT_IN_DEGREES, Confidence
from cryoai.encoder import EncoderArchitecture, PoseEncoder
from cryoai.errors import InputError
from cryoai.formats.mrc import read_map
from cryoai.formats.snapshots import write_tensors
from cryoai.fourier import FourierDisc
from cryoai.imaging import ImagingModel
from cryoai.model import CryoAI, Placing, matched_filter, unfiltered
from cryoai.noise import NoiseSpectrum
from cryoai.optics import Optics
from cryoai.particle_stack import Fault, ParticleStack
from cryoai.particles import ParticleBatch, Quarantine, stream_particles
from cryoai.poses import Poses, assign_poses, blank_poses
from cryoai.runs import RunFolder
from cryoai.search import Templates, search_poses
from cryoai.symmetry.groups import PointGroup, symmetric_distance_in_degrees
from cryoai.volumes import SampledVolume, VoxelVolume

__all__ = [
    "Inferred",
    "PosePredictor",
    "TrainedEncoder",
    "check_output",
    "encoder_inputs",
    "infer_file",
]

_BATCH = 1000
_N_SYNTHETIC = 6000
# Share of the particles whose pose was found that fit so badly that they lose confidence.
_WORST_FITS = 0.02
# A fit so many standard deviations from that of particles of the map calls for a search, if there is one.
_MISFIT = -2.5
# Of such a search, the best rotations that are judged beside the encoder's.
_SEARCHED = 4
_SURE, _FEW = 0.9, 0.05
# Of images that cannot be used, the share that is tolerated, and how many are named.
_MAX_FAULTY_SHARE, _NAMED = 0.02, 5
# A box may be smaller than that of the run by the rounding of an even number of pixels.
_ROUNDING_IN_PIXELS = 2.0

encoder_inputs = {"matched": matched_filter, "plain": unfiltered}
"""What an encoder can be shown, by name."""


@dataclass(frozen=True, eq=False)
class TrainedEncoder:
    """An encoder with all that it needs to know about the particles that it was trained on.

    Attributes
    ----------
    architecture, input, weights
        The network, what it is shown (a key of :data:`encoder_inputs`), and its parameters.
    n_pixels, pixel_size_in_angstroms, max_radius
        Box and band limit of the images that it sees.
    contrast_sign
        What the images were multiplied by.
    noise
        That whitened its input.
    residual_noise
        What the final map leaves unexplained.
    optics
        Optical parameters (m,) of some of its particles, at its box.
    shift_std_in_angstroms
        Of its synthetic particles, in each axis.
    fit_centre, fit_spread
        Median and deviation of the fit of its particles at their final poses; 0 and 1 if map and noise were exact.
    frame
        What brings its poses to the frame of the map; see :class:`~cryoai.model.CryoAI`.
    group
        Under which poses count as equal, in the frame of the map.
    """

    architecture: EncoderArchitecture
    input: Literal["matched", "plain"]
    weights: dict[str, Tensor]
    n_pixels: int
    pixel_size_in_angstroms: float
    max_radius: int
    contrast_sign: int
    noise: NoiseSpectrum
    residual_noise: NoiseSpectrum
    optics: Optics
    shift_std_in_angstroms: float
    fit_centre: float
    fit_spread: float
    frame: FrameChange
    group: PointGroup

    def save(self, path: Path) -> None:
        """Write everything to one safetensors file."""
        tensors = {f"encoder.{name}": value for name, value in self.weights.items()}
        tensors |= {f"optics.{name}": value for name, value in vars(self.optics).items()}
        tensors |= {"noise": self.noise.variance, "residual_noise": self.residual_noise.variance}
        tensors |= {"frame.rotation": self.frame.rotation, "frame.shift": self.frame.shift}
        tensors["symmetry_operators"] = self.group.operators
        about = {
            "architecture": asdict(self.architecture),
            "input": self.input,
            "n_pixels": self.n_pixels,
            "pixel_size_in_angstroms": self.pixel_size_in_angstroms,
            "max_radius": self.max_radius,
            "contrast_sign": self.contrast_sign,
            "shift_std_in_angstroms": self.shift_std_in_angstroms,
            "fit_centre": self.fit_centre,
            "fit_spread": self.fit_spread,
            "symmetry": self.group.name,
        }
        write_tensors(path, tensors, {"cryoai": json.dumps(about)})

    @classmethod
    def load(cls, path: Path) -> TrainedEncoder:
        """Read a file of :meth:`save`.

        Those of earlier versions say nothing of frame and symmetry: there was neither.

        Raises
        ------
        InputError
            If there is none, or it is none of ours.
        """
        if not path.is_file():
            raise InputError(f"{path.parent}: the run has no encoder ({path.name}); make one with stage amortized")
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                about = json.loads((file.metadata() or {})["cryoai"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return cls(
                architecture=EncoderArchitecture(**about.pop("architecture")),
                weights=_with_prefix(tensors, "encoder."),
                noise=NoiseSpectrum(tensors["noise"]),
                residual_noise=NoiseSpectrum(tensors["residual_noise"]),
                optics=Optics(**_with_prefix(tensors, "optics.")),
                frame=_frame_in(tensors),
                group=PointGroup(about.pop("symmetry", "C1"), tensors.get("symmetry_operators", torch.eye(3)[None])),
                **about,
            )
        except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}: not an encoder of this program ({error}); run reconstruct again") from None

    def build(self, disc: FourierDisc) -> PoseEncoder:
        """The network with its weights, ready to be asked."""
        encoder = self.architecture.build(disc, self.max_radius)
        encoder.load_state_dict(self.weights)
        return encoder.to(disc.device).eval()


def _with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _frame_in(tensors: dict[str, Tensor]) -> FrameChange:
    rotation, shift = tensors.get("frame.rotation", torch.eye(3)), tensors.get("frame.shift", torch.zeros(3))
    return FrameChange(rotation, mirrored=False, shift=shift)


# ------------------------------------------------------------------------------ prediction


@dataclass(frozen=True, eq=False)
class Inferred:
    """Poses (N,) and the probability (N,) that each is within 10° of the right one.

    Of the particles whose image could not be used (``faults``) both are zero.
    """

    poses: Poses
    confidence: Tensor
    faults: tuple[Fault, ...]


@dataclass(frozen=True, eq=False)
class PosePredictor:
    """A trained encoder before the map of its run."""

    trained: TrainedEncoder
    model: CryoAI
    volume: SampledVolume
    confidence: Confidence
    n_iterations: int
    templates: Templates | None

    @classmethod
    def of_run(cls, run: RunFolder, *, n_iterations: int, device: torch.device) -> PosePredictor:
        """Load the encoder and the map of a run, and learn from synthetic particles how sure to be.

        Parameters
        ----------
        n_iterations
            Steps of local refinement of every pose at each of three band limits, and a search for those
            that do not fit; 0 for neither.

        Raises
        ------
        InputError
            If the run has no encoder.
        """
        trained = TrainedEncoder.load(run.encoder_weights)
        disc = FourierDisc.of_box(trained.n_pixels, device=device)
        imaging = ImagingModel(disc, trained.pixel_size_in_angstroms, trained.max_radius)
        density = torch.from_numpy(read_map(run.map).density).to(device)
        reference = Reference(density, trained.max_radius, trained.noise).at_box(trained.n_pixels)
        model = CryoAI(trained.build(disc), VoxelVolume(reference.density), imaging, encoder_inputs[trained.input])
        model = model.to(device).moved(trained.frame)
        blank = Confidence(torch.zeros(0), torch.zeros(0), _WORST_FITS)
        volume = reference.sampled()
        extent = trained.n_pixels * trained.pixel_size_in_angstroms
        templates = Templates.of(volume, BootstrapSchedule().trials(extent, device), imaging) if n_iterations else None
        bare = cls(trained, model.eval(), volume, blank, n_iterations, templates)
        rehearsed, right = bare._rehearse(_N_SYNTHETIC, seed=0)
        learned = Confidence.learn(_features(rehearsed), rehearsed.fit, right, worst=_WORST_FITS)
        return replace(bare, confidence=learned)

    def place(self, batch: ParticleBatch) -> Placing:
        """The pose of each of the particles, and what speaks for it; the fit on the scale of synthetic ones."""
        return self._place(batch, self.trained.fit_centre, self.trained.fit_spread)

    def _place(self, batch: ParticleBatch, fit_centre: float, fit_spread: float) -> Placing:
        noise, imaging = self._on_device(self.trained.noise), self.model.imaging
        place = functools.partial(
            self.model.place, volume=self.volume, noise=noise, n_iterations=self.n_iterations, group=self.trained.group
        )
        placing = place(batch)
        misfits = placing.fit < fit_centre + _MISFIT * fit_spread
        if self.templates is not None and bool(misfits.any()):
            left = batch[misfits]
            found = search_poses(left, self.templates, imaging, noise.precision(imaging), _SEARCHED).poses
            placing = placing.replaced(misfits, place(left, others=found))
        return replace(placing, fit=(placing.fit - fit_centre) / fit_spread)

    def infer(
        self,
        stack: ParticleStack,
        *,
        max_faulty_share: float = 0.0,
        progress: Callable[[int], object] = lambda _n_done: None,
    ) -> Inferred:
        """Pose all particles of a stack.

        Raises
        ------
        InputError
            If the pixels of the images are too coarse, their box is smaller than that of the run, or more than
            the given share of them is not finite or constant.
        """
        cpu = torch.device("cpu")
        poses, confidence = blank_poses(stack.n_particles, cpu), torch.zeros(stack.n_particles)
        quarantine = Quarantine(stack, max_faulty_share)
        for batch in self._stream(stack, quarantine):
            placing = self.place(batch)
            rows = batch.indices.cpu()
            assign_poses(poses, rows, placing.poses.to(cpu))
            confidence[rows] = self.confidence(_features(placing), placing.fit).cpu()
            progress(int(rows[-1]) + 1)
        return Inferred(poses, confidence, tuple(quarantine.found))

    def _stream(self, stack: ParticleStack, quarantine: Quarantine) -> Iterator[ParticleBatch]:
        trained = self.trained
        extent = trained.n_pixels * trained.pixel_size_in_angstroms
        pixel_size = stack.pixel_size_in_angstroms
        path = stack.table.path
        if pixel_size * trained.n_pixels > extent + 1e-3:
            raise InputError(
                f"{path}: pixels of {pixel_size:g} Å, but the encoder looks at {trained.pixel_size_in_angstroms:g} Å; "
                "information would be lost: give images of that pixel size or finer"
            )
        if stack.n_pixels * pixel_size < extent - _ROUNDING_IN_PIXELS * pixel_size:
            raise InputError(
                f"{path}: a box of {stack.n_pixels * pixel_size:.0f} Å, but the run's images have {extent:.0f} Å; "
                f"extract with a box of at least {extent / pixel_size:.0f} pixels"
            )
        return stream_particles(
            stack,
            trained.n_pixels,
            extent_in_angstroms=extent,
            sign=trained.contrast_sign,
            batch_size=_BATCH,
            quarantine=quarantine,
            device=self.model.imaging.disc.device,
        )

    def _on_device(self, noise: NoiseSpectrum) -> NoiseSpectrum:
        return NoiseSpectrum(noise.variance.to(self.model.imaging.disc.device))

    @torch.no_grad()
    def _rehearse(self, n: int, seed: int) -> tuple[Placing, Tensor]:
        """Place synthetic particles of the map; the placings (n,), and which (n,) are right."""
        generator = torch.Generator().manual_seed(seed)
        imaging, device = self.model.imaging, self.model.imaging.disc.device
        deviation = (self._on_device(self.trained.residual_noise).variance[imaging.shells] / 2).sqrt()
        placings, right = [], []
        for rows in torch.randint(len(self.trained.optics), (n,), generator=generator).split(_BATCH):
            optics = self.trained.optics[rows].to(device)
            shifts = self.trained.shift_std_in_angstroms * torch.randn(len(rows), 2, generator=generator)
            truth = Poses(roma.random_rotmat(len(rows), generator=generator), shifts).to(device)
            clean = imaging.predict(self.volume, truth, optics)
            noise = torch.view_as_complex(torch.randn(*clean.shape, 2, generator=generator)).to(device)
            # Of these map and noise are exact.
            placing = self._place(ParticleBatch(rows, clean + deviation * noise, optics), 0.0, 1.0)
            distance = symmetric_distance_in_degrees(placing.poses.rotations, truth.rotations, self.trained.group)
            placings.append(placing)
            right.append(distance < RIGHT_IN_DEGREES)
        return Placing.cat(placings), torch.cat(right)


def _features(placing: Placing) -> Tensor:
    """What a confidence goes by (B, 6), each of order one."""
    fit = placing.fit.double().clamp(-30, 10) / 5
    probability = torch.logit(placing.probability.double(), eps=1e-4) / 3
    lead = placing.lead.double().clamp_min(0).sqrt() / 3
    one = torch.ones_like(fit)
    return torch.stack([one, fit, probability, lead, fit.square(), fit * probability], dim=-1)


def check_output(source: Path, out: Path) -> None:
    """See that particles can be written, before anything else is done.

    Raises
    ------
    InputError
        If the output is the input, is no STAR file, or cannot be there.
    """
    if out.resolve() == source.resolve():
        raise InputError(f"{out}: is the input; give another file to write")
    if out.suffix != ".star":
        raise InputError(f"{out}: particles are written to STAR files; give a name that ends in .star")
    if out.is_dir() or not out.parent.is_dir():
        fault = "is a folder" if out.is_dir() else f"there is no folder {out.parent}"
        raise InputError(f"{out}: {fault}; give a file to write in a folder that exists")


def infer_file(
    predictor: PosePredictor,
    source: Path,
    out: Path,
    *,
    data_dir: Path | None = None,
    ctf: Path | None = None,
    passthrough: Sequence[Path] = (),
) -> str:
    """Pose the particles of a file into a STAR file; returns a line that says what came of it.

    Raises
    ------
    InputError
        If the particles cannot be read or do not suit the predictor, or the output would replace the input.
    """
    check_output(source, out)
    started = time.monotonic()
    stack = ParticleStack.open(source, data_dir=data_dir, ctf=ctf, passthrough=passthrough)
    with _progress_bar() as bar:
        task = bar.add_task(source.name, total=stack.n_particles)
        found = predictor.infer(
            stack,
            max_faulty_share=_MAX_FAULTY_SHARE,
            progress=lambda n_done: bar.update(task, completed=n_done),
        )
    merit = {"rlnParticleFigureOfMerit": found.confidence.double().numpy()}
    stack.write(out, found.poses, merit, found.faults)
    rate = stack.n_particles / (time.monotonic() - started)
    sure = float((found.confidence > _SURE).float().mean())
    line = f"{out}: {stack.n_particles:,} particles posed, {rate:,.0f} a second; {sure:.0%} with a confidence over 0.9"
    if sure < _FEW:
        line += " (few: are these particles of the run's molecule, and of its contrast?)"
    if found.faults:
        line += f"; {len(found.faults)} images set aside: " + "; ".join(map(str, found.faults[:_NAMED]))
    return line


def _progress_bar() -> Progress:
    console = Console()
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )
