"""A warm `advdiff` for scripts that run many commands: each is a fork of a process that has imported torch already.

`python warm.py serve SOCKET` waits; `client(SOCKET)` is the text of an `advdiff` to be put on the PATH. A fork gets the
caller's streams, folder and environment, and runs the same main().
"""

import importlib
import json
import os
import pkgutil
import signal
import socket
import sys

import advdiff_cli

CLIENT = """#!{python} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as call:
    call.connect({path!r})
    told = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(call, [len(told).to_bytes(8, "big")], [0, 1, 2])
    call.sendall(told)
    sys.exit(int(call.makefile().read()))
"""


def client(path):
    return CLIENT.format(python=sys.executable, path=str(path))


def serve(path):
    ours = (m.name for m in pkgutil.walk_packages(advdiff_cli.__path__, "advdiff_cli.") if "__main__" not in m.name)
    for name in ("matplotlib.pyplot", "scipy.optimize", "skimage.metrics", *ours):
        importlib.import_module(name)  # for the forks to find
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for a fork
    with socket.socket(socket.AF_UNIX) as waiting:
        waiting.bind(path)
        waiting.listen()
        while True:
            call, _ = waiting.accept()
            size, streams, _, _ = socket.recv_fds(call, 8, 3)
            told = call.makefile("rb").read(int.from_bytes(size, "big"))
            if os.fork() == 0:
                waiting.close()
                os._exit(run(call, told, streams))
            for fd in streams:
                os.close(fd)
            call.close()


def run(call, told, streams):
    """Run one command in this process, and tell the caller how it ended."""
    arguments, folder, environment = json.loads(told)
    for fd, stream in enumerate(streams):
        os.dup2(stream, fd)
    sys.stdout, sys.stderr = (open(fd, "w", closefd=False) for fd in (1, 2))  # noqa: SIM115 (a new process has them)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["advdiff", *arguments]
    from advdiff_cli.main import main

    try:
        main()
        code = 0
    except SystemExit as e:
        code = e.code or 0
    except BaseException as e:
        print(repr(e), file=sys.stderr)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    call.sendall(str(code).encode())
    return 0


if __name__ == "__main__":
    serve(sys.argv[2])
