"""The settings of a run: validated, immutable, written to the run folder and read back from it.

Only the trainer and the command line know this module; all parts below take explicit arguments.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from cryoai.errors import InputError
from cryoai.symmetry.groups import PointGroup

__all__ = [
    "AmortizedSettings",
    "BootstrapSettings",
    "PlacementSettings",
    "Preset",
    "RefineSettings",
    "RefinementSettings",
    "Settings",
    "StageName",
    "describe",
]

StageName = Literal["bootstrap", "amortized", "refinement"]
Preset = Literal["auto", "paper"]
Positive = Annotated[int, Field(gt=0)]


def _canonical(symmetry: str) -> str:
    return PointGroup.named(symmetry).name


Symmetry = Annotated[str, AfterValidator(_canonical)]
# A run that goes on may do so from another working folder.
AbsolutePath = Annotated[Path, AfterValidator(Path.absolute)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class BootstrapSettings(_Frozen):
    """A low-resolution map from nothing, by annealed stochastic search."""

    n_starts: Annotated[int, Field(ge=1, le=16)] = 2
    """Random starts that are always made, in one half of the particles and the other by turns."""
    max_starts: Annotated[int, Field(ge=1, le=16)] = 6
    """More starts are made, up to this number and of three times the steps, while no two agree."""
    n_steps: Annotated[int, Field(ge=10)] = 200
    """Steps of a start."""
    batch_size: Positive = 200
    """Images of a step."""
    last_radius: Annotated[int, Field(ge=6, le=64)] = 16
    """Band limit at the end, in Fourier pixels: periods across the box."""
    n_rotations: Annotated[int, Field(ge=64)] = 4608
    """Rotations of the search grid."""
    max_images: Annotated[int, Field(ge=50)] = 20_000
    """Random images that the search may draw from; the others are not read."""


class AmortizedSettings(_Frozen):
    """The encoder and the implicit volume of CryoAI."""

    box: Annotated[int, Field(ge=32, le=256, multiple_of=2)] = 32
    """Side in pixels of the images that the encoder sees."""
    max_radius: Annotated[int, Field(ge=4, le=128)] = 12
    """Band limit of encoder, volume and loss, in Fourier pixels."""
    encoder: Literal["polar", "convolutional"] = "polar"
    """polar knows what an in-plane rotation is; convolutional is the published one."""
    encoder_input: Literal["matched", "plain"] = "matched"
    """What the encoder is shown: the image multiplied by its CTF and whitened, or the image."""
    encoder_width: Annotated[int, Field(ge=4, le=512)] = 96
    """Channels of a layer of the polar encoder, or of the first block of the convolutional one (64 as published)."""
    n_hypotheses: Annotated[int, Field(ge=1, le=64)] = 16
    """Poses proposed for an image: directions in the plane (polar: a power of two) or rotation heads."""
    symmetrization: Literal["none", "half-turn"] = "none"
    """half-turn asks the encoder about the image turned by 180 degrees too; to the polar one that is nothing new."""
    volume: Literal["fouriernet", "voxels"] = "fouriernet"
    """The implicit volume, or an explicit grid of densities."""
    volume_width: Annotated[int, Field(ge=16, le=1024)] = 256
    """Units of the layers of FourierNet; 256 as published."""
    volume_oversampling: Annotated[int, Field(ge=1, le=4)] = 1
    """Points per Fourier pixel of the lattice that slices of the volume are interpolated from."""
    n_starts: Annotated[int, Field(ge=1, le=16)] = 1
    """Independent starts; each gets a fifth of the steps, and the one that predicts the images best goes on."""
    n_steps: Positive = 3000
    """Optimizer steps."""
    wake_batch_size: Annotated[int, Field(ge=2)] = 32
    """Images of the data set in a step."""
    sleep_batch_size: Annotated[int, Field(ge=0)] = 96
    """Synthetic images of the current volume in a step; 0 for none."""
    wake_interval: Positive = 20
    """Every so many steps the images of the data set are looked at and the volume moves; synthetic ones always."""
    first_radius: Annotated[int, Field(ge=0, le=128)] = 0
    """Band limit of the first step; it grows to max_radius over the first half of the steps. 0 is max_radius."""
    learning_rate: Annotated[float, Field(gt=0, lt=1)] = 8e-3
    """Of the encoder; it rises over the first 5 % of the steps and falls as a cosine."""
    volume_learning_rate: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    """Of the volume, on the same schedule; the map of Bootstrap needs little change, and its frame none."""
    n_fit_steps: Annotated[int, Field(ge=0)] = 200
    """Steps that fit the volume to the map of Bootstrap, if there is one, before training."""
    max_shift_in_boxes: Annotated[float, Field(gt=0, le=0.5)] = 0.1
    """Bound on the shifts of the encoder, as a fraction of the box."""
    shift_std_in_boxes: Annotated[float, Field(ge=0, le=0.2)] = 0.02
    """Standard deviation of the shifts of synthetic images in each axis, as a fraction of the box."""


class PlacementSettings(_Frozen):
    """The first pose of every particle: the best of all that encoder and search propose."""

    n_rotations: Annotated[int, Field(ge=64)] = 4608
    """Rotations of the search grid."""
    n_iterations: Annotated[int, Field(ge=0, le=20)] = 3
    """Local refinement steps of each proposal at each of three band limits; 0 for none."""


class RefinementSettings(_Frozen):
    """Local refinement of every pose against the map of the particle's own half set."""

    max_rounds: Annotated[int, Field(ge=1, le=50)] = 10
    """Passes over all particles at most; it ends earlier when the resolution no longer grows."""
    n_iterations: Annotated[int, Field(ge=1, le=20)] = 3
    """Gauss-Newton steps of a particle in a round."""
    defocus_std_in_angstroms: Annotated[float, Field(ge=0, le=5000)] = 0.0
    """Standard deviation of the errors of the stated defocus: each particle's is refined then. 0 to leave it."""


