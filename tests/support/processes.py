"""Runs programs as their user does: a process, what it prints and how it ends.

To import torch takes seconds, so `run` has a process that did so and is forked for each program:
this file, run as a program. It has computed nothing, so that a program may still choose the
instruction set. Where the start itself matters (memory, an old torch) a test starts Python;
`environment` gives it the package that is being tested, wherever that was imported from, and this
folder's `support`.
"""

import atexit
import functools
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # `bench` is not installed

SECONDS = 300  # after which a program is killed


def environment(**more: str) -> dict[str, str]:
    import fused_ce

    package = Path(fused_ce.__file__).resolve().parents[1]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (package, TESTS, ROOT))), **more}


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def finish(*command: str, cwd: Path = ROOT, env: dict[str, str] | None = None) -> Done:
    """What became of `python COMMAND`: `-m MODULE`, `-c CODE` or a path, and arguments."""
    with tempfile.NamedTemporaryFile("r") as out, tempfile.NamedTemporaryFile("r") as err:
        variables = dict(os.environ if env is None else env)
        server = _server()
        request = (list(map(str, command)), str(cwd), variables, out.name, err.name)
        print(json.dumps(request), file=server.stdin, flush=True)
        return Done(int(server.stdout.readline()), out.read(), err.read())


def run(*command: str, ends_with: int = 0) -> str:
    """What the program prints."""
    done = finish(*command)
    assert done.returncode == ends_with, done.stdout + done.stderr
    return done.stdout + done.stderr


def in_two_processes(work: Callable[[int, str], None], folder: str) -> int:
    """Has two forks of this program, which has loaded torch and done nothing more, do the work of
    ranks 0 and 1, and says how it is to end."""
    children = []
    for rank in range(2):
        child = os.fork()
        if not child:
            signal.alarm(SECONDS // 2)  # one may wait for the other
            code = 1
            try:
                work(rank, folder)
                code = 0
            except BaseException:
                traceback.print_exc()
            # Taking the group down can wait for gloo's threads for ever, which says nothing of the
            # work.
            os._exit(code)
        children.append(child)
    return int(any(os.waitpid(child, 0)[1] for child in children))


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


@functools.cache
def _server() -> subprocess.Popen:
    pipe = subprocess.PIPE
    server = subprocess.Popen([sys.executable, __file__], stdin=pipe, stdout=pipe, text=True)
    atexit.register(server.communicate)
    return server


def _serve() -> list | None:
    """The request of a process that was forked for it; nothing where there are no more."""
    for request in sys.stdin:
        child = os.fork()
        if not child:
            return json.loads(request)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _become(command: list[str], cwd: str, variables: dict[str, str], out: str, err: str) -> None:
    for stream, place, mode in (
        (0, os.devnull, os.O_RDONLY),
        (1, out, os.O_WRONLY),
        (2, err, os.O_WRONLY),
    ):
        os.dup2(os.open(place, mode), stream)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(variables)
    signal.alarm(SECONDS)
    installed = [place for place in sys.path if place.startswith((sys.prefix, sys.base_prefix))]
    asked = list(filter(None, variables.get("PYTHONPATH", "").split(os.pathsep)))
    kind, *arguments = command
    if kind == "-m":
        sys.path[:] = [cwd, *asked, *installed]
        sys.argv = arguments
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.path[:] = ["", *asked, *installed]
        sys.argv = ["-c", *arguments[1:]]
        exec(arguments[0], {"__name__": "__main__"})
    else:
        sys.path[:] = [str(Path(cwd, kind).parent), *asked, *installed]
        sys.argv = command
        runpy.run_path(kind, run_name="__main__")


def _ended(program: Callable[..., None], *arguments: object) -> int:
    """The exit code, after all that Python does at the end of a program but to take down what this
    process was forked with, which takes a second: half of torch's memory is written to for it."""
    code = 0
    try:
        program(*arguments)
    except SystemExit as end:
        code = end.code
        if code is not None and not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code or 0


if __name__ == "__main__":
    importlib.import_module("torch._dynamo")  # which the optimizers import
    gc.freeze()  # or a child's first collection writes to all of it

    request = _serve()
    if request:
        os._exit(_ended(_become, *request))
