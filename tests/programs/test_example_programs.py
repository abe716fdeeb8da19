"""The programs of examples/ run as their user runs them, and print what their text promises."""

import re

import pytest
import torch
import torch.nn.functional as F
from support.pages import section
from support.processes import ROOT, environment, finish

import fused_ce

STATISTICS = section("docs/statistics.md", "Log-probabilities and entropy")
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))


def printed_by(name):
    done = finish(f"examples/{name}", env=environment())
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_grpo_has_the_composed_loss_and_its_policy_gains():
    printed = printed_by("grpo_logprobs.py")
    composed, fused = re.findall(r"loss (-?\d+\.\d+)", printed)
    assert abs(float(composed) - float(fused)) <= 2e-6
    assert "the gradients agree" in printed
    gains = [float(gain) for gain in re.findall(r"gain (-?\d+\.\d+)", printed)]
    assert abs(gains[0]) < 1e-4 and min(gains[1:]) > 0.1


def test_perplexity_tells_the_text_that_was_learned_from_one_that_was_not():
    printed = printed_by("perplexity.py")
    found = re.findall(r"perplexity (\d+\.\d+), greedy: (\w+)", printed)
    certain, likely, unknown = (float(perplexity) for perplexity, _ in found)
    assert max(certain, likely) < 2 < unknown
    assert [greedy for _, greedy in found] == ["True", "False", "False"]


def test_z_loss_and_softcap_take_the_curve_of_the_formula():
    printed = printed_by("z_loss_softcap.py")
    (apart,) = re.findall(r"largest relative difference: (\S+)", printed)
    assert float(apart) < 1e-5
    losses = [float(loss) for loss in re.findall(r"^ *\d+ +(\d\.\d+)", printed, re.M)]
    assert len(losses) == 6 and losses[-1] < losses[0] - 1


def test_weights_find_the_rare_classes_and_labels():
    tables = printed_by("imbalanced.py").split("\n\n")
    assert len(tables) == 2
    for table, gain in zip(tables, (0.05, 0.3), strict=True):
        rows = re.findall(r"^ +\d+ +(\d+) +(\d\.\d\d) +(\d\.\d\d)$", table, re.M)
        (mean,) = re.findall(r"mean +(\d\.\d\d) +(\d\.\d\d)$", table, re.M)
        assert float(mean[1]) > float(mean[0]) + gain
        rarest = min(int(count) for count, _, _ in rows)
        rare = [(float(a), float(b)) for count, a, b in rows if int(count) == rarest]
        assert all(weighted > plain for plain, weighted in rare)
    assert len(rows) == 6


def test_distillation_takes_the_curve_of_the_composition():
    printed = printed_by("distillation.py")
    (apart,) = re.findall(r"largest relative difference: (\S+)", printed)
    assert float(apart) < 1e-4
    losses = [float(loss) for loss in re.findall(r"^ *\d+ +(\d+\.\d+)", printed, re.M)]
    assert len(losses) == 7 and losses[-1] < losses[0] / 2


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_example_says_how_to_run_it(name):
    assert f"`python examples/{name}`" in (ROOT / "examples" / name).read_text()


def test_the_pages_module_with_options_has_the_composed_loss():
    input, target, weight = torch.randn(6, 5), torch.randint(0, 5, (6,)), torch.rand(6)
    names = {"fused_ce": fused_ce, "torch": torch, "logits": input, "target": target}
    names |= {"weight": weight, "num_items": 4}
    block = re.search(r"```python\n(criterion.*?)```", section("docs/options.md", "Options"), re.S)
    exec(block[1], names)
    logits = 30 * torch.tanh(input / 30)
    losses = F.cross_entropy(logits, target, reduction="none")
    losses = losses + 1e-4 * logits.logsumexp(1).square()
    torch.testing.assert_close(names["loss"], (losses * weight).sum() / 4)


