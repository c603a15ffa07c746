"""The stages of a reconstruction, each an object with the same small interface."""

from cryoai.training.stages.amortized import Amortized
from cryoai.training.stages.axes import Axes
from cryoai.training.stages.base import Controls, Estimate, Metrics, ParticlePoses, Stage, StartAgreement
from cryoai.training.stages.blocks import BlockPosing
from cryoai.training.stages.bootstrap import Bootstrap
from cryoai.training.stages.completion import Completion
from cryoai.training.stages.contest import Contest
from cryoai.training.stages.placement import Placement, trial_poses
from cryoai.training.stages.refinement import Refinement
from cryoai.training.stages.rehearsal import Rehearsal
from cryoai.training.stages.trouble import NotedMetrics

__all__ = [
    "Amortized",
    "Axes",
    "BlockPosing",
    "Bootstrap",
    "Completion",
    "Contest",
    "Controls",
    "Estimate",
    "Metrics",
    "NotedMetrics",
    "ParticlePoses",
    "Placement",
    "Refinement",
    "Rehearsal",
    "Stage",
    "StartAgreement",
    "trial_poses",
]
