"""Fills in the memory on the CPU: the most that a call takes beyond what it is given.

A fresh process for each provider, since what one has freed would hide what the next one takes. The
same call goes before the one that is measured: it compiles, loads code and starts threads.
"""

from collections.abc import Sequence
from functools import partial

import torch

from bench.common import process as fresh_process
from bench.common.devices import Device
from bench.common.process import Notice
from bench.loss.cases import Case
from bench.loss.providers import make_call, passes_of
from bench.loss.record import Record
from bench.loss.tensors import BOTH, Problem


def peaks_here(case: Case, name: str, device: Device) -> dict[str, int | None]:
    device.keep_nothing_freed()
    problem = Problem(case, device.name)
    found = {}
    for which in passes_of(name, case):
        call = make_call(name, which, problem)
        (logits,) = problem.inputs(1)
        with torch.set_grad_enabled(which == BOTH):
            call(logits)
            found[which] = device.rise(partial(call, logits))
    return found


def measure_peaks(record: Record, names: Sequence[str], device: Device, notice: Notice) -> None:
    """For every result that has a time."""
    for name in names:
        notice(f"{record.case.name}: memory of {name}")
        timed = [result for result in record.results if result.provider == name and result.samples]
        if not timed:
            continue
        try:
            peaks = fresh_process.call(peaks_here, record.case, name, device)
        except fresh_process.Failed as failure:
            for result in timed:
                result.reason = f"memory: {failure}"
            continue
        for result in timed:
            result.peak = peaks[result.which]
            if result.peak is None:
                result.reason = "memory: the system keeps no high-water mark that can be read"
