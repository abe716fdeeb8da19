"""Ranks of a process group as threads of this process, with the group that torch's tests have.

A group of threads is made in milliseconds. Each rank runs the same function, and what it returns or
raises is handed back in the order of the ranks.
"""

import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed import multi_threaded_pg as threaded

_SECONDS = 20


def in_ranks(count: int, function: Callable[[int], Any]) -> list[Any]:
    """What the function gives for each rank. Raises the first error that a rank raises."""
    found = _outcomes(count, function, wakes=True)
    errors = [each for each in found if isinstance(each, BaseException)]
    for each in errors:
        if not isinstance(each, SystemExit):  # as who was woken since another had raised
            raise each
    assert not errors
    return found


def errors_of(count: int, function: Callable[[int], Any]) -> list[tuple[type, str]]:
    """Type and text of what each rank raises; all of them must."""
    found = _outcomes(count, function, wakes=False)
    assert all(isinstance(each, Exception) for each in found), found
    return [(type(each), str(each)) for each in found]


def _outcomes(count: int, function: Callable[[int], Any], wakes: bool) -> list[Any]:
    """A rank that raises wakes the others that wait for it, if it is asked to."""
    found: list[Any] = [TimeoutError("the rank did not end")] * count
    store = dist.HashStore()

    def run(rank: int) -> None:
        dist.init_process_group("threaded", rank=rank, world_size=count, store=store)
        try:
            found[rank] = function(rank)
        except BaseException as error:
            found[rank] = error
            if wakes:
                threaded.ProcessLocalGroup.exception_handle(error)
        finally:
            dist.destroy_process_group()

    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    threaded._install_threaded_pg()
    threaded.ProcessLocalGroup.reset()
    try:
        threads = [threading.Thread(target=run, args=(r,), daemon=True) for r in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(_SECONDS)
    finally:
        threaded._uninstall_threaded_pg()
        torch._C._distributed_c10d._set_thread_isolation_mode(False)
    return found
