"""``patch``: torch's own losses become ours, for code that one does not own.

What a module or function calls by ``torch.nn.functional``'s attribute is replaced, whenever it was
made; what has bound stock's function to a name of its own keeps that. Whatever falls back, scripts
or overrides reaches stock's functions beneath the attributes, so nothing meets itself.
"""

import logging
import threading
from types import MappingProxyType

import torch.nn.functional as F

from .functional import cross_entropy
from .linear import linear_cross_entropy
from .pointwise import binary_cross_entropy_with_logits, kl_div

REPLACEMENTS = MappingProxyType(
    {
        function.__name__: function
        for function in (
            cross_entropy,
            linear_cross_entropy,
            binary_cross_entropy_with_logits,
            kl_div,
        )
    }
)
_log = logging.getLogger("fused_ce")
_lock = threading.RLock()
_replaced: dict[str, object] = {}  # what the attributes were


class patch:
    """Puts this package's losses in the place of :mod:`torch.nn.functional`'s.

    They are ``cross_entropy``, ``binary_cross_entropy_with_logits``, ``kl_div`` and, in a torch
    that has it, ``linear_cross_entropy``. From then on ``torch.nn.CrossEntropyLoss`` and all other
    code that calls these runs the fused loss, for the whole process and for modules made before or
    after. The answers, the errors and the derivatives stay torch's. Calls that the kernels do not
    take stay stock's (:func:`fused_ce.warn_on_fallback` tells of them), and so does what is given
    to ``torch.jit.script``. A second call changes nothing.

    It is a context manager as well, which puts back what was there before; :func:`fused_ce.unpatch`
    does so without one. An attribute that somebody else has replaced since is left alone. Processes
    that are started with ``spawn`` patch for themselves.

    A script that one does not want to change is run by ``python -m fused_ce run SCRIPT``.

    Example::

        >>> import fused_ce
        >>> import torch
        >>> input, target = torch.tensor([[2.0, 0.5, 0.1]]), torch.tensor([0])
        >>> with fused_ce.patch():
        ...     torch.nn.functional.cross_entropy is fused_ce.cross_entropy
        ...     print(f"{torch.nn.CrossEntropyLoss()(input, target).item():.4f}")
        True
        0.3168
        >>> torch.nn.functional.cross_entropy is fused_ce.cross_entropy
        False
    """

    def __init__(self) -> None:
        with _lock:
            self._was_on = bool(_replaced)
            for name, ours in REPLACEMENTS.items():
                current = getattr(F, name, None)
                if current is not None and current is not ours:
                    _replaced.setdefault(name, current)
                    setattr(F, name, ours)
            self.names = tuple(name for name in REPLACEMENTS if name in _replaced)
            if not self._was_on and self.names:
                _log.info("torch.nn.functional.%s: fused_ce's", ", ".join(self.names))

    def __enter__(self) -> "patch":
        return self

    def __exit__(self, *_: object) -> None:
        if not self._was_on:
            unpatch()

    def __repr__(self) -> str:
        return f"<fused_ce.patch of torch.nn.functional: {', '.join(self.names)}>"


def unpatch() -> None:
    """Puts back what :class:`fused_ce.patch` replaced; of no effect where nothing is."""
    with _lock:
        for name, before in _replaced.items():
            if getattr(F, name, None) is REPLACEMENTS[name]:
                setattr(F, name, before)
        _replaced.clear()
