"""RELION STAR files to and from the particle table; what is not understood is carried through."""

from cryoai.formats.star.reading import read_star
from cryoai.formats.star.writing import rewrite_star, write_star

__all__ = ["read_star", "rewrite_star", "write_star"]
