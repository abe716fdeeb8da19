"""`fused_ce.patch()` and `python -m fused_ce`, by which code that knows nothing of us is fused.

What the losses then answer is test_patched_torch.py's; here it is who gets ours, and when not.
"""

import threading

import pytest
import torch
import torch.nn.functional as F
from support.processes import finish, run
from torch import nn

import fused_ce
from fused_ce import checking
from fused_ce.patching import REPLACEMENTS


@pytest.fixture(autouse=True)
def attributes():
    """Stock's, which each test leaves as they were."""
    stocks = {name: getattr(F, name) for name in REPLACEMENTS if hasattr(F, name)}
    yield stocks
    assert {name: getattr(F, name) for name in stocks} == stocks


def is_fused(loss):
    return type(loss.grad_fn).__module__ == "torch.autograd.function"


def problem():
    return torch.randn(4, 5, requires_grad=True), torch.arange(4)


def test_modules_made_before_and_after_are_fused_until_it_is_undone(attributes):
    before = nn.CrossEntropyLoss()
    handle = fused_ce.patch()
    after = nn.CrossEntropyLoss()
    assert handle.names == tuple(attributes)
    assert all(name in repr(handle) for name in attributes)
    assert is_fused(before(*problem())) and is_fused(after(*problem()))
    fused_ce.unpatch()
    fused_ce.unpatch()
    assert not is_fused(before(*problem())) and not is_fused(after(*problem()))


def test_a_context_puts_back_what_was_there():
    with fused_ce.patch():
        with fused_ce.patch():
            assert F.cross_entropy is fused_ce.cross_entropy
        assert F.cross_entropy is fused_ce.cross_entropy
    with pytest.raises(ZeroDivisionError), fused_ce.patch():
        raise ZeroDivisionError
    assert F.cross_entropy is not fused_ce.cross_entropy


def test_what_somebody_else_has_set_since_is_left_alone(attributes):
    fused_ce.patch()
    F.cross_entropy = theirs = lambda *a, **k: fused_ce.cross_entropy(*a, **k)
    fused_ce.unpatch()
    assert F.cross_entropy is theirs
    F.cross_entropy = attributes["cross_entropy"]


def test_what_somebody_had_set_before_comes_back(attributes):
    F.cross_entropy = theirs = lambda *a, **k: attributes["cross_entropy"](*a, **k)
    with fused_ce.patch():
        assert is_fused(F.cross_entropy(*problem()))
    assert F.cross_entropy is theirs
    F.cross_entropy = attributes["cross_entropy"]


def test_many_threads_may_patch_and_undo(attributes):
    def toggle():
        for _ in range(200):
            fused_ce.patch()
            fused_ce.unpatch()

    threads = [threading.Thread(target=toggle) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert F.cross_entropy is attributes["cross_entropy"]


def test_scripts_keep_stocks():
    def loss(input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(input, target)

    def others(input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        losses = F.binary_cross_entropy_with_logits(input, target, reduction="sum")
        return losses + F.kl_div(input, target, reduction="sum")

    input, target = problem()
    of_others = input.detach(), torch.rand(4, 5)
    expected = loss(input, target), others(*of_others)
    with fused_ce.patch():
        scripted, module = torch.jit.script(loss), torch.jit.script(nn.CrossEntropyLoss())
        assert torch.equal(scripted(input, target), expected[0])
        assert torch.equal(module(input, target), expected[0])
        assert torch.equal(torch.jit.script(others)(*of_others), expected[1])
    with pytest.raises(RuntimeError, match="fused_ce.cross_entropy cannot be scripted"):
        torch.jit.script(fused_ce.cross_entropy)


SCRIPT = """
import sys
import torch
from helper import target  # beside the script, as Python has it
from torch import nn

assert __name__ == "__main__"
loss = nn.CrossEntropyLoss()(torch.zeros(4, 5, requires_grad=True), target)
print(sys.argv[1:], type(loss.grad_fn).__name__, f"{loss.item():.4f}")
"""


@pytest.mark.parametrize("how", ["script", "module"])
def test_a_script_that_knows_nothing_of_us_is_fused(tmp_path, how):
    (tmp_path / "train.py").write_text(SCRIPT)
    (tmp_path / "helper.py").write_text("import torch\ntarget = torch.arange(4)\n")
    names = [str(tmp_path / "train.py")] if how == "script" else ["-m", "train"]
    done = finish("-m", "fused_ce", "run", *names, "--lr", "3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "['--lr', '3'] GradInForwardBackward 1.6094\n"
    assert done.stderr.startswith("fused_ce: cross_entropy")


def test_a_script_ends_as_it_would_by_itself(tmp_path):
    (tmp_path / "train.py").write_text("import sys\nsys.exit(7)")
    assert finish("-m", "fused_ce", "run", str(tmp_path / "train.py")).returncode == 7
    nothing = finish("-m", "fused_ce", "run")
    assert nothing.returncode == 1 and "expected a script to run, got none" in nothing.stderr


def test_the_report_says_what_an_issue_needs():
    printed = run("-m", "fused_ce")
    for fact in (fused_ce.__version__, torch.__version__, "_C.so", "CUDA", "fused: gradient in"):
        assert fact in printed


def test_the_check_agrees_here_and_finds_a_wrong_answer(monkeypatch):
    said = []
    assert checking.run("cpu", said.append) == 0
    assert said == [f"32 of 32 calls agree with stock PyTorch {torch.__version__} on cpu"]
    right = checking.cross_entropy

    def wrong(input, target, **options):  # the right value with a gradient 5 % too long
        return right(input * 1.05 - input.detach() * 0.05, target, **options)

    monkeypatch.setattr(checking, "cross_entropy", wrong)
    monkeypatch.setattr(checking, "explain_call", lambda *a, **k: "fused: ")
    assert checking.run("cpu", said.append) == 24
    assert "the gradient is" in said[1] and said[-1].startswith("8 of 32 calls agree")
    # What the kernels do not take is not what was to be checked.
    monkeypatch.setattr(checking, "explain_call", lambda *a, **k: "stock: for a change")
    assert checking.run("cpu", said.append) == 32
