"""Guards the options that torch's loss does not have: each, and all together, beside what people
write for them in plain torch, in float64.

The formula below is written from the options' definitions and shares nothing with the package.
"""

import warnings

import pytest
import torch
import torch.nn.functional as F
from support.composed import composed, in_float64
from support.devices import every_device
from support.grids import MODES, REDUCTIONS, cases_of, every_differentiating_mode, together
from support.reference import assert_as_accurate, differentiate, one_thread, ours

import fused_ce

pytestmark = every_device

# The kernels, by shape.
ROWS = {
    "unbatched": (9,),
    "lanes": (70, 10),  # turned over in a tile
    "pixels": (2, 19, 4, 5),  # rows side by side
    "short rows": (9, 300),
    "rows of several blocks": (3, 5001),
}
AXES = {
    "rows": tuple(ROWS),
    "dtype": (torch.float32, torch.bfloat16, torch.float64),
    "mode": tuple(MODES),
    "kind": ("index", "probability"),
    "reduction": REDUCTIONS,
    "weighted": (False, True),
    "label_smoothing": (0.0, 0.1),
    "z_loss": (0.0, 1e-2),
    "logit_scale": (1.0, 0.5, -0.7),  # a negative one makes the smallest logit the largest
    "softcap": (None, 4.0),
    "sampled": (False, True),
    "focal_gamma": (0.0, 2.0, 0.5),  # a square, and a power whose slope at 0 is infinite
    "denominator": (None, 7.5),
    "on_all_ignored": ("nan", "zero"),
    "incoming": (1.0, -3.0),
}


def is_valid(case):
    """Of whole and of partial cases."""
    focal = case.get("focal_gamma", 0.0) > 0
    if focal and (case.get("kind") == "probability" or case.get("label_smoothing", 0.0) > 0):
        return False
    if case.get("mode") == "no grad" and case.get("incoming", 1.0) != 1.0:
        return False
    return case.get("denominator") is None or case.get("reduction", "mean") == "mean"


def problem(rows, dtype, kind, *, scale=2.0):
    """Logits and a target, some of whose rows are ignored where it is an index."""
    shape = ROWS[rows]
    input = (torch.randn(shape) * scale).to(dtype)
    axis = 1 if len(shape) > 1 else 0
    if kind == "probability":
        return input, torch.randn(shape).softmax(axis).to(dtype)
    target = torch.randint(0, shape[axis], [n for d, n in enumerate(shape) if d != axis])
    if target.dim():
        target.view(-1)[1::3] = -100
    return input, target


def options_of(case, input, target):
    """The keywords of one case of the grid."""
    classes = input.shape[1 if input.dim() > 1 else 0]
    names = "reduction label_smoothing z_loss logit_scale softcap focal_gamma denominator"
    options = {name: case[name] for name in (*names.split(), "on_all_ignored")}
    if case["weighted"]:
        options["weight"] = (torch.rand(classes) + 0.5).to(input.dtype)
    if case["sampled"]:
        rows = [n for d, n in enumerate(input.shape) if d != (1 if input.dim() > 1 else 0)]
        weight = torch.rand(rows) + 0.5
        if weight.dim():
            weight.view(-1)[2::4] = 0  # ignored
        options["sample_weight"] = weight.to(input.dtype)
    return options


@one_thread()
def expected(input, target, options, scale=1.0):
    """The composed formula in the arguments' own types, and in float64."""
    plain = differentiate(composed, input, target, scale=scale, **options)
    wide = target.double() if target.is_floating_point() else target
    exact = differentiate(composed, input.double(), wide, scale=scale, **in_float64(options))
    return plain, exact


def check(input, target, options, mode="default", scale=1.0):
    result = ours(input, target, mode=mode, scale=scale, **options)
    plain, exact = expected(input, target, options, scale)
    assert_as_accurate(result.loss, plain.loss, exact.loss, "loss")
    if result.grad_input is not None:
        assert_as_accurate(result.grad_input, plain.grad_input, exact.grad_input, "gradient", 2.0)


