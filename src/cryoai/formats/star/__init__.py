"""RELION STAR files to and from the particle table; what is not understood is carried through."""

from cryoai.formats.star.reading import read_star, read_star_poses
from cryoai.formats.star.writing import rewrite_star, write_star

__all__ = ["read_star", "read_star_poses", "rewrite_star", "write_star"]
