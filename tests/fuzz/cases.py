"""Random calls, as the text of a program that builds their arguments.

A case is text so that what is printed when it fails is what was run. Sizes are small or just beside
where the kernels change their way (a vector, a batch of rows, a block); everything else is drawn
from all that stock takes, and for operators from what nobody should pass.
"""

import math

from hypothesis import strategies as st
from support.grids import DIFFERENTIATING, MODES

FLOATS = ("float32", "float64", "bfloat16", "float16")
MAX_ELEMENTS = 200_000

classes_of = st.one_of(
    st.integers(1, 40), st.sampled_from([63, 64, 65, 255, 256, 257, 2047, 2049, 4097, 40000])
)
rows_of = st.one_of(st.integers(0, 9), st.sampled_from([31, 64, 65, 511, 513]))


@st.composite
def losses(draw):
    """`input`, `target`, `options`, `mode` and the `scale` of the incoming gradient."""
    shape = draw(shapes())
    dtype = draw(st.sampled_from(FLOATS))
    axis, mode = min(1, len(shape) - 1), draw(st.sampled_from(sorted(MODES)))
    lines = ["import torch", f"torch.manual_seed({draw(st.integers(0, 2**31))})"]
    lines += [strided(draw, "input", shape, dtype)]
    lines += [f"input.copy_({values(draw, shape)})"]
    if draw(st.integers(0, 4)) == 0:
        lines += [f"input.masked_fill_(torch.rand({shape}) < 0.2, -torch.inf)"]
        # Of an ignored row without a finite logit stock has nan, and we have zero.
        lines += [f"input.select({axis}, 0).zero_()"]
    lines += targets(draw, shape, axis, dtype)
    lines += [f"mode, scale = {mode!r}, {draw(st.sampled_from([1.0, 0.25, -3.0, 1024.0]))}"]
    return "\n".join(lines)


@st.composite
def extended(draw):
    """The same with options that stock does not have."""
    shape = draw(shapes())
    dtype = draw(st.sampled_from(FLOATS))
    axis, mode = min(1, len(shape) - 1), draw(st.sampled_from(sorted(MODES)))
    rows = shape[:axis] + shape[axis + 1 :]
    lines = ["import torch", f"torch.manual_seed({draw(st.integers(0, 2**31))})"]
    lines += [strided(draw, "input", shape, dtype)]
    lines += [f"input.copy_({values(draw, shape)})"]
    lines += targets(draw, shape, axis, dtype)
    choices = {name: draw(values) for name, values in EXTENSIONS.items()}
    # A power below 1 has no slope where a row is certain: what is composed is nan then.
    lines += [
        f"options.update({choices})",
        "if target.is_floating_point() or options['label_smoothing'] > 0:",
        "    options['focal_gamma'] = 0.0",
        # Equal logits and targets leave nothing but the rounding of what cancels.
        "options['label_smoothing'] = min(options['label_smoothing'], 0.1)",
        # The slopes of both losses are added up before they are rounded to the logits' type: of
        # rows that are certain the composed form keeps more of the z-loss's.
        "if target.is_floating_point():",
        "    options['z_loss'] = 0.0",
        "if options['reduction'] != 'mean':",
        "    options['denominator'] = None",
    ]
    if draw(st.booleans()):
        weight = f"torch.rand({rows}).round(decimals=1).to(torch.{dtype})"
        lines += [f"options['sample_weight'] = {weight}"]
    if draw(st.booleans()):
        lines += [
            "options['dtype'] = torch.promote_types(input.dtype, torch.float32)",
            "if 'weight' in options:",
            "    options['weight'] = options['weight'].to(options['dtype'])",
        ]
    lines += [f"mode, scale = {mode!r}, {draw(st.sampled_from([1.0, 0.25, -3.0]))}"]
    return "\n".join(lines)


EXTENSIONS = {
    "z_loss": st.sampled_from([0.0, 1e-4, 0.3]),
    "logit_scale": st.sampled_from([1.0, 0.3, -2.0, 16.0]),
    "softcap": st.sampled_from([None, None, 2.0, 30.0]),
    "focal_gamma": st.sampled_from([0.0, 1.0, 2.0, 5.0]),
    "denominator": st.sampled_from([None, 3.0]),
    "on_all_ignored": st.sampled_from(["nan", "zero"]),
}