class _OfEveryRun(_Frozen):
    box: Annotated[int, Field(ge=32, le=1024, multiple_of=2)] | None = None
    """Working box in pixels, to which the images are Fourier-cropped. Default: theirs, at most 128."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Of all randomness; bit for bit the same result needs one thread (OMP_NUM_THREADS=1) beside it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes a CUDA device if there is one."""
    max_faulty_share: Annotated[float, Field(ge=0, lt=1)] = 0.02
    """Images that are missing, not finite or constant are set aside; if more than this share is, the run stops."""
    contrast: Literal["auto", "bright", "dark"] = "auto"
    """Whether protein is bright or dark in the images; auto decides it from them."""
    cache: AbsolutePath | None = None
    """Folder that keeps the images at the working box for all runs on the same particles. See cryoai prepare."""
    checkpoint_seconds: Annotated[float, Field(ge=0, le=86400)] = 60.0
    """Work between two checkpoints, at least: with cryoai resume a stopped run loses no more than that."""

    def to_toml(self) -> str:
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))


class Settings(_OfEveryRun):
    """Everything that decides the result of a run, beside the particles."""

    stages: tuple[StageName, ...] = ("bootstrap", "amortized", "refinement")
    """Stages to run, in this order."""
    max_particles: Annotated[int, Field(ge=100)] = 50_000
    """Particles, drawn at random, that map and encoder are made from; the others are posed at the end, in one pass."""
    symmetry: Symmetry = "C1"
    """Point group of the molecule, Cn, Dn, T, O or I; imposed from Refinement on, once the map shows its axes."""
    bootstrap: BootstrapSettings = BootstrapSettings()
    amortized: AmortizedSettings = AmortizedSettings()
    placement: PlacementSettings = PlacementSettings()
    refinement: RefinementSettings = RefinementSettings()

    def checked(self) -> Settings:
        """These settings, if they fit together.

        Raises
        ------
        InputError
            If one does not fit another, with both named.
        """
        order = ("bootstrap", "amortized", "refinement")
        if self.stages != tuple(name for name in order if name in self.stages):
            raise InputError(f"setting stages: {' '.join(self.stages)}; each once and in the order {' '.join(order)}")
        if not {"bootstrap", "amortized"} & set(self.stages):
            raise InputError(
                "setting stages: bootstrap or amortized is needed; without either there is no map to start from"
            )
        if self.symmetry != "C1" and "refinement" not in self.stages:
            raise InputError(f"--symmetry {self.symmetry}: is imposed in refinement, which is not among the stages")
        n_starts, max_starts = self.bootstrap.n_starts, self.bootstrap.max_starts
        if max_starts < n_starts:
            raise InputError(f"setting bootstrap.max_starts: {max_starts}; at least n_starts, {n_starts}, is needed")
        radius, box = self.amortized.max_radius, self.amortized.box
        if radius > box // 2:
            raise InputError(
                f"setting amortized.max_radius: {radius}; at most half of the box, {box // 2}, is possible"
            )
        first = self.amortized.first_radius
        if first > radius:
            raise InputError(f"setting amortized.first_radius: {first}; at most max_radius, {radius}, is possible")
        n_hypotheses = self.amortized.n_hypotheses
        if self.amortized.encoder == "polar" and (n_hypotheses == 1 or n_hypotheses.bit_count() != 1):
            raise InputError(
                f"setting amortized.n_hypotheses: {n_hypotheses}; the polar encoder needs a power of two from 2 to 64"
            )
        return self

    @classmethod
    def assemble(cls, preset: Preset, file: Path | None, given: dict[str, Any]) -> Settings:
        """Settings of a preset, changed by those of a TOML file, changed by those ``given``.

        Raises
        ------
        InputError
            If a key is unknown, or a value out of range or unfit for another.
        """
        values = _merged(_PRESETS[preset], {} if file is None else _read_toml(file))
        try:
            settings = cls.model_validate(_merged(values, given))
        except ValidationError as error:
            raise describe(error) from None
        return settings.checked()


