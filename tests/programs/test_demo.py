"""The demo as its user meets it: its output, its picture and how it ends.

Training is cut to a few steps of small batches. What must not be lost is that the program can fail:
a loss that is wrong in its value, in its gradient alone, or not finite has to end in a non-zero
exit. One run is a process of its own; for the others it is this one that runs the program, since to
import what it draws with takes longer than what it does.
"""

import runpy
import sys

import pytest
from support.processes import ROOT, is_png, run
from torch import nn

import fused_ce
from bench.demo import agreement, digits, language_model, memory, program, training


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(language_model, "BATCH", 4)


@pytest.fixture
def demo(tmp_path, capsys):
    """Runs the program, gives what it prints and its exit code, and sees that it drew."""

    def run_here(*options):
        code = program.main([*options, "--out", str(tmp_path)])
        assert is_png(tmp_path / "demo.png")
        return capsys.readouterr().out, code

    return run_here


@pytest.fixture
def no_memory(monkeypatch):
    """Where the memory is not what the test is about, no process is started for it."""
    monkeypatch.setattr(program, "measure_peak", lambda *call: None)


def test_both_tasks_agree_and_leave_a_picture(tmp_path, capsys, monkeypatch):
    options = ["--steps", "3", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["bench.demo", *options])
    with pytest.raises(SystemExit) as ended:  # as `python -m bench.demo`
        runpy.run_module("bench.demo", run_name="__main__", alter_sys=True)
    printed = capsys.readouterr().out
    assert ended.value.code == 0, printed
    assert "language model: the curves agree" in printed
    assert "digits: the curves agree" in printed
    assert "step 3  stock" in printed and "\x1b" not in printed
    assert is_png(tmp_path / "demo.png")


def test_head_within_the_loss_takes_the_same_curve(demo):
    printed, code = demo("--linear", "--steps", "3")
    assert code == 0 and "LM head: the curves agree" in printed
    assert "digits" not in printed and "not measured" not in printed


def test_wrong_gradient_of_the_head_is_seen(demo, no_memory, monkeypatch):
    # The loss and the gradient of the states are right; only the head's own is 1 % too long.
    right = fused_ce.linear_cross_entropy

    def wrong(states, weight, target, **options):
        return right(states, 1.01 * weight - 0.01 * weight.detach(), target, **options)

    monkeypatch.setattr(fused_ce, "linear_cross_entropy", wrong)
    # The first update is what makes the curves part, so the second step shows it.
    printed, code = demo("--linear", "--steps", "4")
    assert code == 1 and "LM head: the curves part" in printed


def test_stock_alone_as_a_folder_is_not_compared(tmp_path):
    printed = run(
        str(ROOT / "bench" / "demo"),
        *("--task", "digits", "--loss", "stock", "--steps", "1", "--out", str(tmp_path)),
    )
    assert "curves" not in printed
    assert is_png(tmp_path / "demo.png")


@pytest.mark.parametrize(
    ("wrong", "step"),
    [
        (lambda loss: loss * 1.0001, "at step 1"),
        # The right value with a gradient 1 % too long: the first step cannot show it.
        (lambda loss: loss * 1.01 - loss.detach() * 0.01, "at step"),
        (lambda loss: loss * float("nan"), "at step 1"),
    ],
    ids=["value", "gradient", "nan"],
)
def test_curves_that_part_fail(demo, no_memory, monkeypatch, wrong, step):
    class Faulty(nn.CrossEntropyLoss):
        def forward(self, input, target):
            return wrong(super().forward(input, target))

    monkeypatch.setattr(fused_ce, "CrossEntropyLoss", Faulty)
    printed, code = demo("--task", "digits", "--steps", "20")
    assert code == 1 and f"digits: the curves part {step}" in printed
    assert "not measured" in printed


def test_same_seed_same_curve():
    def curve(seed: int) -> list[float]:
        *_, runs = training.train(digits.digits(), ["stock"], 5, seed)
        return runs["stock"].losses

    assert curve(1) == curve(1) != curve(2)


def test_agreement_counts_what_is_not_finite_as_parting():
    nan, inf = float("nan"), float("inf")
    assert agreement.first_parting([2.0, 1.0], [2.0, 1.0]) is None
    assert agreement.first_parting([2.0, 1.0], [2.0, 1.0 + 1e-4]).step == 2
    # Below a loss of 1 the difference counts as it is: 1e-6 between 0.001 and 0.001001 is rounding.
    assert agreement.first_parting([1e-3], [1.001e-3]) is None
    for broken in (nan, inf):
        assert agreement.first_parting([2.0, broken], [2.0, broken]).step == 2


def test_windows_continue_and_only_a_last_one_is_padded():
    window = language_model.WINDOW
    words = [str(number) for number in range(window + 10)]
    vocabulary = {word: index for index, word in enumerate(words, start=2)}
    inputs, targets = language_model.cut_windows([words], vocabulary)
    assert inputs.shape == targets.shape == (2, window)
    assert targets[0].tolist() == list(range(3, window + 3))
    assert inputs[1].tolist() == [*range(window + 2, window + 11), *[0] * (window - 9)]
    assert targets[1].tolist() == [*range(window + 3, window + 12), *[-100] * (window - 9)]


def test_vocabulary_has_thousands_of_words_and_rare_ones_are_unknown():
    assert language_model.build_vocabulary([["a", "b", "a", "c"], ["c"]]) == {"a": 2, "c": 3}
    _, classes = language_model.language_model().logits_shape
    assert classes > 2000


def test_memory_of_stock_is_three_logits():
    rows, classes = 2048, 3000
    measured = memory.measure_peak("stock", rows, classes)
    if measured is None:
        pytest.skip("no high-water mark on this system")
    assert 2.5 < measured / (rows * classes * 4) < 3.5