@st.composite
def pointwise(draw):
    """`function`, `input`, `target`, `options`, `mode` and `scale` of a loss of single elements."""
    shape, dtype = draw(shapes()), draw(st.sampled_from(FLOATS))
    function = draw(st.sampled_from(sorted(POINTWISE)))
    mode = draw(st.sampled_from(sorted(DIFFERENTIATING)))
    options = {name: draw(values) for name, values in POINTWISE[function].items()}
    lines = ["import torch", f"torch.manual_seed({draw(st.integers(0, 2**31))})"]
    lines += [strided(draw, name, shape, dtype) for name in ("input", "target")]
    lines += [f"options = {options}"]
    numbers, axis = values(draw, shape), min(1, len(shape) - 1)
    if function == "kl_div":
        lines += [
            f"input.copy_(({numbers}).log_softmax({axis}))",
            f"target.copy_(torch.randn({shape}).log_softmax({axis}))",
            "if not options['log_target']:",
            "    target.exp_().masked_fill_(target < 0.01, 0)",
        ]
    else:
        # What is sure of the wrong class has losses of 1e3, and one that is not sure is beside it.
        lines += [f"input.copy_({numbers})", f"target.copy_(torch.randint(2, {shape}))"]
        lines += [f"target.copy_(target.where(torch.rand({shape}) < 0.7, torch.rand({shape})))"]
    if function == "binary_cross_entropy_with_logits":
        for name in ("weight", "pos_weight"):
            kept = draw(st.sampled_from([None, shape[1:], shape[-1:], (), shape]))
            if kept is not None:
                lines += [f"options[{name!r}] = torch.rand({kept}).mul(3).to(torch.{dtype})"]
    lines += [f"mode, scale = {mode!r}, {draw(st.sampled_from([1.0, 0.25, -3.0, 1024.0]))}"]
    return "\n".join([*lines, f"function = {function!r}"])


_REDUCTIONS = ["none", "mean", "sum"]
POINTWISE = {
    "binary_cross_entropy_with_logits": {"reduction": st.sampled_from(_REDUCTIONS)},
    "sigmoid_focal_loss": {
        "reduction": st.sampled_from(_REDUCTIONS),
        "alpha": st.sampled_from([0.25, -1, 0.0, 1.0]),
        "gamma": st.sampled_from([2, 0.0, 0.5, 1.0, 1.5, 2.5, 3.0, 5.0, 0.3]),
    },
    "kl_div": {
        "reduction": st.sampled_from([*_REDUCTIONS, "batchmean"]),
        "log_target": st.booleans(),
    },
}


@st.composite
def heads(draw):
    """`input`, `linear_weight`, `linear_bias`, `target`, `options` and `chunks`."""
    features, classes = draw(st.integers(1, 40)), draw(st.integers(1, 300))
    positions = draw(st.sampled_from([(), (), (1,), (3,)]))
    rows, dtype = draw(st.integers(0, 70)), draw(st.sampled_from(FLOATS))
    shape = (rows, classes, *positions)
    weight = (classes, *positions, features)
    lines = ["import torch", f"torch.manual_seed({draw(st.integers(0, 2**31))})"]
    lines += [strided(draw, "input", (rows, features), dtype)]
    lines += [f"input.copy_({values(draw, (rows, features))})"]
    lines += [strided(draw, "linear_weight", weight, dtype)]
    lines += [f"linear_weight.copy_(torch.randn({weight}) / {math.sqrt(features):.3})"]
    bias = f"torch.randn({weight[:-1]}, dtype=torch.{dtype})"
    lines += [f"linear_bias = {draw(st.sampled_from([bias, 'None']))}"]
    lines += targets(draw, shape, 1, dtype)
    some = draw(st.sampled_from([{}, {"chunk_size": 1}, {"chunk_size": 7}, {"chunk_size": 33}]))
    lines += [f"chunks = {some | {'grad_in_forward': draw(st.booleans())}}"]
    return "\n".join(lines)


