"""Draws cases as long as there is time, and measures again those that seem to be slow."""

import random
from collections.abc import Callable, Iterator
from time import perf_counter

from bench.cliffs.cases import MOST, Case, draw
from bench.cliffs.measure import HandedToStock, Timing

Measure = Callable[[Case, int], Timing]

FEW, MANY = 3, 9  # rounds
SUSPECT = 0.9  # ours over stock's in a few rounds, from which on there are many


def search(
    seconds: float, seed: int, again: Measure, measure: Measure, most: int = MOST
) -> Iterator[Timing]:
    """A timing for each case; `again` measures those that a few rounds found to be slow."""
    chance, ends = random.Random(seed), perf_counter() + seconds
    while perf_counter() < ends:
        case = draw(chance, most)
        try:
            timing = measure(case, FEW)
        except HandedToStock:
            continue
        yield again(case, MANY) if timing.ratio > SUSPECT else timing
