"""Whether the kernels on this machine agree with stock PyTorch: a few seconds of both.

It is the test suite's rule over a few dozen calls, for an installation that has no test suite: no
result may be further from stock's in float64 than twice stock's own in the same type, and two ulp;
one in float64 agrees to 13 digits.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import stock
from .explaining import explain_call
from .functional import cross_entropy
from .linear import linear_cross_entropy
from .options import Options

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Few classes, rows of a vector and a half, and rows of several blocks; rows side by side.
_SHAPES = ((64, 10), (40, 1000), (3, 20000), (2, 19, 8, 12))


class Case(NamedTuple):
    """A call of one of our functions, and the same call of stock's."""

    name: str
    function: Callable
    stocks: Callable
    tensors: tuple[Tensor, ...]  # of floating types, and differentiated by
    arguments: tuple
    options: dict


def _losses(device: str) -> Iterator[Case]:
    kinds = ("indices", "probabilities")
    for shape, dtype, kind in itertools.product(_SHAPES, _DTYPES[:3], kinds):
        logits = torch.randn(shape, device=device).mul_(3).to(dtype)
        options = {"label_smoothing": 0.1} if dtype is torch.bfloat16 else {}
        if kind == "indices":
            target = torch.randint(shape[1], shape[:1] + shape[2:], device=device)
            target.view(-1)[1::5] = -100
            options["weight"] = torch.rand(shape[1], device=device).add_(0.5).to(dtype)
        else:
            target = torch.randn(shape, device=device).softmax(1).to(dtype)
        sizes = "x".join(map(str, shape))
        name = f"{sizes} {str(dtype).removeprefix('torch.')} {kind}"
        yield Case(name, cross_entropy, _stock_loss, (logits,), (target,), options)


def _stock_loss(logits: Tensor, target: Tensor, weight=None, label_smoothing=0.0) -> Tensor:
    options = Options(weight=weight, label_smoothing=label_smoothing)
    return stock.cross_entropy(logits, target, options)


def _heads(device: str) -> Iterator[Case]:
    for dtype, rows in itertools.product(_DTYPES, (40, 300)):
        hidden = torch.randn(rows, 64, device=device).to(dtype)
        head = torch.randn(500, 64, device=device).div_(8).to(dtype)
        target = torch.randint(500, (rows,), device=device)
        name = f"head of {rows}x64-500 {str(dtype).removeprefix('torch.')}"
        yield Case(name, linear_cross_entropy, _stock_head, (hidden, head), (target,), {})


def _stock_head(hidden: Tensor, head: Tensor, target: Tensor) -> Tensor:
    return _stock_loss(stock.linear(hidden, head), target)


def cases(device: str) -> Iterator[Case]:
    yield from _losses(device)
    yield from _heads(device)


def _results(function: Callable, case: Case, dtype: torch.dtype | None = None) -> list[Tensor]:
    def cast(value: object) -> object:
        is_cast = dtype is not None and isinstance(value, Tensor) and value.is_floating_point()
        return value.to(dtype) if is_cast else value

    leaves = [cast(tensor).detach().clone().requires_grad_() for tensor in case.tensors]
    options = {name: cast(value) for name, value in case.options.items()}
    loss = function(*leaves, *map(cast, case.arguments), **options)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def _error(found: Tensor, exact: Tensor) -> float:
    difference = (found.double() - exact).abs().max().item()
    return difference if math.isfinite(difference) else math.inf


def fault(case: Case) -> str | None:
    """What is wrong with our answer; None if nothing is."""
    said = explain_call(case.function, *case.tensors, *case.arguments, **case.options)
    if not said.startswith("fused: "):
        return said
    ours, stocks = _results(case.function, case), _results(case.stocks, case)
    for place, exact in enumerate(_results(case.stocks, case, torch.float64)):
        ulp = torch.finfo(ours[place].dtype).eps * exact.abs().max().item()
        error, limit = _error(ours[place], exact), _error(stocks[place], exact)
        if exact.dtype == ours[place].dtype:  # then stock is itself what both are compared with
            limit = 1e-13 * max(1.0, exact.abs().max().item())
        if not error <= 2 * (limit + ulp):
            what = "gradient" if place else "loss"
            return f"the {what} is {error:.1e} from float64, where stock's is {limit:.1e}"
    return None


def run(device: str, say: Callable[[str], object]) -> int:
    """The number of calls with a wrong answer, each of which is said."""
    wrong = count = 0
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        for case in cases(device):
            found = fault(case)
            count += 1
            if found is not None:
                wrong += 1
                say(f"WRONG  {case.name}: {found}")
    say(
        f"{count - wrong} of {count} calls agree with stock PyTorch {torch.__version__} on {device}"
    )
    return wrong