@together
@pytest.mark.parametrize("case", cases_of(AXES, often=2, seldom=3, valid=is_valid))
@pytest.mark.on_simulator
def test_all_options_together_are_the_composed_formula(case):
    input, target = problem(case["rows"], case["dtype"], case["kind"])
    check(input, target, options_of(case, input, target), case["mode"], case["incoming"])


@together
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("kind", ["index", "probability"])
@pytest.mark.on_simulator
def test_a_sample_without_weight_is_not_read(rows, kind, mode):
    input, target = problem(rows, torch.float32, kind)
    if input.dim() == 1:
        pytest.skip("one row")
    shape = [n for d, n in enumerate(input.shape) if d != 1]
    weight = torch.rand(shape) + 0.5
    weight.view(-1)[::3] = 0  # where the target is not the ignored one
    whole = ours(input, target, mode=mode, sample_weight=weight)
    rotten = torch.where(weight.unsqueeze(1) == 0, torch.nan, input)
    wrong = target
    if kind == "index":  # no class is looked for in such a row
        wrong = torch.where(weight == 0, 10**6, target)
    found = ours(rotten, wrong, mode=mode, sample_weight=weight)
    assert found.loss.isfinite()
    for value, other in zip(found, whole, strict=True):
        if value is not None:
            torch.testing.assert_close(value, other, rtol=0, atol=0)


@together
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["index", "probability"])
@pytest.mark.parametrize("on_all_ignored", ["nan", "zero"])
@pytest.mark.parametrize("z_loss", [0.0, 0.01])  # with it the rows are counted before the loss
@pytest.mark.on_simulator
def test_a_mean_divides_by_class_weights_of_indices_alone(kind, mode, on_all_ignored, z_loss):
    input, target = problem("lanes", torch.float32, kind)
    options = {"weight": torch.rand(10) + 0.5, "sample_weight": torch.rand(70) + 0.5}
    options |= {"on_all_ignored": on_all_ignored, "z_loss": z_loss}
    check(input, target, options, mode)


@pytest.mark.parametrize("rows", ["lanes", "rows of several blocks"])
@pytest.mark.on_simulator
def test_the_gradient_of_probabilities_of_weighed_samples_is_the_composed_one(rows):
    input, target = problem(rows, torch.float32, "probability")
    options = {"z_loss": 0.01, "logit_scale": 0.5, "sample_weight": torch.rand(len(input))}
    options["sample_weight"][1] = 0
    result = ours(input, target, target_grad=True, **options)
    results = []
    for dtype in (torch.float32, torch.float64):
        given = {**options, "sample_weight": options["sample_weight"].to(dtype)}
        arguments = composed, input.to(dtype), target.to(dtype)
        results.append(differentiate(*arguments, target_grad=True, **given))
    plain, exact = results
    assert_as_accurate(result.grad_target, plain.grad_target, exact.grad_target, "target's", 2.0)
    assert (result.grad_target[1] == 0).all()


@together
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("given", [{}, {"denominator": 0.0}, {"denominator": 5}])
@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.on_simulator
def test_a_mean_of_no_rows_is_zero_where_that_is_asked_for(mode, given, sampled):
    input, target = torch.randn(6, 10), torch.full((6,), -100)
    options = {"on_all_ignored": "zero", "z_loss": 0.1, **given}
    if sampled:
        target = torch.arange(6)
        options["sample_weight"] = torch.zeros(6)
    result = ours(input, target, mode=mode, **options)
    assert result.loss == 0
    if result.grad_input is not None:
        assert (result.grad_input == 0).all()
    empty = ours(input[:0], target[:0], mode=mode, on_all_ignored="zero", **given)
    assert empty.loss == 0
    probabilities = torch.rand(0, 10)
    assert ours(input[:0], probabilities, mode=mode, on_all_ignored="zero").loss == 0


@pytest.mark.on_simulator
def test_a_total_weight_of_nothing_that_counts_stays_nan():
    input, target = torch.randn(4, 3), torch.tensor([0, 0, 1, -100])
    weight = torch.tensor([0.0, 0.0, 1.0])
    options = {"weight": weight, "on_all_ignored": "zero"}
    assert fused_ce.cross_entropy(input, target, **options).isnan()


