"""What takes another function's arguments and hands them on, without naming them again.

So that an option is spelled out in one signature, and ``help`` shows it wherever it can be given.
"""

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


def takes_arguments_of(function: Callable) -> Callable[[T], T]:
    """Shows the signature of ``function`` as the decorated one's own, but for what it returns."""

    def decorate(decorated: T) -> T:
        returned = inspect.signature(decorated).return_annotation
        signature = inspect.signature(function).replace(return_annotation=returned)
        decorated.__signature__ = signature
        return decorated

    return decorate


def bound(function: Callable, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call of ``function`` by their names."""
    call = inspect.signature(function).bind(*args, **kwargs)
    call.apply_defaults()
    return call.arguments


def keyword_options(function: Callable) -> dict[str, inspect.Parameter]:
    """The arguments that can be given by name alone."""
    parameters = inspect.signature(function).parameters
    return {name: p for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
