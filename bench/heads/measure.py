"""The loss of a language model's head: `fused_ce.linear_cross_entropy` beside stock PyTorch,
torch's own chunks, and the three GEMMs that nobody can do without.

Time is that of forward and backward, in rounds as in `measure`. Memory is measured over the size of
the vocabulary, in a fresh process for each size and provider that has made the same call before.
"""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.ticker import FuncFormatter
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor, nn

from bench.common import process as fresh_process
from bench.common.devices import Device
from bench.common.process import Notice, first_line
from bench.demo.display import memory_text
from bench.demo.picture import FAINT, INK, style
from bench.loss.cases import DTYPES
from bench.loss.charts import MARKS, legend, new_figure, save
from bench.loss.measure import TOLERANCES, Effort
from bench.loss.tables import DASH, milliseconds_text, ratio_text


@dataclass(frozen=True)
class Head:
    rows: int
    features: int
    classes: int
    dtype: str = "fp32"

    @property
    def name(self) -> str:
        return f"{self.rows}x{self.features}-{self.classes}-{self.dtype}"

    @property
    def flops(self) -> int:
        return 6 * self.rows * self.features * self.classes

    @property
    def bytes(self) -> dict[str, int]:
        size = DTYPES[self.dtype].itemsize
        gradients = (self.rows + self.classes) * self.features * size
        return {"logits": self.rows * self.classes * size, "gradients": gradients}


# In both of the types that models are trained in; on CUDA, the size of which others publish figures
# and four times as many rows.
HEADS = {
    "cpu": [Head(2048, 768, 32000), Head(2048, 768, 32000, "bf16")],
    "cuda": [Head(4096, 4096, 128256, "bf16"), Head(16384, 4096, 128256, "bf16")],
}
# What memory is measured over: the vocabularies of Llama 2, Llama 3 and Gemma.
VOCABULARIES = (32000, 128256, 256000)
TALL = {"cpu": Head(2048, 768, 0, "bf16"), "cuda": Head(16384, 4096, 0, "bf16")}
QUICK = [Head(64, 16, 500)]
QUICK_VOCABULARIES = (20000, 40000)

Call = Callable[[], tuple[Tensor, ...]]


class Problem:
    """The tensors of a head: hidden states, a weight that spreads the logits over a few units, and
    targets."""

    def __init__(self, head: Head, device: str) -> None:
        torch.manual_seed(0)
        kind = {"dtype": DTYPES[head.dtype], "device": device}
        self.head = head
        self.input = torch.randn(head.rows, head.features, **kind).requires_grad_()
        self.weight = torch.empty(head.classes, head.features, **kind)
        self.weight.normal_(std=head.features**-0.5).requires_grad_()
        self.target = torch.randint(head.classes, (head.rows,), device=device)

    def loss_and_gradients(self, loss: Tensor) -> tuple[Tensor, ...]:
        return loss.detach(), *torch.autograd.grad(loss, (self.input, self.weight))


def gemms(problem: Problem) -> Call:
    """Into memory that has been touched before: they pay for arithmetic alone."""
    input, weight = problem.input.detach(), problem.weight.detach()
    logits = torch.mm(input, weight.t())
    input_grad, weight_grad = torch.zeros_like(input), torch.zeros_like(weight)

    def call() -> tuple[Tensor, ...]:
        torch.mm(input, weight.t(), out=logits)
        torch.mm(logits, weight, out=input_grad)
        torch.mm(logits.t(), input, out=weight_grad)
        return ()

    return call


def stock(problem: Problem) -> Call:
    def call() -> tuple[Tensor, ...]:
        logits = F.linear(problem.input, problem.weight)
        return problem.loss_and_gradients(F.cross_entropy(logits, problem.target))

    return call


def torch_chunks(problem: Problem) -> Call:
    options = nn.LinearCrossEntropyOptions()  # torch 2.13 and newer

    def call() -> tuple[Tensor, ...]:
        loss = F.linear_cross_entropy(
            problem.input, problem.weight, problem.target, options=options
        )
        return problem.loss_and_gradients(loss)

    return call


def fused(problem: Problem) -> Call:
    from fused_ce import linear_cross_entropy

    def call() -> tuple[Tensor, ...]:
        loss = linear_cross_entropy(problem.input, problem.weight, problem.target)
        return problem.loss_and_gradients(loss)

    return call


PROVIDERS = {"gemms": gemms, "stock": stock, "torch chunks": torch_chunks, "fused": fused}
LABELS = {
    "stock": "F.linear, F.cross_entropy",
    "torch chunks": "torch's own chunks",
    "fused": "fused_ce.linear_cross_entropy",
}
LINES = {"stock": MARKS["stock"], "torch chunks": MARKS["compile"], "fused": MARKS["fused"]}


@dataclass
class Figures:
    """One provider on one head."""

    provider: str
    head: Head
    samples: list[float] = field(default_factory=list)  # milliseconds
    ratios: list[float] = field(default_factory=list)  # to the GEMMs of the same round
    peak: int | None = None  # bytes beyond what was there before
    reason: str = ""

    @property
    def median(self) -> float | None:
        return median(self.samples) if self.samples else None

    def as_data(self) -> dict[str, Any]:
        head = {"name": self.head.name, **asdict(self.head), "bytes": self.head.bytes}
        return {
            "provider": self.provider,
            "head": head,
            "reason": self.reason,
            "median_ms": self.median,
            "tflops": self.head.flops / self.median / 1e9 if self.median else None,
            "ratio_to_gemms": median(self.ratios) if self.ratios else None,
            "peak_extra_bytes": self.peak,
            "samples_ms": [round(sample, 3) for sample in self.samples],
        }


