"""What autograd is told of logits that a loss has overwritten.

They are no longer what their graph computed. As after any in-place operation of torch, the tensor
that owns their memory gets a new node; this one raises, where the gradient would be that of other
numbers. The loss goes back to the nodes from before, and hooks see there what they always saw. A
leaf is left alone: torch takes it for what it holds, whoever has written that. Where a node needs
its own result, as those of exp and relu do, the error is torch's, in words of ours.
"""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.graph import increment_version


class _Overwritten(Function):
    """The node of what has been overwritten."""

    @staticmethod
    def forward(ctx, owner):
        ctx.mark_dirty(owner)
        return owner

    @staticmethod
    def backward(ctx, grad_output):
        raise RuntimeError(
            "fused_ce: a loss with inplace=True has overwritten these logits with their "
            "gradient, so what was computed from them since cannot be differentiated; compute it "
            "before the loss, or use inplace=False."
        )


_become_overwritten = super(Function, _Overwritten).apply  # as in eager


class Logits:
    """Logits that are no leaf, and what they are a view of, by references that keep neither."""

    __slots__ = ("_input", "_owner")

    def __init__(self, input: Tensor) -> None:
        base = input._base
        self._input = weakref.ref(input)
        self._owner = self._input if base is None else weakref.ref(base)

    def overwritten(self, memory: Tensor) -> None:
        """Gives version and node to what is overwritten, of which `memory` is a tensor."""
        owner = self._owner()
        if owner is None or owner.is_leaf:
            increment_version(memory)
        else:
            if hasattr(owner.grad_fn, "_raw_saved_result"):
                owner.grad_fn.register_prehook(_before_it_needs_its_result)
            kept = owner.grad if owner.retains_grad else None
            # It is off, as in each forward and backward; a context manager takes longer than this.
            torch._C._set_grad_enabled(True)
            try:
                _become_overwritten(owner)
            finally:
                torch._C._set_grad_enabled(False)
            if kept is not None:
                owner.grad = kept
        self._refresh_view()

    def scaled(self, memory: Tensor) -> None:
        """The same once more, for who already has that node."""
        increment_version(memory)
        self._refresh_view()

    def hand_on_hooks(self, loss: Any) -> None:
        """Has hooks that now hang on the new nodes see the gradient that the loss's node sends to
        the old: those that keep a gradient, which moved there, and those that came later."""
        input, owner = self._input(), self._owner()
        if input is not None and input is not owner and _has_hooks(input) and _is_usable(input):
            _call_once(input, *loss.next_functions[0])
        if owner is not None and not owner.is_leaf and _has_hooks(owner):
            _call_once(owner, *owner.grad_fn.next_functions[0])

    def _refresh_view(self) -> None:
        """torch crashes where a hook is registered on a view that has not found its new node."""
        input = self._input()
        if input is not None and input is not self._owner():
            _is_usable(input)


def _before_it_needs_its_result(gradients: tuple) -> None:
    """Raises what the node that runs next is about to, in other words. A result that was packed
    elsewhere by hooks for saved tensors is as it was, and nothing is raised. The node is asked for
    here, since one that its own hook holds would wait for a search for garbage."""
    node = torch._C._current_autograd_node()
    try:
        _ = node._saved_result
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise RuntimeError(
            f"fused_ce: a loss with inplace=True has overwritten the result of {node.name()} with "
            "its gradient, and the backward of that layer needs the result; use inplace='auto', "
            "which sees this, or inplace=False."
        ) from error


def logits_of(input: Tensor) -> Logits | None:
    """None for a leaf, of which the version says all."""
    return None if input.is_leaf else Logits(input)


def _is_usable(view: Tensor) -> bool:
    """Whether a view finds its new node. One of several that a function returned finds none, keeps
    its hooks where they were, and may not be used any more, says torch."""
    try:
        return view.grad_fn is not None
    except RuntimeError:
        return False


def _has_hooks(tensor: Tensor) -> bool:
    return tensor.retains_grad or bool(tensor._backward_hooks)


def _call_once(tensor: Tensor, node: Any, index: int) -> None:
    """Before `node` runs, gives the gradient with this index to the hooks of the tensor."""
    weak, hooks, retains = weakref.ref(tensor), tensor._backward_hooks or {}, tensor.retains_grad

    def before(gradients: tuple) -> tuple | None:
        handle.remove()
        gradient = gradients[index]
        if gradient is None:
            return None
        for hook in hooks.values():
            changed = hook(gradient)
            gradient = gradient if changed is None else changed
        tensor = weak()
        if retains and tensor is not None:
            if tensor.grad is None:
                tensor.grad = gradient.clone(memory_format=torch.contiguous_format)
            else:
                tensor.grad = tensor.grad + gradient
        return *gradients[:index], gradient, *gradients[index + 1 :]

    handle = node.register_prehook(before)
