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
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch

Notice = Callable[[str], None]

CONTEXT = multiprocessing.get_context("forkserver")
NOTICE, ANSWER, ERROR = "notice", "answer", "error"


class Failed(Exception):
    """There is no answer; the reason in one line."""


def preload(*modules: str) -> None:
    """Further modules for the process that is forked. Heeded until the first call."""
    CONTEXT.set_forkserver_preload([__name__, *modules])


preload()


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def work(pipe: Connection, threads: int, function: Callable[..., Any], arguments: tuple) -> None:
    # Ctrl-C reaches every process of a terminal. The parent is who acts on it, and ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    try:
        message = ANSWER, function(*arguments)
    except Exception as error:
        message = ERROR, first_line(error)
    pipe.send(message)


def give_notice(pipe: Connection, text: str) -> None:
    pipe.send((NOTICE, text))


def call(function: Callable[..., Any], *arguments: object, notice: Notice | None = None) -> Any:
    """The function's answer, on as many threads as this process has. With a `notice` the function
    is given one as its last argument, and what it says there is said here."""
    receiver, sender = CONTEXT.Pipe(duplex=False)
    if notice:
        arguments = (*arguments, partial(give_notice, sender))
    process = CONTEXT.Process(
        target=work, args=(sender, torch.get_num_threads(), function, arguments)
    )
    process.start()
    # The child's is now the only open end, so that its death is the end of what can be received.
    sender.close()
    try:
        while True:
            kind, value = receiver.recv()
            if kind == ANSWER:
                return value
            if kind == ERROR:
                raise Failed(value)
            notice(value)
    except EOFError:
        process.join()
        raise Failed(f"its process ended: {ending(process.exitcode)}") from None
    except BaseException:
        process.kill()
        raise
    finally:
        process.join()
        receiver.close()


def ending(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"
