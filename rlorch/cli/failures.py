"""What a failed command says, and its exit code.

A failure of one task cancels its siblings and leaves as nested ExceptionGroups; the user is shown the leaves. What
the user can fix is one message and exit code 2; any other error of rlorch is one message and 1; everything else is a
bug and keeps its traceback. `RLORCH_DEBUG=1` shows every traceback.
"""

import asyncio
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import TextIO

from rlorch.errors import RlorchError, UserError

FAILED, WRONG_INPUT, INTERRUPTED, BROKEN_PIPE = 1, 2, 130, 141


class Interrupted(BaseException):
    """A run ended early because a signal asked for it. `code` is the exit code, 128 + the signal's number."""

    def __init__(self, message: str, code: int = INTERRUPTED) -> None:
        super().__init__(message)
        self.code = code


def guarded(command: Callable[[], int | None], *, stderr: TextIO | None = None) -> int:
    """Run a command; its exit code, with whatever went wrong said on stderr."""
    out = stderr or sys.stderr
    try:
        return command() or 0
    except BrokenPipeError:
        # The reader of our output is gone; without this the interpreter complains once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except Interrupted as interruption:
        print(str(interruption), file=out)
        return interruption.code
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("interrupted", file=out)
        return INTERRUPTED
    except SystemExit:
        raise
    except BaseException as error:
        return say(error, out)


def say(error: BaseException, out: TextIO) -> int:
    """Print the root causes of `error`; the exit code they mean."""
    causes = root_causes(error)
    if any(isinstance(cause, KeyboardInterrupt | asyncio.CancelledError) for cause in causes) and len(causes) == 1:
        print("interrupted", file=out)
        return INTERRUPTED
    if os.environ.get("RLORCH_DEBUG", "") not in ("", "0"):
        traceback.print_exception(error, file=out)
    for cause in causes:
        print(_message(cause), file=out)
    for note in dict.fromkeys(_notes(error)):
        print(note, file=out)
    return WRONG_INPUT if any(isinstance(cause, UserError) for cause in causes) else FAILED


def root_causes(error: BaseException) -> list[BaseException]:
    """The leaves of nested exception groups, equal ones once; what the user can fix comes first."""
    leaves: dict[tuple[type[BaseException], str], BaseException] = {}
    for leaf in _leaves(error):
        leaves.setdefault((type(leaf), str(leaf)), leaf)
    found = list(leaves.values())
    if any(not isinstance(leaf, asyncio.CancelledError) for leaf in found):
        found = [leaf for leaf in found if not isinstance(leaf, asyncio.CancelledError)]
    return sorted(found, key=lambda leaf: not isinstance(leaf, UserError))


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error


def _notes(error: BaseException) -> Iterator[str]:
    yield from getattr(error, "__notes__", ())
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _notes(inner)


def _message(cause: BaseException) -> str:
    if isinstance(cause, UserError):
        return f"error: {cause}"
    if isinstance(cause, RlorchError):
        return f"error: {type(cause).__name__}: {cause}"
    trace = "".join(traceback.format_exception(cause)).rstrip()
    return f"{trace}\nerror: {type(cause).__name__}: {cause}"
