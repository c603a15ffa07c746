"""The command line: a table of verbs."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable

from cyclopts import App, CycloptsError
from pydantic import ValidationError

from cryoai import __version__
from cryoai.commands.checking import check
from cryoai.commands.comparing import compare_results, flip_hand_of_run
from cryoai.commands.exporting import export
from cryoai.commands.judging import evaluate, info
from cryoai.commands.preparing import prepare_images
from cryoai.commands.refining import refine_particles
from cryoai.commands.running import infer, reconstruct_particles, resume_run
from cryoai.commands.simulating import demo, simulate_particles
from cryoai.errors import InputError, RunFailedError
from cryoai.formats.files import shown
from cryoai.interruption import InterruptedRunError
from cryoai.training.settings import describe

__all__ = ["app", "main"]

app = App(
    name="cryoai",
    help=(
        "Ab initio cryo-EM reconstruction: from particle images with unknown orientations to a map, half maps "
        "and poses.\n\nStart with: cryoai demo"
    ),
    version=__version__,
    help_format="plaintext",
    suppress_keyboard_interrupt=False,  # main has a word to say
)

_LONGEST_MESSAGE = 2000
_VERBS: dict[str, Callable[..., int | None]] = {
    "demo": demo,
    "simulate": simulate_particles,
    "check": check,
    "prepare": prepare_images,
    "reconstruct": reconstruct_particles,
    "refine": refine_particles,
    "resume": resume_run,
    "infer": infer,
    "evaluate": evaluate,
    "compare": compare_results,
    "flip-hand": flip_hand_of_run,
    "export": export,
    "info": info,
}
for _name, _command in _VERBS.items():
    app.command(_command, name=_name)


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit status.

    0 done, 1 the run failed, 2 bad input or usage, 3 an ambiguous result, 128 and its number after a signal.
    """
    tokens = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in tokens
    if debug:
        tokens.remove("--debug")
    try:
        status = app(tokens, exit_on_error=False, print_error=False, result_action="return_value")
    except (InputError, CycloptsError) as error:
        return _fail(describe(error.__cause__) if isinstance(error.__cause__, ValidationError) else error, 2, debug)
    except RunFailedError as error:
        return _fail(error, 1, debug)
    except PermissionError as error:
        return _fail(InputError(f"{error.filename}: no permission to write; give another place"), 2, debug)
    except OSError as error:
        return _fail(RunFailedError(f"{error.filename or 'input or output'}: {error.strerror}"), 1, debug)
    except InterruptedRunError as error:
        print(f"cryoai: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print("cryoai: stopped", file=sys.stderr)
        return 130
    return status if isinstance(status, int) else 0


def _fail(error: Exception, status: int, debug: bool) -> int:
    if debug:
        traceback.print_exception(error)
    message = shown(" ".join(str(error).split()), _LONGEST_MESSAGE)
    print(f"cryoai: error: {message}", file=sys.stderr)
    return status
