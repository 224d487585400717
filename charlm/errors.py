"""What is not a fault of the program's, and words for it: one line that says what is wrong and what to do about it.

The command line prints that line without a traceback; every other exception is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Sequence


class InputError(ValueError):
    """Bad input, found before work begins. The exit code is 2."""


class RunStopped(RuntimeError):
    """What ends a run under way: a full disk, no memory left, a loss that is no number, a process that died.

    The exit code is 1, and what the run has kept stays good.
    """


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


def listed(names: Sequence[object], most: int = 10) -> str:
    """Return names as a text: the first ones, each shortened, and how many there are besides."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(shortened(str(name), 40) for name in names[:most]) + more


def shortened(text: str, longest: int) -> str:
    """Return a text, its end left out where it is longer than `longest` characters."""
    return text if len(text) <= longest else text[: longest - 3] + "..."
