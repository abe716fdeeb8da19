"""The error of ``torch.jit.script``, which cannot compile our functions and modules."""

from collections.abc import Callable
from typing import NoReturn


def refusal(name: str, instead: str, torch_compile_takes: str) -> Callable[..., NoReturn]:
    """A ``__prepare_scriptable__`` that says what to give to TorchScript instead."""

    def refuse(*_: object) -> NoReturn:
        raise RuntimeError(
            f"fused_ce.{name} cannot be scripted; torch.jit.script takes {instead}, and "
            f"torch.compile takes {torch_compile_takes}."
        )

    return refuse