def check(answer: Sequence[Tensor], reference: Sequence[Tensor], dtype: str) -> None:
    """Only faults that no rounding explains; stock's own answer is the reference."""
    for what, value, expected in zip(("loss", "input", "weight"), answer, reference, strict=True):
        apart = (value - expected).abs().max().item()
        allowed = 2 * TOLERANCES[dtype] * expected.abs().max().item()
        if not apart <= allowed:
            raise ArithmeticError(f"{what} is {apart:.3g} from stock's, allowed {allowed:.3g}")


def time_here(head: Head, device: Device, effort: Effort, notice: Notice) -> list[Figures]:
    problem = Problem(head, device.name)
    figures, calls, answers = [], {}, {}
    for name, make in PROVIDERS.items():
        notice(f"{head.name}: warming up {name}")
        found = Figures(name, head)
        figures.append(found)
        try:
            calls[name] = make(problem)
            answers[name] = calls[name]()
            if name == "fused":
                check(answers[name], answers["stock"], head.dtype)
        except Exception as error:
            found.reason = first_line(error)
            calls.pop(name, None)
    answers.clear()
    notice(f"{head.name}: timing")
    order, start = random.Random(0), perf_counter()
    for done in range(effort.most):
        if done >= effort.least and perf_counter() - start > effort.seconds:
            break
        for found in order.sample(figures, len(figures)):
            if found.provider in calls:
                call = calls[found.provider]
                found.samples.append(device.milliseconds(lambda _, call=call: call(), [None]))
    alone = figures[0].samples
    for found in figures:
        found.ratios = [a / b for a, b in zip(found.samples, alone, strict=False)]
    return figures


def peak_here(head: Head, name: str, device: Device) -> int | None:
    device.keep_nothing_freed()
    call = PROVIDERS[name](Problem(head, device.name))
    call()  # the library of the GEMMs now has the buffers that it keeps
    return device.rise(call)


def notices_of(heads: Sequence[Head], vocabularies: Sequence[int]) -> int:
    return len(heads) * (len(PROVIDERS) + 1) + len(vocabularies) * len(LINES)


def time_heads(
    heads: Sequence[Head], device: Device, effort: Effort, notice: Notice
) -> list[Figures]:
    figures = []
    for head in heads:
        try:
            figures += fresh_process.call(time_here, head, device, effort, notice=notice)
        except fresh_process.Failed as failure:
            figures += [Figures(name, head, reason=str(failure)) for name in PROVIDERS]
    return figures


def measure_peaks(heads: Iterable[Head], device: Device, notice: Notice) -> list[Figures]:
    figures = []
    for head in heads:
        for name in LINES:
            notice(f"{head.name}: memory of {name}")
            found = Figures(name, head)
            try:
                found.peak = fresh_process.call(peak_here, head, name, device)
            except fresh_process.Failed as failure:
                found.reason = str(failure)
            figures.append(found)
    return figures


def time_table(figures: Sequence[Figures]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, title_justify="left", title_style="bold")
    table.title = "forward+backward of a head"
    for heading in ("rows x features-classes", "provider"):
        table.add_column(heading, no_wrap=True)
    for heading in ("ms", "min", "TFLOP/s", "x GEMMs"):
        table.add_column(heading, justify="right", no_wrap=True)
    for found in figures:
        data = found.as_data()
        tflops, ratio = data["tflops"], data["ratio_to_gemms"]
        table.add_row(
            found.head.name if found.provider == "gemms" else "",
            found.provider,
            milliseconds_text(found.median),
            milliseconds_text(min(found.samples, default=None)),
            DASH if tflops is None else f"{tflops:.3g}",
            ratio_text(ratio),
            style="bold" if found.provider == "fused" else "",
            end_section=found.provider == "fused",
        )
    return table


def memory_table(figures: Sequence[Figures]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, title_justify="left", title_style="bold")
    table.title = "peak memory of forward+backward beyond input and weight"
    table.add_column("rows x features-classes", no_wrap=True)
    for heading in ("gradients", *LINES):
        table.add_column(heading, justify="right", no_wrap=True)
    for head in dict.fromkeys(found.head for found in figures):
        peaks = [found.peak for found in figures if found.head == head]
        texts = [DASH if peak is None else memory_text(peak) for peak in peaks]
        table.add_row(head.name, memory_text(head.bytes["gradients"]), *texts)
    return table


def draw_memory(figures: Sequence[Figures], note: str, path: Path) -> None:
    heads = list(dict.fromkeys(found.head for found in figures))
    first = heads[0]
    figure = new_figure(
        f"Peak memory of a head's forward+backward, {first.rows} rows of {first.features} features,"
        f" {first.dtype}",
        note,
        4.6,
    )
    axes = figure.subplots()
    style(axes)
    axes.grid(color=FAINT, linewidth=0.7)
    classes = [head.classes for head in heads]
    for name, (color, marker, _) in LINES.items():
        points = [(f.head.classes, f.peak) for f in figures if f.provider == name and f.peak]
        if points:
            across, up = zip(*points, strict=True)
            axes.plot(across, up, color=color, marker=marker, linewidth=1.8, label=LABELS[name])
    least = [head.bytes["gradients"] for head in heads]
    axes.plot(classes, least, color=MARKS["copy"][0], linestyle=":", label="the gradients alone")
    axes.set_xticks(classes, [f"{count:,}" for count in classes])
    axes.set_xlabel("classes", color=INK)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1e9:g} GB"))
    axes.set_ylim(bottom=0)
    legend(figure, [axes], [*LABELS.values(), "the gradients alone"], columns=2)
    save(figure, path)


def reasons(figures: Sequence[Figures]) -> list[str]:
    return [f"{f.provider}, {f.head.name}: {f.reason}" for f in figures if f.reason]
