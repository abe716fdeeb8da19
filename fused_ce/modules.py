"""The loss as a module: ``nn.CrossEntropyLoss`` with two options more.

It inherits everything that is not the call itself, so buffers, state dicts, pickling and
``isinstance`` checks are stock's own.
"""

from torch import Tensor, nn

from .functional import cross_entropy


class CrossEntropyLoss(nn.CrossEntropyLoss):
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
        grad_in_forward (bool): see :func:`fused_ce.cross_entropy`. Default: ``True``
        inplace (bool): let the gradient overwrite the logits; see
            :func:`fused_ce.cross_entropy`. Default: ``False``

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

    __constants__ = [*nn.CrossEntropyLoss.__constants__, "grad_in_forward", "inplace"]

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        grad_in_forward: bool = True,
        inplace: bool = False,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.grad_in_forward = grad_in_forward
        self.inplace = inplace

    def __prepare_scriptable__(self):
        raise RuntimeError(
            "fused_ce.CrossEntropyLoss cannot be scripted; torch.jit.script takes "
            "torch.nn.CrossEntropyLoss, and torch.compile takes both."
        )

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Returns the loss of ``input`` against ``target``."""
        return cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            grad_in_forward=self.grad_in_forward,
            inplace=self.inplace,
        )
