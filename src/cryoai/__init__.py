"""Ab initio cryo-EM reconstruction by amortized inference.

**Particles** come from disk with their **optics**; each becomes a vector of Fourier coefficients. An
**encoder** proposes **poses**. The **volume** is asked for the central **slice** at each pose;
**imaging** turns slices into predicted images. A **loss** picks the best hypothesis, and its gradient
moves encoder and volume. **Refinement** polishes each pose, **reconstruction** inverts the poses into
half maps, **evaluation** judges them.

>>> import cryoai
>>> particles = cryoai.ParticleStack.open("particles.star")     # doctest: +SKIP
>>> result = cryoai.reconstruct(particles, run="runs/first")    # doctest: +SKIP
>>> result.resolution_in_angstroms                              # doctest: +SKIP
"""

__version__ = "0.1.0"

from cryoai.alignment import FrameChange, align_maps, align_poses
from cryoai.checks import check_particles
from cryoai.comparison import compare
from cryoai.encoder import ConvolutionalEncoder, PolarEncoder
from cryoai.errors import InputError, RunFailedError
from cryoai.evaluation import map_errors, pose_errors
from cryoai.export import export_run
from cryoai.formats.mrc import read_map, write_map
from cryoai.fourier import FourierDisc, fourier_shell_correlation
from cryoai.hand import flip_hand
from cryoai.imaging import ImagingModel
from cryoai.model import CryoAI
from cryoai.optics import Optics, contrast_transfer_function
from cryoai.particle_stack import ParticleStack
from cryoai.pose_files import read_poses
from cryoai.poses import Poses
from cryoai.reconstruction import ReconstructionSums
from cryoai.refinement import refine_poses
from cryoai.simulation import protein_like_phantom, simulate
from cryoai.training.loop import reconstruct
from cryoai.training.refining import refine
from cryoai.training.results import Reconstruction
from cryoai.training.resuming import resume
from cryoai.training.settings import RefineSettings, Settings
from cryoai.volumes import FourierNetVolume, SampledVolume, VoxelVolume

__all__ = [
    "ConvolutionalEncoder",
    "CryoAI",
    "FourierDisc",
    "FourierNetVolume",
    "FrameChange",
    "ImagingModel",
    "InputError",
    "Optics",
    "ParticleStack",
    "PolarEncoder",
    "Poses",
    "Reconstruction",
    "ReconstructionSums",
    "RefineSettings",
    "RunFailedError",
    "SampledVolume",
    "Settings",
    "VoxelVolume",
    "align_maps",
    "align_poses",
    "check_particles",
    "compare",
    "contrast_transfer_function",
    "export_run",
    "flip_hand",
    "fourier_shell_correlation",
    "map_errors",
    "pose_errors",
    "protein_like_phantom",
    "read_map",
    "read_poses",
    "reconstruct",
    "refine",
    "refine_poses",
    "resume",
    "simulate",
    "write_map",
]
