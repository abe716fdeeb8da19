"""A warning where stock PyTorch takes a call that the kernels were meant for.

It is asked for, since a fallback is right and often wanted. One is given for each reason and line
of the caller's code, whatever Python's filters remember, and from any thread.
"""

import sys
import threading
import warnings
from types import FrameType

from .dynamo import constant_in_graphs

is_on = False
_lock = threading.Lock()
_given: set[tuple[str, int, str]] = set()


class warn_on_fallback:
    """Switches on, or off, a warning for each call that falls back to stock PyTorch.

    It is a switch for the whole process, set as the object is made, and a context manager that puts
    back what was set before. A warning is given once for each reason and line of the caller's code.
    The reason is that of :func:`fused_ce.explain` or :func:`fused_ce.explain_linear`. A backward
    that falls back, as one under ``create_graph=True`` does, gives none.

    Args:
        mode (bool): whether to warn. Default: ``True``

    Example::

        >>> import fused_ce
        >>> import torch
        >>> input, target = torch.randn(3, 5), torch.tensor([0, 1, 2])
        >>> with fused_ce.warn_on_fallback():
        ...     with warnings.catch_warnings(record=True) as caught:
        ...         gradient = torch.func.grad(fused_ce.cross_entropy)(input, target)
        >>> print(str(caught[0].message).split(":")[0])
        stock PyTorch takes this call of fused_ce.cross_entropy
    """

    def __init__(self, mode: bool = True) -> None:
        self._before = is_on
        _switch(mode)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        _switch(self._before)


def _switch(mode: bool) -> None:
    global is_on
    with _lock:
        if mode and not is_on:
            _given.clear()
        is_on = bool(mode)


@constant_in_graphs
def warn(function: str, reason: str) -> None:
    """For the line that called the package; in a graph, for the line that had it compiled."""
    frame = callers_frame()
    place = frame.f_code.co_filename, frame.f_lineno
    with _lock:
        if (*place, reason) in _given:
            return
        _given.add((*place, reason))
    warn_at(frame, f"stock PyTorch takes this call of fused_ce.{function}: {reason}")


def warn_at(frame: FrameType, text: str) -> None:
    place = frame.f_code.co_filename, frame.f_lineno
    warnings.warn_explicit(text, UserWarning, *place, module=frame.f_globals.get("__name__"))


def callers_frame() -> FrameType:
    """The innermost frame that is neither ours nor torch's."""
    frame = sys._getframe(1)
    while frame.f_back is not None and _is_between(frame):
        frame = frame.f_back
    return frame


def _is_between(frame: FrameType) -> bool:
    return frame.f_globals.get("__name__", "").partition(".")[0] in ("fused_ce", "torch")
