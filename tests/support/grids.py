"""The axes that tests are crossed over, and selections of their combinations.

A full product is worth its time where all axes meet in the code. Elsewhere `covering` gives the few
cases in which every two or three of their values meet, and the rest of the product is left to the
slow tests.
"""

import itertools
import random

import pytest
import torch

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
HALVES = (torch.bfloat16, torch.float16)
REDUCTIONS = ("mean", "sum", "none")
KINDS = (torch.int64, torch.int32, torch.int16, torch.uint8, "probability")

# When the gradient is computed. "no grad" is the same call as "default", made where no gradient can
# be asked for; a graph of the first two may be walked more than once.
MODES = {
    "default": {},
    "recompute": {"grad_in_forward": False},
    "in place": {"inplace": True},
    "no grad": {},
}
DIFFERENTIATING = {name: MODES[name] for name in ("default", "recompute", "in place")}
REPEATABLE = {name: MODES[name] for name in ("default", "recompute")}

# Of 301 rows, more than a tile of any kind: a first row, and how many from it on. Alone, less and
# more than a vector of lanes, and beside the border of a tile.
PARTS_OF_301 = [(0, 1), (1, 5), (100, 17), (100, 2), (255, 2), (256, 40), (300, 1), (0, 40)]

# One shape of each rank that stock tells apart: unbatched, rows, and one to four further axes
# (stock has code of its own for exactly two). Sizes are small, odd and different from each other;
# a size of 1 appears once because its stride means nothing.
SHAPES = {
    "C": lambda c: (c,),
    "NC": lambda c: (5, c),
    "NCd": lambda c: (3, c, 7),
    "NCHW": lambda c: (2, c, 3, 5),
    "NCdhw": lambda c: (2, c, 3, 1, 4),
    "NCd4": lambda c: (2, c, 1, 3, 2, 2),
}

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)
every_mode = pytest.mark.parametrize("mode", MODES)
every_differentiating_mode = pytest.mark.parametrize("mode", DIFFERENTIATING)


def every_options_of(modes):
    return pytest.mark.parametrize("options", modes.values(), ids=modes.keys())


def covering(axes, strength, valid=lambda case: True):
    """Cases in which every valid combination of values of any `strength` axes occurs.

    `valid` is asked about whole and about partial cases. The selection is greedy with a fixed
    seed: it is the same in each run.
    """
    draw = random.Random(0)
    wanted = {
        combination: None
        for names in itertools.combinations(axes, strength)
        for values in itertools.product(*(axes[name] for name in names))
        if valid(dict(combination := tuple(zip(names, values, strict=True))))
    }
    cases = []
    while wanted:
        first = next(iter(wanted))
        best, gain = None, ()
        attempts = 0
        while attempts < 12 or best is None:
            attempts += 1
            assert attempts < 1000, f"no valid case contains {first}"
            case = {name: draw.choice(values) for name, values in axes.items()} | dict(first)
            if not valid(case):
                continue
            covered = [
                combination
                for combination in itertools.combinations(case.items(), strength)
                if combination in wanted
            ]
            if len(covered) > len(gain):
                best, gain = case, covered
        for combination in gain:
            del wanted[combination]
        cases.append(best)
    return cases


def cases_of(axes, *, often, seldom=None, rare=False, valid=lambda case: True):
    """A selection of strength `often`; as slow cases, one of strength `seldom`, or all others.

    The slow ones may be rare as well, where a push has no time for them.
    """
    chosen = covering(axes, often, valid)
    if seldom is None:
        names = tuple(axes)
        product = (zip(names, values, strict=True) for values in itertools.product(*axes.values()))
        others = [case for case in map(dict, product) if valid(case)]
    else:
        others = covering(axes, seldom, valid)
    slow = [case for case in others if case not in chosen]
    marks = [pytest.mark.slow, *([pytest.mark.rare] if rare else [])]
    return [
        *(pytest.param(case, id=name_of(case)) for case in chosen),
        *(pytest.param(case, id=name_of(case), marks=marks) for case in slow),
    ]


def crossed(often=2, **axes):
    """The test's arguments in a covering selection of their combinations; the others are slow."""
    axes = {name: tuple(values) for name, values in axes.items()}
    cases = cases_of(axes, often=often)
    return pytest.mark.parametrize(
        tuple(axes),
        [pytest.param(*case.values[0].values(), id=case.id, marks=case.marks) for case in cases],
    )


def name_of(case):
    """A test id that can be read and typed."""
    return "-".join(_text(value) for value in case.values())


def _text(value):
    if isinstance(value, tuple):
        return ",".join(map(_text, value))
    return str(value).removeprefix("torch.").replace(" ", "_")
