"""Calls a function in a process that has done nothing else, and hands back its answer.

What a process has done before decides what a call costs in it. The high-water mark of its memory
only rises; and glibc keeps what tensors just under 32 MB free, already faulted in, and may or may
not serve a much larger one from it: three times as fast, for a reason that is not the call's.

Starting Python and torch anew takes seconds, so one process that has imported them and done nothing
more is forked for each call (multiprocessing's forkserver).
"""

import multiprocessing
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

Notice = Callable[[str], None]

CONTEXT = multiprocessing.get_context("forkserver")
NOTICE, ANSWER, ERROR = "notice", "answer", "error"
BACKWARD = "torch._dynamo"  # the first backward of a process imports it, for seconds


class Failed(Exception):
    """There is no answer; the reason in one line."""


def preload(*modules: str) -> None:
    """Further modules for the process that is forked. Heeded until the first call."""
    CONTEXT.set_forkserver_preload([__name__, BACKWARD, *modules])


preload()


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def work(pipe: Connection, threads: int, held: Any) -> None:
    # Ctrl-C reaches every process of a terminal. The parent is who acts on it, and ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    while True:
        try:
            method, arguments, gives_notice = pipe.recv()
        except EOFError:
            return
        if gives_notice:
            arguments = (*arguments, lambda text: pipe.send((NOTICE, text)))
        try:
            message = ANSWER, getattr(held, method)(*arguments)
        except Exception as error:
            message = ERROR, first_line(error)
        pipe.send(message)


class Worker:
    """A fresh process on as many threads as this one has. It holds a copy of an object, and calls a
    method of it whenever it is asked."""

    def __init__(self, held: Any) -> None:
        self.pipe, end = CONTEXT.Pipe()
        self.process = CONTEXT.Process(target=work, args=(end, torch.get_num_threads(), held))
        self.process.start()
        # The child's is the only open end, so that its death is the end of what can be received.
        end.close()

    def ask(self, method: str, *arguments: object, notice: Notice | None = None) -> Any:
        """The method's answer. With a `notice` it is given one as its last argument, and what it
        says there is said here."""
        try:
            self.pipe.send((method, arguments, notice is not None))
            while True:
                kind, value = self.pipe.recv()
                if kind == ANSWER:
                    return value
                if kind == ERROR:
                    raise Failed(value)
                notice(value)
        except (EOFError, ConnectionError):
            self.process.join()
            raise Failed(f"its process ended: {ending(self.process.exitcode)}") from None

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.pipe.close()
        if kind:
            self.process.kill()
        self.process.join()


def call(function: Callable[..., Any], *arguments: object, notice: Notice | None = None) -> Any:
    with Worker(function) as worker:
        return worker.ask("__call__", *arguments, notice=notice)


def ending(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"
