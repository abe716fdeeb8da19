"""The tests' own tools: a covering selection leaves no combination out, a loop over cases no case.

What they would lose no other test could notice.
"""

import itertools

import pytest
import torch
from support import grids
from support.grids import AT_ONCE, covering, together


def combinations(case, strength):
    return set(itertools.combinations(case.items(), strength))


def is_odd_or_small(case):
    return case.get("a", 1) % 2 == 1 or case.get("b", 0) < 2


@pytest.mark.parametrize("strength", [2, 3])
@pytest.mark.parametrize("valid", [lambda case: True, is_odd_or_small], ids=["all", "some"])
def test_every_valid_combination_is_in_a_valid_case(strength, valid):
    axes = {"a": range(6), "b": range(4), "c": "xyz", "d": (False, True), "e": (None, 1)}
    product = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    wanted = set.union(*(combinations(case, strength) for case in product if valid(case)))
    cases = covering(axes, strength, valid)
    assert all(valid(case) and list(case) == list(axes) for case in cases)
    assert set.union(*(combinations(case, strength) for case in cases)) == wanted
    assert len(cases) < len(product) / (5 - strength)
    assert cases == covering(axes, strength, valid)


def looped(body):
    """Over 3 x 12 cases, of which one is slow; what pytest would call, with the cases and marks."""
    values = [*range(11), pytest.param(11, marks=pytest.mark.slow)]
    body = pytest.mark.parametrize("a, b", [(i, -i) for i in range(3)])(body)
    test = together(pytest.mark.parametrize("c", values)(body))
    (mark,) = test.pytestmark
    return test, [(param.values[0], [m.name for m in param.marks]) for param in mark.args[1]]


@pytest.mark.parametrize("without_slow", [False, True])
def test_every_case_runs_and_begins_like_a_test(without_slow, monkeypatch):
    monkeypatch.setattr(grids, "without_slow", without_slow)
    seen, numbers = [], set()

    def body(a, b, c, extra):
        assert extra == "a fixture" and a == -b
        seen.append((a, c))
        numbers.add(torch.rand(()).item())
        torch.set_num_threads(3)

    threads = torch.get_num_threads()
    test, params = looped(body)
    for cases, _ in params:
        test(cases=cases, extra="a fixture")
    assert sorted(seen) == sorted(itertools.product(range(3), range(12 - without_slow)))
    assert len(numbers) == 1 and torch.get_num_threads() == threads
    fast = [len(cases) for cases, marks in params if not marks]
    slow = [len(cases) for cases, marks in params if marks == ["slow"]]
    assert (sum(fast), sum(slow)) == (33, 0 if without_slow else 3) and max(fast) == AT_ONCE


@pytest.mark.parametrize("error", [ValueError, pytest.fail.Exception], ids=lambda e: e.__name__)
def test_a_case_that_fails_is_named(error):
    def body(a, b, c):
        if (a, c) == (1, 7):
            raise error("wrong")

    test, params = looped(body)
    cases = [case for some, _ in params for case in some]
    with pytest.raises(AssertionError, match="^1--1-7: wrong"):
        test(cases=cases)


def test_a_case_that_is_skipped_leaves_the_others():
    seen = []

    def body(a, b, c):
        if c < 7:
            pytest.skip("not here")
        seen.append(c)

    test, params = looped(body)
    cases = params[0][0]
    test(cases=cases)
    assert seen
    with pytest.raises(pytest.skip.Exception, match="not here"):
        test(cases=cases[:3])
