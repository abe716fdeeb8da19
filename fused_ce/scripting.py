"""What ``torch.jit.script`` gets, which cannot compile our functions and modules: an error, or
torch's function where ours is in its place."""

from collections.abc import Callable
from typing import NoReturn

import torch.nn.functional as F


def refusal(name: str, instead: str, torch_compile_takes: str) -> Callable[..., NoReturn]:
    """A ``__prepare_scriptable__`` that says what to give to TorchScript instead."""

    def refuse(*_: object) -> NoReturn:
        raise RuntimeError(
            f"fused_ce.{name} cannot be scripted; torch.jit.script takes {instead}, and "
            f"torch.compile takes {torch_compile_takes}."
        )

    return refuse


def stocks_or_refusal(
    ours: Callable, stocks: Callable | None, instead: str, torch_compile_takes: str
) -> Callable[[], Callable]:
    """The same of a function. A script that names torch's means torch's, whatever is there."""
    name = ours.__name__
    refuse = refusal(name, instead, torch_compile_takes)

    def prepare() -> Callable:
        if stocks not in (None, ours) and getattr(F, name, None) is ours:
            return stocks
        refuse()

    return prepare
