"""The axes that tests are crossed over, and selections of their combinations.

A full product is worth its time where all axes meet in the code. Elsewhere `covering` gives the few
cases in which every two or three of their values meet, and the rest of the product is left to the
slow tests.
"""

import collections
import contextlib
import functools
import inspect
import itertools
import random
from typing import NamedTuple

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


# Whether a run leaves the slow tests out (conftest.py): their cases are then not even made.
without_slow = False


def cases_of(axes, *, often, seldom=None, rare=False, valid=lambda case: True):
    """A selection of strength `often`; as slow cases, one of strength `seldom`, or all others.

    The slow ones may be rare as well, where a push has no time for them.
    """
    chosen = covering(axes, often, valid)
    if without_slow:
        others = []
    elif seldom is None:
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


# So many that a test takes a moment, and that two workers can share what a function has.
AT_ONCE = 32


def together(test):
    """The cases of the `parametrize` marks beneath it in a few tests, each a loop over some.

    What pytest and xdist do for a test takes longer than many a case. A case begins like a test,
    and an error names it.
    """
    marks = [mark for mark in test.pytestmark if _is_loop(mark)]
    groups = collections.defaultdict(list)
    for one in itertools.product(*map(_sets, marks)):
        own_marks = tuple(dict.fromkeys(mark for values in one for mark in values.marks))
        given = {name: value for values in one for name, value in values.values.items()}
        groups[own_marks].append(("-".join(values.id for values in one), given))
    params = [
        pytest.param(
            group[at : at + AT_ONCE],
            id=f"{group[at][0]} ...",
            marks=[getattr(pytest.mark, name) for name in own_marks],
        )
        for own_marks, group in groups.items()
        for at in range(0, len(group), AT_ONCE)
    ]
    signature = inspect.signature(test)
    looped = {name for mark in marks for name in _names(mark)}
    rest = [value for name, value in signature.parameters.items() if name not in looped]

    @functools.wraps(test)
    def run(cases, **fixtures):
        skipped = []
        for name, given in cases:
            try:
                with as_a_test_begins():
                    test(**fixtures, **given)
            except pytest.skip.Exception as reason:
                skipped.append(reason)
            except (Exception, pytest.fail.Exception) as error:
                raise AssertionError(f"{name}: {error}") from error
        if len(skipped) == len(cases):
            raise skipped[0]

    cases = inspect.Parameter("cases", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    run.__signature__ = signature.replace(parameters=[cases, *rest])
    run.pytestmark = [mark for mark in test.pytestmark if not _is_loop(mark)]
    nothing = pytest.param([], id="none", marks=pytest.mark.slow)  # all are slow, and not made
    return pytest.mark.parametrize("cases", params or [nothing])(run)


class _Set(NamedTuple):
    """What one set of a `parametrize` mark's values stands for."""

    id: str
    values: dict
    marks: tuple


def _is_loop(mark):
    return mark.name == "parametrize" and not mark.kwargs.get("indirect")


def _names(mark):
    names = mark.args[0]
    return [n.strip() for n in names.split(",")] if isinstance(names, str) else list(names)


def _sets(mark):
    names, ids = _names(mark), mark.kwargs.get("ids")
    ids = ids if ids is None or callable(ids) else list(ids)
    sets = []
    for i, given in enumerate(mark.args[1]):
        is_param = hasattr(given, "marks")
        values = given.values if is_param else given if len(names) > 1 else (given,)
        own = given.id if is_param else None
        if ids is not None and own is None:
            own = "-".join(map(str, map(ids, values))) if callable(ids) else str(ids[i])
        if own is None:
            own = "-".join(_label(f"{n}{i}", v) for n, v in zip(names, values, strict=True))
        marks = tuple(mark.name for mark in given.marks) if is_param else ()
        assert not any(mark.args or mark.kwargs for mark in (given.marks if is_param else ()))
        if not (without_slow and "slow" in marks):
            sets.append(_Set(own, dict(zip(names, values, strict=True)), marks))
    return sets


def _label(place, value):
    """What can be read, and is the same in every process; else the place in the list."""
    if isinstance(value, (str, int, float, torch.dtype, type(None))):
        return _text(value)
    return getattr(value, "__name__", place)


@contextlib.contextmanager
def as_a_test_begins():
    """The random state is the same in each, and the number of threads is left as it was."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def name_of(case):
    """A test id that can be read and typed."""
    return "-".join(_text(value) for value in case.values())


def _text(value):
    if isinstance(value, tuple):
        return ",".join(map(_text, value))
    return str(value).removeprefix("torch.").replace(" ", "_")
