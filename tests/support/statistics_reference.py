"""What the tests of the row statistics compare with: the composition that people write."""

import torch

import fused_ce
from support.grids import SHAPES
from support.layouts import lay_out
from support.reference import assert_as_accurate, one_thread, same_layout

FIELDS = ("log_prob", "entropy", "logsumexp")


def composed(input, target, *, dim=1, temperature=1.0, softcap=None, ignore_index=-100):
    """In the type of the logits, or in float32 for the half types."""
    logits = input.movedim(dim, -1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    distribution = torch.distributions.Categorical(logits=logits, validate_args=False)
    entropy, lse = distribution.entropy(), logits.logsumexp(-1)
    if target is None:
        return None, entropy, lse, logits.argmax(-1)
    target = target.long()
    keep = target != ignore_index
    log_p = logits.log_softmax(-1)
    log_prob = log_p.gather(-1, target.where(keep, 0)[..., None]).squeeze(-1)
    rows = (torch.where(keep, v, 0) for v in (log_prob, entropy, lse))
    return *rows, logits.argmax(-1).where(keep, -1)


def incoming(value, seed):
    """A multiple of 1/4 for each row, exact in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-6, 7, value.shape, generator=generator).to(value.dtype) / 4


def differentiate(function, input, target, *, wanted=FIELDS, **options):
    """The statistics, and the gradient for what arrives at those that are wanted."""
    leaf = same_layout(input).requires_grad_()
    stats = function(leaf, target, **options)
    found = dict(zip(FIELDS, stats, strict=False))
    pairs = [
        (found[name], incoming(found[name], seed))
        for seed, name in enumerate(FIELDS)
        if name in wanted and found[name] is not None
    ]
    values, grads = zip(*pairs, strict=True)
    (grad,) = torch.autograd.grad(values, leaf, grads)
    return [None if v is None else v.detach() for v in stats], grad


def ours(input, target, **options):
    """`fused_ce.softmax_stats` over dimension 1; fails if the kernels do not take the call."""
    options = {"dim": min(1, input.dim() - 1), "argmax": True, **options}
    said = fused_ce.explain_stats(input, target, **options)
    assert said.startswith("fused"), said
    return fused_ce.softmax_stats(input, target, **options)


@one_thread()
def check(input, target, *, luck=2.0, **options):
    """Ours is no further from float64 than the composition is, plus one ulp."""
    dim = min(1, input.dim() - 1)
    stats, grad = differentiate(ours, input, target, **options)
    same, same_grad = differentiate(composed, input, target, dim=dim, **options)
    exact, exact_grad = differentiate(composed, input.double(), target, dim=dim, **options)
    # The maxima are those of different rows: where there is a tanh, of those that it rounded worst.
    capped = options.get("softcap") is not None
    for name, *values in zip(FIELDS, stats, same, exact, strict=False):
        if values[1] is not None:
            assert_as_accurate(*values, name, luck=2.0 if capped else 1.0)
    luck = 1.5 * luck if capped else luck
    assert_as_accurate(grad, same_grad, exact_grad, "gradient", luck=luck)
    return stats, grad


def logits_of(shape, layout, classes, dtype, scale=3.0):
    return lay_out((torch.randn(SHAPES[shape](classes)) * scale).to(dtype), layout)


def target_of(input, kind=torch.int64, ignored=True):
    """Class indices, every third of them -100, or 255 where there is no such number."""
    shape = input.shape[:0] if input.dim() == 1 else input.shape[:1] + input.shape[2:]
    classes = input.shape[min(1, input.dim() - 1)]
    target = torch.randint(0, min(classes, 255), shape)
    if ignored and shape:
        target.view(-1)[1::3] = 255 if kind == torch.uint8 else -100
    return target.to(kind)
