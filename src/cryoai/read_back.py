"""Whether images at the poses that a file says give the map of a run again.

That is what makes an exported file right: a wrong sign, a wrong unit or images of other particles cannot pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cryoai.contrast import PowerOfGroups
from cryoai.errors import InputError
from cryoai.formats.mrc import read_map
from cryoai.fourier import FourierDisc, fourier_shell_correlation, n_shells_above
from cryoai.half_maps import HalfMaps
from cryoai.imaging import ImagingModel
from cryoai.particle_stack import ParticleStack
from cryoai.particles import ParticleBatch, Quarantine, stream_particles
from cryoai.poses import Poses
from cryoai.reconstruction import HalfSets
from cryoai.runs import RunFolder
from cryoai.symmetry.averaging import symmetrized_half_sets
from cryoai.symmetry.groups import PointGroup
from cryoai.validation.correlation import correlate_half_maps

__all__ = ["ReadBack", "read_back"]

_ENOUGH_IMAGES = 20_000
_BATCH = 256
# Some of the images make a noisier map than all of them. Shells are judged as far as this correlation is to be
# expected of the two, so that what is missing from it is a fault; where that is less than so much of the resolved
# shells, all images are taken.
_EXPECTED_FSC = 0.99
_LEAST_SHARE_OF_SHELLS = 1 / 3


@dataclass(frozen=True)
class ReadBack:
    """What came of reading an exported file back.

    Attributes
    ----------
    n_images
        So many, evenly spread over the file, were reconstructed at their poses.
    worst_fsc
        The lowest correlation of their map with that of the run, inside its mask, in any shell up to
        ``period_in_angstroms``.
    period_in_angstroms
        The resolution of the run, or as far as so many images can be expected to show the same map.
    worst_fsc_of_same
        The same, up to the resolution of the run, with the map of the same images at their poses in the run; None
        where that was not made.
    """

    n_images: int
    worst_fsc: float
    period_in_angstroms: float
    worst_fsc_of_same: float | None


def read_back(
    stack: ParticleStack,
    run: RunFolder,
    *,
    contrast_sign: int,
    n_particles_of_run: int,
    poses_of_run: Poses | None = None,
    device: torch.device | str = "cpu",
) -> ReadBack:
    """Reconstruct particles at the poses of their file, and compare that with the map of the run that they are of.

    Parameters
    ----------
    contrast_sign
        +1 where protein is bright in the images, -1 where it is dark.
    n_particles_of_run
        From which its map was made; the file may hold some of them only.
    poses_of_run
        (N,), what the run says of the particles in the file; for a second comparison, which others do not disturb.

    Raises
    ------
    InputError
        If the file has no poses, no image can be used, or a map or the settings of the run are not there.
    """
    known = _Maps.of_run(run, device)
    n_all = stack.n_particles
    n = min(_ENOUGH_IMAGES, n_all)
    if _n_judged_shells(known.halves, n_particles_of_run / n) < _LEAST_SHARE_OF_SHELLS * max(
        1, known.halves.n_resolved_shells
    ):
        n = n_all
    rows = torch.linspace(0, n_all - 1, n, dtype=torch.float64).long()
    chosen, poses = stack.take(rows), stack.poses
    if poses is None:
        raise InputError(f"{stack.table.path}: no poses; give a file that has them")
    again, n_used = _reconstructed(chosen, poses[rows], known, contrast_sign)
    if not n_used:
        raise InputError(f"{stack.table.path}: none of its images can be used any more; see cryoai check")
    n_shells = max(1, _n_judged_shells(known.halves, n_particles_of_run / n_used))
    of_same = None
    if poses_of_run is not None:
        same, _ = _reconstructed(chosen, poses_of_run[rows], known, contrast_sign)
        of_same = known.worst_fsc(again, same, max(1, known.halves.n_resolved_shells))
    worst = known.worst_fsc(again, known.map, n_shells)
    return ReadBack(n_used, worst, known.extent_in_angstroms / n_shells, of_same)


@dataclass(frozen=True, eq=False)
class _Maps:
    """The maps of a run, and the symmetry that they were given."""

    map: Tensor
    halves: HalfMaps
    extent_in_angstroms: float
    group: PointGroup

    @classmethod
    def of_run(cls, run: RunFolder, device: torch.device | str) -> _Maps:
        stored = [read_map(path) for path in (run.map, *run.half_maps, run.mask)]
        if len({one.density.shape for one in stored}) > 1:
            raise InputError(f"{run.path}: its maps are of different sizes; restore those that the run wrote")
        density, first, second, mask = (torch.from_numpy(one.density).to(device) for one in stored)
        pixel_size = stored[0].pixel_size_in_angstroms
        halves = HalfMaps(first, second, mask, correlate_half_maps(first, second, mask, pixel_size, seed=0))
        return cls(density, halves, len(density) * pixel_size, PointGroup.named(run.symmetry))

    def worst_fsc(self, first: Tensor, second: Tensor, n_shells: int) -> float:
        """The lowest correlation of two maps (n, n, n) inside the mask, in shells 1 to ``n_shells``."""
        mask = self.halves.mask
        return float(fourier_shell_correlation(first * mask, second * mask)[1 : n_shells + 1].min())


@torch.no_grad()
def _reconstructed(stack: ParticleStack, poses: Poses, known: _Maps, sign: int) -> tuple[Tensor, int]:
    """The map (n, n, n) of images at poses (N,), filtered as that of the run, and how many could be used."""
    n_pixels, device = len(known.map), known.map.device
    disc = FourierDisc.of_box(n_pixels, device=device)
    # A little more than the map holds: what is inserted spreads to its neighbours.
    radius = min(disc.max_radius, known.halves.n_resolved_shells + 2)
    imaging = ImagingModel(disc, known.extent_in_angstroms / n_pixels, radius)
    precision = (imaging.shells > 0).float()
    scales = _contrast_scales(stack, known, disc)
    sums, n_used = HalfSets.empty(n_pixels, device=device), 0
    for batch in _batches(stack, known, sign):
        rows = batch.indices.cpu()
        optics = replace(batch.optics, contrast_scale=scales[rows].to(device))
        scaled = ParticleBatch(batch.indices, batch.coefficients, optics)
        sums.sums[0].add(scaled, poses[rows].to(device), imaging, precision)
        n_used += len(batch)
    return known.halves.combined(symmetrized_half_sets(sums, known.group)), n_used


def _contrast_scales(stack: ParticleStack, known: _Maps, disc: FourierDisc) -> Tensor:
    """Strength (N,) of the signal in each optics group, as the run measures it; one look at all images."""
    group = stack.optics_group
    if int(group.max()) == 0:
        return torch.ones(len(group))
    power = PowerOfGroups(group, disc)
    for batch in _batches(stack, known, 1):
        power.add(batch.indices, batch.coefficients, batch.optics)
    return power.scales()


def _batches(stack: ParticleStack, known: _Maps, sign: int) -> Iterator[ParticleBatch]:
    """All usable images of a stack at the working box of the run."""
    return stream_particles(
        stack,
        len(known.map),
        extent_in_angstroms=known.extent_in_angstroms,
        sign=sign,
        batch_size=_BATCH,
        quarantine=Quarantine(stack, 1.0),
        device=known.map.device,
    )


def _n_judged_shells(half_maps: HalfMaps, all_over_used: float) -> int:
    """Shells up to the resolution of the run, or the first one, in which some of its images should show its map.

    With ``C`` the FSC of the map of all images with a perfect one, the noise in it is ``x = (1 - C) / C`` of the
    signal; in the map of the part it is more by the factor ``all_over_used``. The part's noise is in both, so that
    their correlation is ``sqrt((1 + x) / (1 + x all / used))``.
    """
    half = half_maps.fsc.double().clamp(1e-6, 1)
    whole = 2 * half / (1 + half)
    noise = (1 - whole) / whole
    expected = ((1 + noise) / (1 + noise * all_over_used)).sqrt()
    return min(max(1, half_maps.n_resolved_shells), n_shells_above(expected, _EXPECTED_FSC))
