"""Where the images are that a particle file names."""

from __future__ import annotations

from pathlib import Path

from cryoai.formats.files import is_file, shown

__all__ = ["find_image_file", "image_roots", "places_tried"]


def image_roots(table: Path, data_dir: Path | None) -> list[Path]:
    """The folders that the paths in a particle file may start from."""
    if data_dir is not None:
        return [data_dir]
    # RELION and cryoSPARC paths start at the project's root, which is some folder above the particle file.
    folder = table.resolve().parent
    return [folder, *folder.parents, Path.cwd()]


def find_image_file(name: str, roots: list[Path]) -> Path | None:
    """The file called ``name`` in a particle file; its folders do not count where the first root has it itself."""
    return next((candidate for candidate in _candidates(name, roots) if is_file(candidate)), None)


def places_tried(name: str, roots: list[Path]) -> str:
    """Where a file was looked for, in words."""
    candidates = _candidates(name, roots)
    above = " and the folders above" if len(roots) > 1 else ""
    places = (shown(str(candidate), 400) for candidate in (candidates[0], candidates[-1]))
    return " and ".join(dict.fromkeys(places)) + above


def _candidates(name: str, roots: list[Path]) -> list[Path]:
    return [root / name for root in roots] + [roots[0] / Path(name).name]