@st.composite
def divergences(draw):
    """`input` and `teacher`, the `options` of kl_div_with_logits, `mode` and `scale`."""
    shape = draw(shapes())
    axis, mode = min(1, len(shape) - 1), draw(st.sampled_from(sorted(MODES)))
    rows = shape[:axis] + shape[axis + 1 :]
    lines = ["import torch", f"torch.manual_seed({draw(st.integers(0, 2**31))})"]
    for name in ("input", "teacher"):
        lines += [strided(draw, name, shape, draw(st.sampled_from(FLOATS)))]
        lines += [f"{name}.copy_({values(draw, shape)})"]
    options = {
        "temperature": draw(st.sampled_from([1.0, 2.0, 0.7, 30.0])),
        "reverse": draw(st.booleans()),
        "reduction": draw(st.sampled_from(["none", "mean", "sum"])),
    }
    lines += [f"options = {options}"]
    if draw(st.booleans()):
        lines += [
            f"options['sample_weight'] = torch.rand({rows}).round(decimals=1)",
            # A mean of no weight is nan, and what is composed has a gradient of nan as well.
            "options['sample_weight'].view(-1)[:1] = 1",
        ]
    if options["reduction"] == "mean" and draw(st.booleans()):
        lines += ["options['denominator'] = 3.0"]
    lines += [f"mode, scale = {mode!r}, {draw(st.sampled_from([1.0, 0.25, -3.0]))}"]
    return "\n".join(lines)


@st.composite
def calls(draw):
    """An `operator` and its `arguments`: a right call, in which some are replaced."""
    rows, classes = draw(st.integers(0, 70)), draw(st.integers(1, 70))
    shape, dtype = (rows, classes), draw(st.sampled_from(FLOATS))
    name = draw(st.sampled_from(sorted(ARGUMENTS)))
    lines = ["import torch", f"torch.manual_seed({draw(st.integers(0, 2**31))})"]
    lines += [strided(draw, "input", shape, dtype), f"input.copy_({values(draw, shape)})"]
    lines += targets(draw, shape, 1, dtype)
    lines += ["loss, stats, totals = torch.ops.fused_ce.forward_stats(input, target)"]
    lines += ["grad, grad_output = torch.randn_like(input), torch.ones_like(loss)"]
    known = ", ".join(f"{each}={each}" for each in ARGUMENTS[name])
    lines += [f"operator, arguments = torch.ops.fused_ce.{name}, dict({known})"]
    for _ in range(draw(st.integers(1, 2))):
        replaced = draw(st.sampled_from([*ARGUMENTS[name], *(OPTIONS if name != "scale_" else ())]))
        lines += [f"arguments[{replaced!r}] = {draw(hostile(replaced))}"]
    return "\n".join(lines)


_ROWS = ("input", "target", "stats", "totals")
ARGUMENTS = {
    "forward": _ROWS[:2],
    "forward_stats": _ROWS[:2],
    "forward_grad": _ROWS[:2],
    "forward_grad_": _ROWS[:2],
    "backward": (*_ROWS, "grad_output"),
    "backward_": (*_ROWS, "grad_output"),
    "backward_target": (*_ROWS, "grad_output"),
    "backward_logit_scale": (*_ROWS, "grad_output"),
    "rescale_": ("grad", "grad_output", *_ROWS),
    "scale_": ("grad", "grad_output"),
}
OPTIONS = {
    "reduction": st.sampled_from(["-1", "0", "2", "3", "2**31", "-(2**63)"]),
    "ignore_index": st.sampled_from(["0", "69", "2**63 - 1", "-(2**63)"]),
    "label_smoothing": st.sampled_from(["0.5", "1.0", "1.5", "-1.0", "torch.inf", "torch.nan"]),
    "softcap": st.sampled_from(["1.0", "-1.0", "1e-300", "1e300", "torch.inf", "torch.nan"]),
    "z_loss": st.sampled_from(["0.5", "-1.0", "1e300", "torch.inf", "torch.nan"]),
    "focal_gamma": st.sampled_from(["2.0", "-1.0", "1e300", "torch.inf", "torch.nan"]),
    "on_all_ignored": st.sampled_from(["1", "-1", "2", "2**31"]),
    "on_out_of_range": st.sampled_from(["1", "-1", "2", "2**31"]),
    "loss_dtype": st.sampled_from([f"torch.{each}" for each in (*FLOATS, "int64", "complex64")]),
    "weight": None,
    "denominator": None,
    "logit_scale": None,
    "sample_weight": None,
}


