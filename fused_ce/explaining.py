"""``explain_call``: how any function of the package would take a call.

Each function has an explainer beside it, which knows its kernels and its reasons; here is only
which explainer belongs to which function. A new function registers its own where it is defined.
"""

from collections.abc import Callable
from typing import Any, TypeVar

_Explainer = TypeVar("_Explainer", bound=Callable[..., str])
_explainers: dict[Callable, Callable[..., str]] = {}


def explains(function: Callable) -> Callable[[_Explainer], _Explainer]:
    """Registers what is decorated as the explainer of a function, whose arguments it takes."""

    def register(explainer: _Explainer) -> _Explainer:
        _explainers[function] = explainer
        return explainer

    return register


def explain_call(function: Callable, *args: Any, **kwargs: Any) -> str:
    """Says how a function or a loss of this package would take a call, without computing anything.

    Returns ``"fused: "`` and what the kernels would do, ``"stock: "`` and the reason why stock
    PyTorch or a formula of its operations takes the call, or ``"refused: "`` and the error.

    Args:
        function: one of this package, as :func:`fused_ce.cross_entropy`, or a module of it, as a
            :class:`fused_ce.CrossEntropyLoss`, whose own ``explain`` says the same.
        *args, **kwargs: those of the call.

    Raises:
        TypeError: for a function of another package, or arguments that the function does not take.

    Example::

        >>> import fused_ce
        >>> import torch
        >>> input, target = torch.randn(3, 5), torch.tensor([0, 1, 2])
        >>> fused_ce.explain_call(fused_ce.cross_entropy, input.to_sparse(), target)
        'stock: the logits are sparse'
    """
    own = getattr(function, "explain", None)
    if own is not None and hasattr(function, "_options_of"):
        return own(*args, **kwargs)
    try:
        explainer = _explainers[function]
    except (KeyError, TypeError):
        names = ", ".join(sorted(f.__name__ for f in _explainers))
        raise TypeError(
            f"fused_ce: expected a function of fused_ce ({names}), got {function!r}."
        ) from None
    return explainer(*args, **kwargs)
