"""The pages' tables of other libraries' losses, held against the real packages: each line's two
sides are run, and have the same value and gradient. And its recipe for hard examples.
"""

import importlib.util
import inspect
import re

import pytest
import torch
import torch.nn.functional as F
from support.pages import text_of

import fused_ce

PACKAGES = "not installed; requirements-dev.txt names it"
TABLES = {
    "timm.loss": (8, 5),
    "segmentation_models_pytorch.losses": (2, 5, 4, 3),
    "torchvision.ops": (6, 5),
}
SECTION = text_of("docs/libraries.md")


def lines():
    """Of each table's lines the package, and the two sides as they are written."""
    package = None
    for line in SECTION.splitlines():
        if line.startswith("| `"):
            theirs, ours = line.strip("| ").split(" | ")
            if ours == "here":
                package = theirs.strip("`")
            else:
                yield package, theirs, ours


def code(side):
    return side.split("`")[1]


LINES = list(lines())
REPLACED = [(package, code(a), code(b)) for package, a, b in LINES if b.startswith("`")]
WITHOUT = [
    (package, name)
    for package, a, b in LINES
    if not b.startswith("`")
    for name in re.findall(r"`(\w+)`", a)
]


def problem(package, call):
    """What the calls are given; some targets are ignored where a line is about that."""
    torch.manual_seed(0)
    shape = TABLES[package]
    y = torch.randint(0, 5, (*shape[:1], *shape[2:]))
    b = torch.randint(0, 2, shape).double()
    if "numel" in call:
        y.view(-1)[::4] = -100
    if "-100" in call:
        b.view(-1)[::4] = -100
    return {
        "x": torch.randn(shape, dtype=torch.float64, requires_grad=True),
        "y": y,
        "q": torch.rand(shape, dtype=torch.float64).softmax(1),
        "b": b,
        "w": torch.rand(5, dtype=torch.float64) + 0.5,
        "C": 5,
    }


def answer(call, names):
    loss = eval(call, names)
    incoming = torch.ones_like(loss)
    return loss.detach(), *torch.autograd.grad(loss, names["x"], incoming)


def imported(package):
    if importlib.util.find_spec(package.partition(".")[0]) is None:
        pytest.skip(PACKAGES)
    return importlib.import_module(package)


@pytest.mark.parametrize(("package", "theirs", "ours"), REPLACED)
def test_the_pages_replacement_has_the_packages_loss(package, theirs, ours):
    module = imported(package)
    names = problem(package, ours)
    expected = answer(theirs, vars(module) | names)
    found = answer(ours, {"torch": torch, "F": F, **vars(fused_ce)} | names)
    # A few of the packages compute in float32, whatever they are given.
    tolerance = 1e-6 if expected[0].dtype == torch.float32 else 1e-12
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, check_dtype=False)


@pytest.mark.parametrize(("package", "name"), WITHOUT)
def test_what_the_page_says_is_not_here_is_there(package, name):
    module = imported(package)
    assert callable(getattr(module, name)) and not hasattr(fused_ce, name)


@pytest.mark.parametrize("package", TABLES)
def test_no_loss_of_a_package_is_left_out(package):
    module = imported(package)
    mentioned = set(re.findall(r"\w+", " ".join(a for name, a, _ in LINES if name == package)))
    public = {name for name, value in vars(module).items() if not inspect.ismodule(value)}
    losses = {name for name in public if re.search("Loss$|_loss$|Entropy$", name)}
    assert len(losses) > 3 and losses - {"create_classification_loss"} <= mentioned


def test_the_pages_hard_examples_are_the_worst_pixels():
    logits = torch.randn(2, 5, 4, 6, requires_grad=True)
    target = torch.randint(0, 5, (2, 4, 6))
    names = {"fused_ce": fused_ce, "logits": logits, "target": target}
    exec(re.search(r"```python\n(.*?)```", SECTION, re.S)[1], names)
    (grad,) = torch.autograd.grad(names["loss"], logits)
    losses = F.cross_entropy(logits, target, reduction="none")
    worst = losses >= losses.flatten().sort().values[-12]
    expected = (losses * worst).sum() / 12
    torch.testing.assert_close(names["loss"], expected)
    torch.testing.assert_close(grad, *torch.autograd.grad(expected, logits))
    assert (grad.abs().sum(1) > 0).sum() == 12