@st.composite
def hostile(draw, name):
    if OPTIONS.get(name) is not None:
        return draw(OPTIONS[name])
    shape = draw(st.lists(st.sampled_from([0, 1, 2, 3, 64, 71]), max_size=4).map(tuple))
    dtype = draw(st.sampled_from([*FLOATS, "int64", "uint8", "bool", "complex64"]))
    made = draw(
        st.sampled_from(
            [
                f"torch.full({shape}, 69, dtype=torch.int64).to(torch.{dtype})",
                f"torch.full({shape}, -7, dtype=torch.int64).to(torch.{dtype})",
                f"torch.randn({shape}).mul(1e30).to(torch.{dtype})",
                f"torch.zeros((), dtype=torch.{dtype}).expand({shape})",
                f"torch.empty({shape}, dtype=torch.{dtype}, device='meta')",
                "input.to_sparse()",
                "input[:-1]",
                "input.t()",
                "target",
                "stats",
                "totals[:1]",
            ]
        )
    )
    return made


@st.composite
def shapes(draw):
    kind = draw(st.integers(0, 5))
    classes = draw(classes_of)
    if kind == 0:
        return (classes,)
    rows = draw(rows_of)
    positions = draw(st.lists(st.integers(0, 9), max_size=2)) if kind > 3 else []
    most = MAX_ELEMENTS // max(classes * math.prod(positions), 1)
    return (min(rows, most), classes, *positions)


def strided(draw, name, shape, dtype):
    """Memory with the axes in any order, gaps after each, and nan wherever no element is."""
    strides, step = [0] * len(shape), draw(st.sampled_from([1, 1, 1, 2]))
    for axis in draw(st.permutations(range(len(shape)))):
        strides[axis] = step
        step = step * max(shape[axis], 1) + draw(st.sampled_from([0, 0, 0, 1, 3]))
    offset = draw(st.sampled_from([0, 0, 1, 7, 16]))
    memory = f"torch.full(({offset + step},), torch.nan, dtype=torch.{dtype})"
    return f"{name} = {memory}.as_strided({shape}, {tuple(strides)}, {offset})"


def values(draw, shape):
    spread = draw(st.sampled_from([1.0, 0.01, 20.0]))
    shift = draw(st.sampled_from([0.0, 0.0, 100.0, -1000.0]))
    return f"torch.randn({shape}) * {spread} + {shift}"


def targets(draw, shape, axis, dtype):
    """`target`, and the `options` of the loss."""
    classes, rows = shape[axis], shape[:axis] + shape[axis + 1 :]
    reduction = draw(st.sampled_from(["none", "mean", "sum"]))
    options = {"reduction": reduction, "label_smoothing": draw(st.sampled_from([0.0, 0.1, 1.0]))}
    if draw(st.booleans()):
        temperature = draw(st.sampled_from([0.1, 1.0, 30.0]))
        lines = [strided(draw, "target", shape, dtype)]
        lines += [f"target.copy_((torch.randn({shape}) * {temperature}).softmax({axis}))"]
        # Times a weight the least of them would be nothing, and times a masked logit inf or nan.
        lines += ["target.masked_fill_(target < 1e-30, 0)"]
    else:
        kinds = ["int64", "int32", "int16"] if classes < 2**15 else ["int64", "int32"]
        kind = draw(st.sampled_from(kinds))
        options["ignore_index"] = draw(st.sampled_from([-100, 0, classes - 1]))
        lines = [f"target = torch.randint({classes}, {rows}, dtype=torch.{kind})"]
        ignored = f"torch.rand({rows}) < {draw(st.sampled_from([0.0, 0.3, 1.0]))}"
        lines += [f"target.masked_fill_({ignored}, {options['ignore_index']})"]
    lines += [f"options = {options}"]
    if draw(st.booleans()):
        lines += [f"options['weight'] = torch.rand({classes}).round(decimals=1).to(torch.{dtype})"]
    return lines


CASES = {
    "loss": losses,
    "options": extended,
    "pointwise": pointwise,
    "divergence": divergences,
    "head": heads,
    "operator": calls,
}
