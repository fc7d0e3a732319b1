"""Work on files that lie, in a process of little memory and time, so that a crash, a bomb or a hang is seen."""

import os
import resource
import signal
import traceback

MEMORY = 4 << 30  # bytes beyond what this process has
BUSY, WAITING = 30, 300  # seconds of the processor, and of the clock, which other processes stretch


def ends(work, memory=MEMORY):
    """Return what `work` returns in a process with little memory and time, or how that process died."""
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        try:
            signal.alarm(WAITING)
            resource.setrlimit(resource.RLIMIT_CPU, (BUSY, BUSY + 1))
            resource.setrlimit(resource.RLIMIT_AS, (_memory() + memory, resource.RLIM_INFINITY))
            told = work()
        except BaseException:
            told = traceback.format_exc()
        os.write(writing, told.encode()[-4000:])
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        told = pipe.read()
    _, status = os.waitpid(child, 0)
    return f"died of signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else told


def _memory():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()
