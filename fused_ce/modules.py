"""The losses as modules: ``nn.CrossEntropyLoss`` and ``nn.LinearCrossEntropyLoss`` with some
options more.

They inherit everything that is not the call itself, so buffers, state dicts, pickling and
``isinstance`` checks are stock's own. What a function takes by name alone, and stock's constructor
does not, is an attribute of its module, handed on as it is, unless a call says otherwise. torch
before 2.13 has no
``nn.LinearCrossEntropyLoss``; there its constructor is ours.
"""

import copy
import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.modules.loss import _WeightedLoss

from .explaining import explain_call
from .functional import cross_entropy
from .likelihood import log_softmax, nll_loss
from .linear import linear_cross_entropy
from .linear.plan import check_limits
from .pointwise import binary_cross_entropy_with_logits, kl_div
from .scripting import refusal
from .signatures import keyword_options

M = TypeVar("M", bound=type[nn.Module])


def _with_options_of(function: Callable, *but: str) -> Callable[[M], M]:
    """Gives a module's constructor the options of ``function`` that stock's does not have.

    A module without one of them, as an older pickle is, has the default. It is no attribute of the
    class: that would hide a parameter or a buffer of this name.
    """

    def decorate(module: M) -> M:
        inherited = inspect.signature(module.__mro__[1].__init__).parameters
        known = {*inherited, *but}
        added = {n: p for n, p in keyword_options(function).items() if n not in known}
        defaults = {name: parameter.default for name, parameter in added.items()}

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            given = {name: kwargs.pop(name, default) for name, default in defaults.items()}
            construct = super(module, self).__init__
            if given.get("process_group") is not None:
                construct = partial(self._of_rank, construct, given["process_group"])
            if "chunk_size" in given:
                check_limits(given["chunk_size"], given["max_chunk_bytes"])
            construct(*args, **kwargs)
            for name, value in given.items():
                setattr(self, name, value)

        def options_of(self, given: dict[str, Any]) -> dict[str, Any]:
            """Those of a call: what it is given, and else the module's own."""
            unknown = given.keys() - defaults.keys()
            if unknown:
                raise TypeError(
                    f"{type(self).__name__}.forward() got an unexpected keyword argument "
                    f"{min(unknown)!r}"
                )
            return {n: getattr(self, n, default) for n, default in defaults.items()} | given

        def extra_repr(self) -> str:
            """What stock's module shows, and the options that were chosen here."""
            stocks = super(module, self).extra_repr()
            chosen = [
                f"{name}={_shown(value)}"
                for name, value in self._options_of({}).items()
                if isinstance(value, Tensor) or value != defaults[name]
            ]
            return ", ".join([stocks, *chosen] if stocks else chosen)

        def explain(self, input: Tensor, target: Tensor, **options: Any) -> str:
            """Says how this module would take a call, as :func:`fused_ce.explain_call` does."""
            return self._computed(partial(explain_call, function), input, target, options)

        module.extra_repr = extra_repr
        module.explain = explain
        parameters = [*inherited.values(), *added.values()]
        __init__.__signature__ = inspect.Signature(parameters, return_annotation=None)
        module.__init__ = __init__
        module._options_of = options_of
        module.__constants__ = [*getattr(module, "__constants__", ()), *added]
        return module

    return decorate


def _shown(value: Any) -> str:
    return f"tensor{tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