@together
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("rows", ["lanes", "pixels", "short rows", "rows of several blocks"])
@pytest.mark.on_simulator
def test_a_target_that_is_no_class_makes_its_row_nan(rows, weighted, reduction, mode):
    input, target = problem(rows, torch.float32, "index")
    target.view(-1)[2], target.view(-1)[0] = -1, input.shape[1]
    bad = (target != -100) & ((target < 0) | (target >= input.shape[1]))
    options = {"weight": torch.rand(input.shape[1]) + 0.5} if weighted else {}
    result = ours(input, target, mode=mode, reduction=reduction, on_out_of_range="nan", **options)
    if reduction == "none":
        assert torch.equal(result.loss.isnan(), bad)
    else:
        assert result.loss.isnan()
    if result.grad_input is None:
        return
    gradient = result.grad_input.movedim(1, -1)
    assert gradient[bad].isnan().all()
    # The others have the gradient that they have beside rows of weight 1 in the place of those.
    clean, ones = target.where(~bad, 0), torch.ones(target.shape)
    if weighted:
        ones = torch.where(bad, 1 / options["weight"][0], ones)
    beside = ours(
        input, clean, mode="recompute", reduction=reduction, sample_weight=ones, **options
    )
    torch.testing.assert_close(gradient[~bad], beside.grad_input.movedim(1, -1)[~bad])


@pytest.mark.parametrize("sampled", [False, True])
def test_a_target_that_is_no_class_is_named_with_its_row(sampled):
    input, target = torch.randn(2, 5, 3), torch.tensor([[0, 1, 2], [3, 7, 9]])
    options = {"on_out_of_range": "raise"}
    if sampled:
        options["sample_weight"] = torch.tensor([[1.0, 1, 1], [1, 0, 1]])
    first = r"Target 9 is out of bounds: row \[1, 2\]" if sampled else r"Target 7 .*: row \[1, 1\]"
    with pytest.raises(IndexError, match=first):
        fused_ce.cross_entropy(input, target, **options)
    with pytest.raises(IndexError, match=r"Target 5 is out of bounds: row 0, 5 classes."):
        fused_ce.cross_entropy(
            input[0].T, torch.tensor([5, 1, 9]), **options | {"sample_weight": None}
        )


@together
@pytest.mark.parametrize("mode", ["default", "recompute", "in place"])
@pytest.mark.parametrize("incoming", [1.0, -3.0])
@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("kind", ["index", "probability"])
@pytest.mark.parametrize("rows", ["lanes", "pixels", "rows of several blocks"])
@pytest.mark.on_simulator
def test_a_learned_scale_gets_the_composed_gradient(rows, kind, softcap, incoming, mode):
    input, target = problem(rows, torch.float32, kind)
    options = {"softcap": softcap, "label_smoothing": 0.1, "z_loss": 0.01}
    gradients = []
    for function, dtype in (
        (lambda *a, **k: fused_ce.cross_entropy(*a, **k, **MODES[mode]), torch.float32),
        (composed, torch.float32),
        (composed, torch.float64),
    ):
        # A parameter in its own type and shape, here [1].
        scale = torch.tensor([0.7], dtype=dtype, requires_grad=True)
        leaf = input.to(dtype).requires_grad_()
        of_target = target.to(dtype) if kind == "probability" else target
        logits = leaf * 1  # no leaf, so that it may be overwritten
        loss = function(logits, of_target, logit_scale=scale, **options)
        gradients.append(torch.autograd.grad(loss, [scale, leaf], torch.full_like(loss, incoming)))
    found, plain, exact = gradients
    for value, same, reference in zip(found, plain, exact, strict=True):
        assert value.shape == same.shape
        assert_as_accurate(value, same, reference, "gradient", 2.0)


def test_a_scale_of_zero_is_learned_from():
    input, target = torch.randn(8, 30), torch.randint(0, 30, (8,))
    scale = torch.zeros((), requires_grad=True)
    fused_ce.cross_entropy(input, target, logit_scale=scale).backward()
    other = torch.zeros((), requires_grad=True)
    composed(input, target, logit_scale=other).backward()
    torch.testing.assert_close(scale.grad, other.grad)


