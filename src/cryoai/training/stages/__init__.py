"""The stages of a reconstruction, each an object with the same small interface."""

from cryoai.training.stages.amortized import Amortized
from cryoai.training.stages.base import Estimate, Metrics, ParticlePoses, Stage
from cryoai.training.stages.bootstrap import AGREEMENT_OF_EQUAL_MAPS, Bootstrap
from cryoai.training.stages.completion import Completion
from cryoai.training.stages.contest import Contest
from cryoai.training.stages.placement import Placement, trial_poses
from cryoai.training.stages.refinement import Refinement

__all__ = [
    "AGREEMENT_OF_EQUAL_MAPS",
    "Amortized",
    "Bootstrap",
    "Completion",
    "Contest",
    "Estimate",
    "Metrics",
    "ParticlePoses",
    "Placement",
    "Refinement",
    "Stage",
    "trial_poses",
]