class _SharesGroup(nn.Module):
    """What may have a process group, which can be neither copied nor pickled."""

    def _of_rank(self, construct: Callable, process_group: Any, *args: Any, **kwargs: Any) -> None:
        """Calls stock's constructor for this rank of a group."""
        construct(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_SharesGroup":
        group = getattr(self, "process_group", None)
        memo[id(group)] = group
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def __getstate__(self) -> dict[str, Any]:
        if getattr(self, "process_group", None) is not None:
            raise TypeError(
                f"fused_ce: a {type(self).__name__} with a process_group cannot be pickled; save "
                "its state_dict, or give the process_group to its call."
            )
        return self.__dict__


@_with_options_of(cross_entropy)
class CrossEntropyLoss(nn.CrossEntropyLoss, _SharesGroup):
    r"""Cross entropy between logits and target, in one fused pass; a drop-in for
    :class:`torch.nn.CrossEntropyLoss`.

    With class indices :math:`y_n`, class weights :math:`w` and smoothing :math:`\epsilon`, the loss
    of a row :math:`n` that is not ignored is

    .. math::
        \ell_n = (1 - \epsilon)\, w_{y_n} \bigl(\mathrm{lse}(x_n) - x_{n,y_n}\bigr)
        + \frac{\epsilon}{C} \sum_{c=1}^{C} w_c \bigl(\mathrm{lse}(x_n) - x_{n,c}\bigr),
        \qquad \mathrm{lse}(x_n) = \log \sum_{c=1}^{C} \exp(x_{n,c})

    and ``'mean'`` divides their sum by :math:`\sum_n w_{y_n}`. Class probabilities work as in
    stock. Label smoothing is that of `Rethinking the Inception Architecture for Computer Vision
    <https://arxiv.org/abs/1512.00567>`__.

    Args:
        weight, size_average, ignore_index, reduce, reduction, label_smoothing: as in
            :class:`torch.nn.CrossEntropyLoss`.
        others: what :func:`fused_ce.cross_entropy` takes by name alone, with its defaults.

    Shape:
        - Input: :math:`(C)`, :math:`(N, C)` or :math:`(N, C, d_1, ..., d_K)`.
        - Target: class indices of the input's shape without :math:`C`, or probabilities of the
          input's shape.
        - Output: a scalar, or the shape without :math:`C` for ``reduction='none'``.

    Example::

        >>> import fused_ce
        >>> import torch
        >>> loss = fused_ce.CrossEntropyLoss(label_smoothing=0.1)
        >>> input = torch.randn(3, 5, requires_grad=True)
        >>> output = loss(input, torch.tensor([1, 0, 4]))
        >>> output.backward()
        >>> input.grad.shape
        torch.Size([3, 5])
    """

    __prepare_scriptable__ = refusal("CrossEntropyLoss", "torch.nn.CrossEntropyLoss", "both")

    def forward(self, input: Tensor, target: Tensor, **options: Any) -> Tensor:
        """Returns the loss of ``input`` against ``target``. An option that the constructor takes by
        name alone may be given to one call as well, as ``sample_weight`` and ``denominator`` are.
        """
        return self._computed(cross_entropy, input, target, options)

    def _computed(self, by: Callable, input: Tensor, target: Tensor, options: dict) -> Any:
        return by(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            **self._options_of(options),
        )


if hasattr(nn, "LinearCrossEntropyLoss"):
    _LinearCrossEntropyLoss = nn.LinearCrossEntropyLoss
else:

    class _LinearCrossEntropyLoss(_WeightedLoss):
        """What ``nn.LinearCrossEntropyLoss`` is in torch 2.13, but for its call."""

        def __init__(
            self,
            in_features: int,
            num_classes: int,
            *,
            out_features: tuple[int, ...] = (),
            bias: bool = False,
            device: Any = None,
            dtype: Any = None,
            reduction: str = "mean",
            weight: Tensor | None = None,
            ignore_index: int | None = None,
            label_smoothing: float = 0.0,
            options: Any = None,
        ) -> None:
            if weight is not None and weight.shape != (num_classes,):
                raise RuntimeError(
                    f"expected weight shape to be {(num_classes,)}, got {tuple(weight.shape)}"
                )
            if label_smoothing < 0 or label_smoothing > 1.0:
                raise RuntimeError(
                    f"expected label_smoothing to be in range [0, 1], got {label_smoothing}"
                )
            super().__init__(weight=weight, reduction=reduction)
            self.num_classes = num_classes
            self.out_features = out_features
            self.ignore_index = ignore_index
            self.label_smoothing = label_smoothing
            self.linear = nn.Linear(
                in_features,
                math.prod(out_features, start=num_classes),
                bias=bias,
                device=device,
                dtype=dtype,
            )
            self.options = options

        def extra_repr(self) -> str:
            return (
                f"in_features={self.linear.in_features}, num_classes={self.num_classes}, "
                f"out_features={self.out_features}, bias={self.linear.bias is not None}, "
                f"reduction={self.reduction}, ignore_index={self.ignore_index}, "
                f"label_smoothing={self.label_smoothing}, options={self.options}"
            )


# The bias is that of the layer, whose classes follow from the rank.
@_with_options_of(linear_cross_entropy, "linear_bias", "class_offset")
class LinearCrossEntropyLoss(_LinearCrossEntropyLoss, _SharesGroup):
    r"""A linear layer and the cross entropy of its output, which is never held as a whole; a
    drop-in for ``torch.nn.LinearCrossEntropyLoss`` of torch 2.13 and newer, for any torch.

    See :func:`fused_ce.linear_cross_entropy` for what is computed, and
    :class:`fused_ce.CrossEntropyLoss` for the formula of the loss. The layer is the attribute
    ``linear``, a :class:`torch.nn.Linear`; its weight can be tied to an embedding's.

    Args:
        in_features (int): features of each input row, :math:`H`.
        num_classes (int): number of classes, :math:`C`. With a ``process_group`` the layer has
            those of this rank, as :func:`torch.chunk` divides them.
        out_features (tuple[int], optional): the dimensions :math:`(d_1, ..., d_K)` of a
            K-dimensional loss. Default: ``()``
        bias (bool): whether the layer has a bias. Default: ``False``
        device, dtype: of the layer.
        others: what :func:`fused_ce.linear_cross_entropy` takes by name alone, with its defaults;
            the bias is the layer's own.

    Shape:
        - Input: :math:`(H)`, :math:`(N, H)` or :math:`(B, ..., H)`.
        - Target: the batch dimensions, then :math:`d_1, ..., d_K`; for probabilities with
          :math:`C` between them.
        - Output: a scalar, or the shape of the class indices for ``reduction='none'``.

    Example::

        >>> import fused_ce
        >>> import torch
        >>> loss = fused_ce.LinearCrossEntropyLoss(16, 1000)
        >>> hidden = torch.randn(3, 16, requires_grad=True)
        >>> output = loss(hidden, torch.tensor([1, 0, 4]))
        >>> output.backward()
        >>> loss.linear.weight.grad.shape
        torch.Size([1000, 16])
    """

    __prepare_scriptable__ = refusal(
        "LinearCrossEntropyLoss", "torch.nn.Linear and torch.nn.CrossEntropyLoss", "all of them"
    )

    def _of_rank(
        self,
        construct: Callable,
        process_group: Any,
        in_features: int,
        num_classes: int,
        *,
        weight: Tensor | None = None,
        **others: Any,
    ) -> None:
        from .parallel.partition import classes_of_rank

        construct(in_features, classes_of_rank(num_classes, process_group), **others)
        self.num_classes, self.weight = num_classes, weight

    def forward(self, input: Tensor, target: Tensor, **options: Any) -> Tensor:
        """Returns the loss of ``input``, through the layer, against ``target``, with options as in
        :class:`fused_ce.CrossEntropyLoss`."""
        return self._computed(linear_cross_entropy, input, target, options)

    def _computed(self, by: Callable, input: Tensor, target: Tensor, options: dict) -> Any:
        layer = self.linear
        positions = math.prod(self.out_features)
        shape = (layer.out_features // max(positions, 1), *self.out_features)
        options = self._options_of(options)
        if options["process_group"] is not None:
            options["num_classes"] = self.num_classes
        return by(
            input,
            layer.weight.reshape(*shape, layer.in_features),
            target,
            linear_bias=None if layer.bias is None else layer.bias.reshape(shape),
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            options=self.options,
            **options,
        )


class LogSoftmax(nn.LogSoftmax):
    """The logarithm of the softmax along a dimension; a drop-in for :class:`torch.nn.LogSoftmax`.

    See :func:`fused_ce.log_softmax` for the formula, and for the loss that this is half of.

    Args:
        dim (int): the dimension of the classes. Without it torch chooses one, and warns.

    Shape:
        - Input: any.
        - Output: the input's shape, contiguous.

    Example::

        >>> import fused_ce
        >>> import torch
        >>> fused_ce.LogSoftmax(dim=1)(torch.zeros(2, 4)).exp().sum(1).tolist()
        [1.0, 1.0]
    """

    __prepare_scriptable__ = refusal("LogSoftmax", "torch.nn.LogSoftmax", "both")

    def forward(self, input: Tensor) -> Tensor:
        return log_softmax(input, self.dim, _stacklevel=5)


class NLLLoss(nn.NLLLoss):
    """The negative log-likelihood of the targets; a drop-in for :class:`torch.nn.NLLLoss`.

    See :func:`fused_ce.nll_loss` for the formula.

    Args:
        weight, size_average, ignore_index, reduce, reduction: as in :class:`torch.nn.NLLLoss`.

    Shape:
        - Input: :math:`(C)`, :math:`(N, C)` or :math:`(N, C, d_1, ..., d_K)`, log-probabilities.
        - Target: class indices of the input's shape without :math:`C`.
        - Output: a scalar, or the target's shape for ``reduction='none'``.

    Example::

        >>> import fused_ce
        >>> import torch
        >>> criterion, log_softmax = fused_ce.NLLLoss(), fused_ce.LogSoftmax(dim=1)
        >>> input = torch.tensor([[2.0, 0.5, 0.1]], requires_grad=True)
        >>> loss = criterion(log_softmax(input), torch.tensor([0]))
        >>> loss.backward()
        >>> print(f"{loss.item():.4f}")
        0.3168
    """

    __prepare_scriptable__ = refusal("NLLLoss", "torch.nn.NLLLoss", "both")

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return nll_loss(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
        )


@_with_options_of(binary_cross_entropy_with_logits)
class BCEWithLogitsLoss(nn.BCEWithLogitsLoss):
    """Binary cross entropy between logits and target, in one fused pass; a drop-in for
    :class:`torch.nn.BCEWithLogitsLoss`.

    See :func:`fused_ce.binary_cross_entropy_with_logits` for the formula.

    Args:
        weight, size_average, reduce, reduction, pos_weight: as in
            :class:`torch.nn.BCEWithLogitsLoss`.
        others: what :func:`fused_ce.binary_cross_entropy_with_logits` takes by name alone.

    Shape:
        - Input and target: any shape, the same for both.
        - Output: a scalar, or the input's shape for ``reduction='none'``.

    Example::

        >>> import fused_ce
        >>> import torch
        >>> loss = fused_ce.BCEWithLogitsLoss(pos_weight=torch.full((4,), 3.0))
        >>> input = torch.randn(3, 4, requires_grad=True)
        >>> output = loss(input, torch.ones(3, 4))
        >>> output.backward()
        >>> input.grad.shape
        torch.Size([3, 4])
    """

    __prepare_scriptable__ = refusal("BCEWithLogitsLoss", "torch.nn.BCEWithLogitsLoss", "both")

    def forward(self, input: Tensor, target: Tensor, **options: Any) -> Tensor:
        """Returns the loss of ``input`` against ``target``, with options as in
        :class:`fused_ce.CrossEntropyLoss`."""
        return self._computed(binary_cross_entropy_with_logits, input, target, options)

    def _computed(self, by: Callable, input: Tensor, target: Tensor, options: dict) -> Any:
        return by(
            input,
            target,
            self.weight,
            pos_weight=self.pos_weight,
            reduction=self.reduction,
            **self._options_of(options),
        )


@_with_options_of(kl_div)
class KLDivLoss(nn.KLDivLoss):
    """The Kullback-Leibler divergence of log-probabilities from a target, in one fused pass; a
    drop-in for :class:`torch.nn.KLDivLoss`.

    See :func:`fused_ce.kl_div` for the formula.

    Args:
        size_average, reduce, reduction, log_target: as in :class:`torch.nn.KLDivLoss`.
        others: what :func:`fused_ce.kl_div` takes by name alone.

    Shape:
        - Input and target: any shape.
        - Output: a scalar, or the input's shape for ``reduction='none'``.

    Example::

        >>> import fused_ce
        >>> import torch
        >>> loss = fused_ce.KLDivLoss(reduction="batchmean")
        >>> input = torch.randn(3, 4, requires_grad=True)
        >>> output = loss(input.log_softmax(1), torch.full((3, 4), 0.25))
        >>> output.backward()
        >>> input.grad.shape
        torch.Size([3, 4])
    """

    __prepare_scriptable__ = refusal("KLDivLoss", "torch.nn.KLDivLoss", "both")

    def forward(self, input: Tensor, target: Tensor, **options: Any) -> Tensor:
        """Returns the loss of ``input`` against ``target``, with options as in
        :class:`fused_ce.CrossEntropyLoss`."""
        return self._computed(kl_div, input, target, options)

    def _computed(self, by: Callable, input: Tensor, target: Tensor, options: dict) -> Any:
        return by(
            input,
            target,
            reduction=self.reduction,
            log_target=self.log_target,
            **self._options_of(options),
        )
