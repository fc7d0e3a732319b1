"""What a user can fix, and how a process may end."""

EXIT_ERROR = 1
EXIT_PARTIAL = 3


class AdvdiffError(Exception):
    """A problem a user can fix; the message says what, which file, and what to do."""

    exit_code = EXIT_ERROR


class SomeInputsFailed(AdvdiffError):
    """Some inputs of a folder failed; each was named and the rest are done."""

    exit_code = EXIT_PARTIAL


class Stopped(BaseException):
    """A signal asked the process to stop; work in progress stays resumable."""

    def __init__(self, signum: int) -> None:
        """Remember `signum`: the exit code is 128 + signum."""
        super().__init__(signum)
        self.exit_code = 128 + signum
