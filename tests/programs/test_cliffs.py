"""The search for calls that stock answers sooner: it finds one, and says how to see it again.

What the machine does meanwhile is part of every time, so the cliff that is planted here is one of
many times stock's time, and no other figure is judged.
"""

import json
import random

import pytest
import torch
import torch.nn.functional as F
from support.processes import run

import fused_ce
from bench.cliffs import program
from bench.cliffs.cases import (
    LAYOUTS,
    PROBABILITIES,
    TARGET_LAYOUTS,
    Case,
    draw,
)
from bench.cliffs.measure import Call, HandedToStock, compare
from bench.cliffs.search import FEW, MANY, search

SMALL = 20_000  # elements, which take a fraction of a millisecond


def slow_in_half(logits, target, **options):
    if logits.dtype == torch.float16:
        for _ in range(40):
            F.cross_entropy(logits, target.long() if target.dtype == torch.int32 else target)
    return fused_ce.cross_entropy(logits, target, **options)


def test_a_planted_cliff_is_the_worst_that_is_found():
    asked = []

    def measure(case, rounds):
        asked.append((case, rounds))
        return compare(case, rounds, slow_in_half)

    timings = list(search(3.0, seed=1, again=measure, measure=measure, most=SMALL))
    planted = [timing for timing in timings if timing.case.dtype == "fp16"]
    assert planted and len(planted) < len(timings)
    assert all(timing.ratio > 3 for timing in planted)
    worst = max(timings, key=lambda timing: timing.ratio)
    assert worst.case.dtype == "fp16"
    # It was measured twice, the second time at length; and its line brings it back.
    assert [rounds for case, rounds in asked if case == worst.case] == [FEW, MANY]
    assert compare(Case.parse(str(worst.case)), FEW, slow_in_half).ratio > 3


def test_the_line_of_a_case_is_the_case():
    chance = random.Random(0)
    cases = [draw(chance) for _ in range(500)]
    assert [Case.parse(str(case)) for case in cases] == cases
    # Every value of every part is drawn.
    assert {case.layout for case in cases} == LAYOUTS.keys()
    assert {case.target_layout for case in cases} == TARGET_LAYOUTS.keys()
    assert {case.target for case in cases} == {"int64", "int32", PROBABILITIES}
    assert {case.grads for case in cases} == {"none", "logits", "targets", "both"}
    assert {case.mode for case in cases} == {"fused", "recompute", "inplace"}
    with pytest.raises(ValueError, match="expected one of shape, .*, got 'colour'"):
        Case.parse("shape=8x10 colour=red")


@pytest.mark.parametrize("layout", TARGET_LAYOUTS)
def test_a_layout_is_of_the_targets_or_the_logits_as_drawn(layout):
    """Strides of (7, 5, 4, 6), class axis second."""
    strides = {
        "contiguous": (120, 24, 6, 1),
        "reversed": (1, 7, 35, 140),
        "batch_last": (1, 168, 42, 7),
        "sliced": (240, 48, 12, 2),
        "padded": (180, 36, 9, 1),
        "every_other_row": (240, 24, 6, 1),
        "cropped": (7 * 6 * 8, 6 * 8, 8, 1),
        "channels_last": (120, 1, 30, 5),
        "class_first": (24, 168, 6, 1),
        "every_other_class": (240, 48, 6, 1),
        "expanded": (0, 24, 6, 1),
    }
    case = Case((7, 5, 4, 6), target=PROBABILITIES, target_layout=layout)
    target = Call(case).target
    assert target.shape == case.shape and target.stride() == strides[layout]
    torch.testing.assert_close(target.sum(1), torch.ones(7, 4, 6))


def test_a_wrong_answer_and_a_call_of_stock_have_no_time(monkeypatch):
    case = Case((100, 200), grads="logits")
    with pytest.raises(ArithmeticError, match="the loss is"):
        compare(case, FEW, lambda *given, **options: 1.01 * fused_ce.cross_entropy(*given))
    monkeypatch.setattr(fused_ce, "explain", lambda *given, **options: "stock: for a change")
    with pytest.raises(HandedToStock, match="for a change"):
        compare(case, FEW)


def test_the_program_prints_the_worst_with_the_lines_that_measure_them_again(tmp_path):
    printed = run(
        *("-m", "bench.cliffs", "--seconds", "0.5", "--most", str(SMALL), "--limit", "1000"),
        *("--show", "3", "--out", str(tmp_path)),
    )
    found = json.loads((tmp_path / "cliffs.json").read_text())["cases"]
    worst = sorted(found, key=lambda each: -each["ratio"])[:3]
    lines = [f"python -m bench.cliffs --case '{each['case']}'" for each in worst]
    assert lines == [line for line in printed.splitlines() if "--case" in line]
    assert f"{len(found)} cases" in printed


def test_a_cliff_is_an_exit_code(tmp_path, monkeypatch):
    monkeypatch.setattr(program, "compare", lambda *given: compare(*given, slow_in_half))
    for dtype, code in (("fp16", 1), ("fp32", 0)):
        line = f"shape=200x100 dtype={dtype} grads=logits"
        options = ("--case", line, "--limit", "3", "--out", str(tmp_path))
        assert program.main(options) == code
        (found,) = json.loads((tmp_path / "cliffs.json").read_text())["cases"]
        assert (found["case"], found["ratio"] > 3) == (line.replace(" dtype=fp32", ""), bool(code))