class RefineSettings(_OfEveryRun):
    """Everything that decides the result of a refinement of given poses, beside the particles."""

    symmetry: Symmetry = "C1"
    """Point group of the molecule, Cn, Dn, T, O or I, with its axes where RELION has them."""
    mask: AbsolutePath | None = None
    """Map that is 1 inside the molecule and 0 outside, at the box of the images or the working box. Default: found."""
    half_sets: Literal["file", "new"] | None = None
    """Those of the file, or new ones drawn at random. Default: those of the file where it has usable ones."""
    max_rounds: Annotated[int, Field(ge=1, le=50)] = 10
    """Passes over all particles at most; it ends earlier when the resolution no longer grows."""
    n_iterations: Annotated[int, Field(ge=1, le=20)] = 3
    """Gauss-Newton steps of a particle in a round."""
    defocus_std_in_angstroms: Annotated[float, Field(ge=0, le=5000)] = 0.0
    """Standard deviation of the errors of the stated defocus: each particle's is refined then. 0 to leave it."""


# The published method, with the defects of its released code mended: encoder and FourierNet from
# scratch, one head, symmetrized loss, no bootstrap, no synthetic images. The head is symmetrized over 16
# turns in the plane, which costs the polar encoder nothing, where the published one takes two.
_PRESETS: dict[Preset, dict[str, Any]] = {
    "auto": {},
    "paper": {
        "stages": ("amortized",),
        "amortized": {
            "sleep_batch_size": 0,
            "wake_batch_size": 64,
            "wake_interval": 1,
            "first_radius": 4,
            "n_starts": 4,
            "n_steps": 1500,
            "learning_rate": 3e-3,
            "volume_learning_rate": 3e-4,
        },
        "placement": {"n_iterations": 0},
    },
}


def describe(error: ValidationError) -> InputError:
    """The first fault of refused settings, in one line."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"]) or "settings"
    command = "refine" if error.title == RefineSettings.__name__ else "reconstruct"
    message = first["msg"].removeprefix("Value error, ")
    return InputError(f"setting {key}: {message}; see cryoai {command} --help")


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = _merged(result[key], value) if both else value
    return result


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"--settings {path}: no such file; give the settings.toml of a run") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise InputError(f"--settings {path}: not a TOML file ({error}); give the settings.toml of a run") from None
