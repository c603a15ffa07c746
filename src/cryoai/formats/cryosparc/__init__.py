"""cryoSPARC datasets (.cs) to and from the particle table; what is not understood is carried through."""

from cryoai.formats.cryosparc.dataset import is_cryosparc
from cryoai.formats.cryosparc.reading import read_cryosparc, read_cryosparc_poses
from cryoai.formats.cryosparc.writing import rewrite_cryosparc, write_cryosparc, write_cryosparc_group

__all__ = [
    "is_cryosparc",
    "read_cryosparc",
    "read_cryosparc_poses",
    "rewrite_cryosparc",
    "write_cryosparc",
    "write_cryosparc_group",
]