def test_a_masked_logit_leaves_a_learned_scale_its_gradient():
    input, target = torch.randn(8, 30), torch.randint(1, 30, (8,))
    input[:, 0] = -torch.inf
    scale = torch.ones((), requires_grad=True)
    fused_ce.cross_entropy(input, target, logit_scale=scale).backward()
    other = torch.ones((), requires_grad=True)
    composed(input[:, 1:], target - 1, logit_scale=other).backward()
    torch.testing.assert_close(scale.grad, other.grad)


@together
@pytest.mark.parametrize("name", ["denominator", "sample_weight"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("zero", [False, True])
def test_weights_that_require_grad_get_the_composed_gradient(name, reduction, weighted, zero):
    if name == "denominator" and reduction != "mean":
        pytest.skip("there is none to get")
    input, target = problem("lanes", torch.float64, "index")
    options = {"reduction": reduction, "z_loss": 0.1, "on_all_ignored": "zero" if zero else "nan"}
    if weighted:
        options["weight"] = torch.rand(input.shape[1], dtype=torch.float64)
    value = torch.tensor(5.0) if name == "denominator" else torch.rand(len(input)) + 0.5
    results = []
    for function in (fused_ce.cross_entropy, composed):
        leaves = [input.clone().requires_grad_(), value.double().requires_grad_()]
        loss = function(leaves[0], target, **options, **{name: leaves[1]})
        results.append((loss.detach(), *torch.autograd.grad(loss.sum(), leaves)))
    for found, other in zip(*results, strict=True):
        torch.testing.assert_close(found, other)


@together
@every_differentiating_mode
@pytest.mark.parametrize("rows", ["lanes", "short rows", "rows of several blocks"])
@pytest.mark.on_simulator
def test_a_certain_row_of_probabilities_keeps_the_digits_of_its_z_loss(rows, mode):
    """What is left where p and q cancel: 2 z lse p, a thousandth of either."""
    input, _ = problem(rows, torch.float32, "index")
    input[:, 3] += 40.0
    target = torch.zeros_like(input)
    target[:, 3] = 1.0
    check(input, target, {"z_loss": 1e-5, "reduction": "sum"}, mode)


def test_a_certain_row_has_a_focal_gradient_of_zero():
    input = torch.zeros(2, 4)
    input[:, 1] = 200.0  # the others' exps vanish beside it
    result = ours(input, torch.tensor([1, 2]), focal_gamma=0.5, reduction="sum")
    assert (result.grad_input[0] == 0).all()
    assert result.grad_input[1].isfinite().all() and result.loss == 200.0


@together
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_loss_is_in_the_dtype_and_the_gradient_in_the_inputs(dtype, input_dtype, reduction):
    input = (torch.randn(20, 30) * 3).to(input_dtype)
    target = torch.randint(0, 30, (20,))
    floating = input_dtype.is_floating_point
    leaf = input.clone().requires_grad_(floating)
    loss = fused_ce.cross_entropy(leaf, target, dtype=dtype, reduction=reduction)
    other = input.clone().requires_grad_(floating)
    stock = F.cross_entropy(other.to(dtype), target, reduction=reduction)
    assert loss.dtype == dtype
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(loss, stock, **tolerance)
    fused = fused_ce.explain(leaf, target, dtype=dtype).startswith("fused")
    holds = dtype == input_dtype or (dtype == torch.float32 and input_dtype.itemsize == 2)
    assert fused == holds
    if floating:
        loss.sum().backward()
        stock.sum().backward()
        assert leaf.grad.dtype == input_dtype
        torch.testing.assert_close(leaf.grad, other.grad, **tolerance)


@pytest.mark.parametrize("classes", [1, 9, 300])  # the last of a few, lanes, a vector and its rest
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_nan_whose_bits_are_all_set_stays_nan_in_a_half_type(dtype, classes):
    # To round it as a number would make a zero of it.
    input = torch.randn(3, classes).to(dtype).requires_grad_()
    loss = fused_ce.cross_entropy(input, torch.zeros(3, dtype=torch.int64), dtype=torch.float32)
    loss.backward(torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32))
    assert input.grad.isnan().all()


def test_half_types_keep_a_float32_loss_without_a_copy():
    input, target = torch.randn(64, 1000, dtype=torch.bfloat16), torch.randint(0, 1000, (64,))
    loss = fused_ce.cross_entropy(input, target, dtype=torch.float32)
    exact = F.cross_entropy(input.double(), target)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("classes", [5, 300])  # lanes, and a row
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_float32_loss_of_half_types_has_the_digits_of_float32(dtype, classes):
    # Of one gap alone, so that no error of an exp is lost among those of others.
    for gap in (0.5, 3.0, 8.0, 13.0, 21.0):
        input = torch.zeros(1, classes, dtype=dtype)
        input[0, 2] = gap
        target = torch.tensor([2])
        loss = fused_ce.cross_entropy(input, target, dtype=torch.float32)
        exact = F.cross_entropy(input.double(), target)
        torch.testing.assert_close(loss.double(), exact, rtol=5e-7, atol=0)


ONE = {"z_loss": 0.1}
CHECKED = [
    ({"denominator": 2.0, "reduction": "sum"}, "denominator is what 'mean' divides by"),
    ({"denominator": torch.ones(3)}, "denominator must be a number or a tensor of one element"),
    ({"denominator": "many"}, "denominator must be a number"),
    ({"z_loss": -1.0}, "z_loss must be a finite number from 0 on, got -1.0"),
    ({"z_loss": float("nan")}, "z_loss must be"),
    ({"z_loss": "x"}, "z_loss must be"),
    ({"focal_gamma": float("inf")}, "focal_gamma must be"),
    ({"focal_gamma": 1.0, "label_smoothing": 0.1}, "focal_gamma goes with class indices"),
    ({"softcap": 0.0}, "softcap must be from 1e-30 to 1e30, or None, got 0.0"),
    ({"softcap": -2}, "softcap must be"),
    ({"logit_scale": torch.ones(3)}, "logit_scale must be"),
    ({"logit_scale": None}, "logit_scale must be"),
    ({"on_all_ignored": "one"}, r"on_all_ignored must be one of \['nan', 'zero'\], got 'one'"),
    ({"on_out_of_range": "skip"}, "on_out_of_range must be one of"),
    ({"sample_weight": torch.ones(3)}, r"sample_weight must have the shape \(4,\)"),
    ({"sample_weight": [1, 2, 3, 4]}, "sample_weight must be a tensor"),
    ({"dtype": torch.int32}, "dtype must be a floating-point"),
    ({"dtype": "float32"}, "dtype must be"),
]


@together
@pytest.mark.parametrize("options, message", CHECKED, ids=str)
def test_an_option_that_makes_no_sense_is_refused_before_anything_is_written(options, message):
    input, target = torch.randn(4, 5), torch.arange(4)
    before = input.clone()
    leaf = input.clone().requires_grad_() * 1
    with pytest.raises(ValueError, match=message):
        fused_ce.cross_entropy(leaf, target, inplace=True, **options)
    torch.testing.assert_close(leaf, before, rtol=0, atol=0)
    explained = fused_ce.explain(input, target, **options)
    assert explained.startswith("refused: fused_ce: "), explained


@pytest.mark.parametrize("options", [{"focal_gamma": 1.0}])
def test_a_focal_loss_of_probabilities_is_refused(options):
    with pytest.raises(ValueError, match="focal_gamma goes with class indices"):
        fused_ce.cross_entropy(torch.randn(4, 5), torch.rand(4, 5), **options)


@pytest.mark.parametrize("options", [{}, ONE, {"sample_weight": torch.ones(4)}], ids=str)
def test_stocks_errors_are_stocks_with_every_option(options):
    input = torch.randn(4, 5)
    for wrong in (torch.arange(3), torch.arange(4).float(), torch.rand(4, 6)):
        with pytest.raises(Exception) as stock:
            F.cross_entropy(input, wrong)
        with pytest.raises(type(stock.value)) as found:
            fused_ce.cross_entropy(input, wrong, **options)
        assert str(found.value) == str(stock.value)
    with pytest.raises(IndexError, match="Target 5 is out of bounds."):
        fused_ce.cross_entropy(input, torch.tensor([0, 1, 2, 5]), **options)


def test_numbers_of_every_kind_are_one_number():
    numpy = pytest.importorskip("numpy")
    input, target = torch.randn(4, 5), torch.arange(4)
    expected_loss = fused_ce.cross_entropy(input, target, denominator=3.0, z_loss=1.0)
    for three in (3, numpy.int64(3), numpy.float32(3), torch.tensor(3), torch.tensor([3.0])):
        for one in (1, numpy.float64(1), torch.tensor(1.0)):
            loss = fused_ce.cross_entropy(input, target, denominator=three, z_loss=one)
            torch.testing.assert_close(loss, expected_loss, rtol=0, atol=0)


def test_defaults_that_are_spelled_out_leave_every_bit():
    input, target = torch.randn(7, 50), torch.randint(0, 50, (7,))
    plain = ours(input, target)
    spelled = ours(
        input,
        target,
        dtype=None,
        denominator=None,
        on_all_ignored="".join(["n", "an"]),
        z_loss=float("0"),
        logit_scale=float("1"),
        softcap=None,
        sample_weight=None,
        focal_gamma=0,
        on_out_of_range="assert",
    )
    for value, other in zip(spelled[:2], plain[:2], strict=True):
        torch.testing.assert_close(value, other, rtol=0, atol=0)


ALL = {
    "z_loss": 0.1,
    "logit_scale": 0.5,
    "softcap": 3.0,
    "label_smoothing": 0.1,
    "on_all_ignored": "zero",
}


@together
@pytest.mark.parametrize(
    "options", [ALL, {"focal_gamma": 1.5, "z_loss": 0.1}], ids=["all", "focal"]
)
@pytest.mark.parametrize("mode", ["default", "recompute"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_derivatives_of_second_order_are_those_of_the_formula(options, mode, reduction):
    input = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([4, -100, 2])
    scale = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    options = {**options, **MODES[mode], "reduction": reduction, "sample_weight": weight}

    def loss(input, scale):
        return fused_ce.cross_entropy(input, target, **{**options, "logit_scale": scale})

    torch.autograd.gradcheck(loss, (input, scale))
    torch.autograd.gradgradcheck(loss, (input, scale))


def test_transforms_take_the_formula():
    input, target = torch.randn(4, 5, dtype=torch.float64), torch.arange(4)
    options = {**ALL, "sample_weight": torch.rand(4, dtype=torch.float64)}

    def loss(function):
        return lambda x: function(x, target, **options)

    for transform in (torch.func.grad, torch.func.hessian):
        found, other = (
            transform(loss(fused_ce.cross_entropy))(input),
            transform(loss(composed))(input),
        )
        torch.testing.assert_close(found, other)
    tangent = torch.randn_like(input)
    for found, other in zip(
        torch.func.jvp(loss(fused_ce.cross_entropy), (input,), (tangent,)),
        torch.func.jvp(loss(composed), (input,), (tangent,)),
        strict=True,
    ):
        torch.testing.assert_close(found, other)
    batch = torch.randn(3, 4, 5, dtype=torch.float64)
    found = torch.func.vmap(loss(fused_ce.cross_entropy))(batch)
    torch.testing.assert_close(found, torch.stack([loss(composed)(x) for x in batch]))


@pytest.mark.parametrize("name", ["denominator", "logit_scale", "sample_weight"])
def test_a_weight_in_the_memory_of_the_logits_is_not_overwritten(name):
    input, target = torch.randn(5, 5, dtype=torch.float64), torch.arange(5)
    value = input[0] if name == "sample_weight" else input[0, 0]
    before = input.clone()
    leaf = input.requires_grad_()
    with pytest.raises(RuntimeError, match=f"share no memory with the {name}"):
        fused_ce.cross_entropy(leaf, target, inplace=True, **{name: value.detach()})
    torch.testing.assert_close(leaf.detach(), before, rtol=0, atol=0)


def test_threads_leave_every_bit_of_every_option():
    input, target = problem("rows of several blocks", torch.float32, "index")
    input, target = input.repeat(40, 1), target.repeat(40)
    options = {**ALL, "sample_weight": torch.rand(len(input)), "weight": torch.rand(5001)}
    with one_thread():
        alone = ours(input, target, **options)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        shared = ours(input, target, **options)
    finally:
        torch.set_num_threads(before)
    for value, other in zip(alone[:2], shared[:2], strict=True):
        torch.testing.assert_close(value, other, rtol=0, atol=0)


@together
@pytest.mark.parametrize("count", [1, 2, 7, 64, 300])
@pytest.mark.parametrize("rows", ["lanes", "short rows", "rows of several blocks"])
@pytest.mark.parametrize("options", [{}, ALL], ids=["plain", "all"])
def test_a_rows_results_do_not_depend_on_how_many_rows_come_with_it(rows, count, options):
    classes = ROWS[rows][1]
    input, target = torch.randn(300, classes), torch.randint(0, classes, (300,))
    # A neighbour whose exps are subnormal takes the whole tile another way.
    input[-1, 0], input[-1, 1:] = 100.0, -100.0
    whole = ours(input, target, reduction="none", **options)
    part = ours(input[:count], target[:count], reduction="none", **options)
    torch.testing.assert_close(part.loss, whole.loss[:count], rtol=0, atol=0)
    torch.testing.assert_close(part.grad_input, whole.grad_input[:count], rtol=0, atol=0)


@pytest.mark.parametrize("as_parameter", [True, False])
def test_a_module_takes_options_at_each_call_and_learns_its_scale(as_parameter):
    criterion = fused_ce.CrossEntropyLoss(z_loss=0.1, softcap=5.0)
    scale = torch.tensor(0.5)
    if as_parameter:
        criterion.logit_scale = torch.nn.Parameter(scale)
    else:
        criterion.logit_scale = scale.requires_grad_()
    input, target, weight = torch.randn(4, 5), torch.arange(4), torch.rand(4)
    loss = criterion(input, target, sample_weight=weight)
    loss.backward()
    assert criterion.logit_scale.grad != 0
    assert ("logit_scale" in dict(criterion.named_parameters())) == as_parameter
    options = {"z_loss": 0.1, "softcap": 5.0, "sample_weight": weight}
    expected = fused_ce.cross_entropy(input, target, logit_scale=0.5, **options)
    torch.testing.assert_close(loss, expected)
    with pytest.raises(TypeError, match="unexpected keyword argument 'sampleweight'"):
        criterion(input, target, sampleweight=weight)


class Overriding(torch.Tensor):
    """As a library's tensor that has torch's functions pass through it."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return super().__torch_function__(function, types, args, kwargs or {})


def test_what_the_kernels_cannot_take_has_every_option_and_says_so():
    input, target = torch.randn(4, 5), torch.arange(4)
    options = {**ALL, "reduction": "sum", "sample_weight": torch.rand(4)}
    expected_loss = composed(input, target, **options)
    with fused_ce.warn_on_fallback(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for given in (input.as_subclass(Overriding), input.to_sparse().to_dense()):
            found = fused_ce.cross_entropy(given, target, **options)
            torch.testing.assert_close(found.as_subclass(torch.Tensor), expected_loss)
        weight = torch.rand(5, requires_grad=True)
        fused_ce.cross_entropy(input, input.softmax(1), weight, **options)
        fused_ce.cross_entropy(
            input, target, torch.rand(5), sample_weight=torch.rand(4, requires_grad=True)
        )
    reasons = [str(warning.message).partition(": ")[2] for warning in caught]
    assert len(reasons) == 3 and "overrides __torch_function__" in reasons[0]
    assert "denominator or sample_weight requires grad" in reasons[2]


def test_autocast_leaves_a_float32_loss_of_every_option():
    input, target = torch.randn(4, 5).bfloat16(), torch.arange(4)
    with torch.autocast("cpu", torch.bfloat16):
        loss = fused_ce.cross_entropy(input, target, **ALL)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, composed(input.float(), target, **ALL))
