"""A word to Dynamo, ``torch.compile``'s tracer, without its import.

``torch.compiler``'s decorators import Dynamo, which takes nearly as long as all of torch.
"""

from collections.abc import Callable
from typing import TypeVar

F = TypeVar("F", bound=Callable)


def constant_in_graphs(function: F) -> F:
    """As ``torch.compiler.assume_constant_result``: a graph has the result and not the call."""
    function._dynamo_marked_constant = True
    return function
