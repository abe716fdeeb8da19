"""Peak memory on the CPU: the rise of a fresh process's high-water mark during one call.

Fresh, because what a process has freed before hides what it takes next. Starting Python and torch
anew for every figure would take minutes, so one process that has imported them and done nothing
else is forked for each (multiprocessing's forkserver). The same call goes before the one that is
measured: it compiles, loads code and starts threads.
"""

import ctypes
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import torch

from bench.cases import Case
from bench.peak_memory import rise
from bench.problem import BOTH, Problem
from bench.providers import make_call, passes_of

# Imported once by the process that is forked; torch.compile's own parts take seconds.
PRELOAD = ["bench.memory", "torch._dynamo", "torch._inductor.compile_fx"]

M_MMAP_THRESHOLD = -3  # <malloc.h>
LARGE = 64 * 1024


def give_back_what_is_freed() -> None:
    """Has glibc return every block of some size to the system when it is freed. Otherwise the first
    call's blocks are still resident in the second, which then seems to need less."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGE)


def peaks_here(case: Case, provider: str, threads: int) -> dict[str, int | None]:
    torch.set_num_threads(threads)
    give_back_what_is_freed()
    problem = Problem(case, "cpu")
    found = {}
    for which in passes_of(provider, case):
        call = make_call(provider, which, problem)
        (logits,) = problem.inputs(1)
        with torch.set_grad_enabled(which == BOTH):
            call(logits)
            found[which] = rise(lambda call=call, logits=logits: call(logits))
    return found


def peaks(case: Case, provider: str) -> dict[str, int | None]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with ProcessPoolExecutor(1, mp_context=context) as processes:
        return processes.submit(peaks_here, case, provider, torch.get_num_threads()).result()