def test_the_pages_calls_of_the_statistics_run():
    hidden = torch.randn(2, 5, 8, requires_grad=True)
    head = torch.nn.Linear(8, 30, bias=False)
    names = {
        "fused_ce": fused_ce,
        "hidden": hidden,
        "head": head,
        "rows": head(hidden),
        "tokens": torch.randint(0, 30, (2, 5)),
        "advantage": torch.randn(2, 5),
    }
    blocks = re.findall(r"```python\n(.*?)```", STATISTICS, re.S)
    assert len(blocks) == 2
    found = []
    for block in blocks:
        exec(block, names)
        found.append(names["stats"])
    torch.testing.assert_close(tuple(found[0][:3]), tuple(found[1][:3]))
    assert hidden.grad is not None


# What the libraries compute, written out; the temperature is theirs where they take one.
def log_prob_of(logits, tokens):
    return logits.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def entropy_of(logits):
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


INSTEAD_OF = {
    "selective_log_softmax(": lambda x, t: log_prob_of(x, t),
    "entropy_from_logits(": lambda x, t: entropy_of(x),
    "selective_log_softmax_and_entropy(": lambda x, t: (log_prob_of(x, t), entropy_of(x)),
    "`logprobs_from_logits(": lambda x, t: log_prob_of(x, t),
    "log_probs_from_logits(": lambda x, t: log_prob_of(x / 0.7, t),
    "lm-evaluation-harness": lambda x, t: (log_prob_of(x, t), None, x.logsumexp(-1), x.argmax(-1)),
}


@pytest.mark.parametrize("name", INSTEAD_OF)
def test_the_pages_replacement_has_the_librarys_numbers(name):
    (row,) = (
        line
        for line in STATISTICS.splitlines()
        if line.startswith("| ") and name in line.split("|")[1]
    )
    call = row.split("|")[2].strip().strip("`")
    logits, tokens = torch.randn(2, 5, 30), torch.randint(0, 30, (2, 5))
    names = {"softmax_stats": fused_ce.softmax_stats, "temperature": 0.7}
    found = eval(call, names | {"logits": logits, "tokens": tokens})
    expected = INSTEAD_OF[name](logits, tokens)
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(found, expected)
        return
    assert len(found) == len(expected)
    for value, same in zip(found, expected, strict=True):
        if same is not None:
            torch.testing.assert_close(value, same)


def divergence_of(student, teacher):
    log_p, log_q = (logits.div(2).log_softmax(1) for logits in (student, teacher))
    return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)


KEPT = [0, 1, 3, 5]
DIVERGENCES = {
    "`F.kl_div(log_softmax(s / T": divergence_of,
    "the same times": lambda s, t: 4 * divergence_of(s, t),
    "the reverse divergence": lambda s, t: divergence_of(t, s),
    "a mean over the tokens": lambda s, t: divergence_of(2 * s[KEPT], 2 * t[KEPT]),
}


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_pages_call_of_distillation_has_the_composed_number(name):
    (row,) = (
        line
        for line in section("docs/losses.md", "Distillation").splitlines()
        if line.startswith("| ") and name in line.split("|")[1]
    )
    call = row.split("|")[2].strip().strip("`")
    student, teacher = torch.randn(2, 6, 30)
    mask = torch.zeros(6).index_fill(0, torch.tensor(KEPT), 1)
    names = {"kl_div_with_logits": fused_ce.kl_div_with_logits, "T": 2.0, "mask": mask}
    found = eval(call, names | {"s": student, "t": teacher})
    torch.testing.assert_close(found, DIVERGENCES[name](student, teacher))


@pytest.mark.slow  # three processes that start torch
@pytest.mark.parametrize("name", ["tensor_parallel.py", "fsdp.py"])
def test_ranks_take_the_curve_of_one_process(name):
    printed = printed_by(name)
    (apart,) = re.findall(r"2 ranks; the losses are within (\S+) of one process's", printed)
    assert float(apart) < 1e-5
    losses = [float(loss) for loss in re.findall(r"^ *\d+ +(\d+\.\d+)", printed, re.M)]
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 1
