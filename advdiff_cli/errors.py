"""Errors that a user can fix, and exit codes."""

import os

EXIT_ERROR = 1
EXIT_PARTIAL = 3


class AdvdiffError(Exception):
    """A problem that a user can fix; the message says what is wrong, in which file, and what to do."""

    exit_code = EXIT_ERROR


class FileInUse(AdvdiffError):
    """Another process holds a file, which is not a sign of damage."""


class SomeInputsFailed(AdvdiffError):
    """Some inputs of a folder failed; each was named, and the others are done."""

    exit_code = EXIT_PARTIAL


class Stopped(BaseException):
    """A signal asked the process to stop; unfinished work can be resumed."""

    def __init__(self, signum: int) -> None:
        """Set the exit code to 128 + signum."""
        super().__init__(signum)
        self.exit_code = 128 + signum


def first_line(problem: Exception) -> str:
    """Return the first line of what an exception says, or its kind if it says nothing."""
    return (str(problem).strip() or type(problem).__name__).splitlines()[0]


def is_debugging() -> bool:
    """Return whether ADVDIFF_DEBUG=1 asks for tracebacks."""
    return os.environ.get("ADVDIFF_DEBUG") == "1"
