"""What is not a fault of the program's, and words for it: one line that says what is wrong and what to do about it.

The command line prints that line without a traceback; every other exception is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import difflib
import signal
from collections.abc import Iterable, Sequence


class InputError(ValueError):
    """Bad input, found before work begins. The exit code is 2."""


class RunStopped(RuntimeError):
    """What ends a run under way: a full disk, no memory left, a loss that is no number, a process that died.

    The exit code is 1, and what the run has kept stays good.
    """


class Interrupted(SystemExit):
    """A signal ended a run or a sweep; the exit code is the usual one, 128 and the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal = signal.Signals(number)


class LibraryErrors:
    """Around calls of a library that reads the user's input: what it raises becomes an `InputError` of one line.

    For libraries that let through the exceptions of everything that they are made of.

    Args:
        what: could not be done.
        remedy: what to do about it.
    """

    def __init__(self, what: str, remedy: str) -> None:
        self._what = what
        self._remedy = remedy

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, InputError):
            raise InputError(f"{self._what}: {reason(error)}; {self._remedy}") from error


def reason(error: BaseException, longest: int = 300) -> str:
    """Return what another library's exception says, in one line of at most `longest` characters."""
    return shortened(" ".join(str(error).split()).rstrip(".") or type(error).__name__, longest)


def first_line(error: BaseException) -> str:
    """Return the first line of what an exception says: torch's go on with advice, and with a stack of C++ calls."""
    return str(error).partition("\n")[0] or type(error).__name__


def install(extra: str) -> str:
    """Return the command that installs what an extra of pyproject.toml names."""
    return f"pip install -c constraints.txt -e '.[{extra}]'"


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that was probably meant."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1)), None)


def listed(names: Sequence[object], most: int = 10) -> str:
    """Return names as a text: the first ones, each shortened, and how many there are besides."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(shortened(str(name), 40) for name in names[:most]) + more


def shortened(text: str, longest: int) -> str:
    """Return a text, its end left out where it is longer than `longest` characters."""
    return text if len(text) <= longest else text[: longest - 3] + "..."
