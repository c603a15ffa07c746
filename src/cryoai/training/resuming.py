"""A run that was stopped, by whatever, goes on where it was."""

from __future__ import annotations

import tomllib
from pathlib import Path

from cryoai.hardware import choose_device
from cryoai.runs import RunFolder
from cryoai.training.loop import carry_on, working_box
from cryoai.training.origin import Origin
from cryoai.training.refining import GivenInput, carry_on_refining
from cryoai.training.results import Reconstruction
from cryoai.training.session import work_on
from cryoai.training.settings import RefineSettings, Settings

__all__ = ["resume"]


def resume(run: str | Path) -> Reconstruction:
    """Go on with a run of :func:`reconstruct` or :func:`refine` from its last checkpoint, to its end.

    On the CPU with one thread the result is the same, bit for bit, as if the run had not been stopped.

    Raises
    ------
    InputError
        If there is nothing to go on with, or particles or settings are not those that the run began with.

    Examples
    --------
    >>> resume("runs/first").verdict.status         # doctest: +SKIP
    'solved'
    """
    folder = RunFolder.unfinished(Path(run))
    origin = Origin.read(folder)
    stack, values = origin.open(folder), tomllib.loads(origin.settings)
    if origin.command == "refine":
        refine_settings = RefineSettings.model_validate(values)
        given = GivenInput.of(stack, refine_settings)
        device, pause = choose_device(refine_settings.device), refine_settings.checkpoint_seconds
        with work_on(folder, device, pause) as session:
            return carry_on_refining(stack.keep_table(folder.input_particles), session, refine_settings, given)
    settings = Settings.model_validate(values)
    box, device = working_box(stack, settings), choose_device(settings.device)
    with work_on(folder, device, settings.checkpoint_seconds) as session:
        return carry_on(stack.keep_table(folder.input_particles), session, settings, box)
