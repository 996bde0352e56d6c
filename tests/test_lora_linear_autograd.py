"""`peft_kernels.lora_linear` as autograd sees it: which gradients, what is saved, repeats, checkpoints, errors."""

from dataclasses import replace
from functools import partial
from itertools import combinations

import bounds
import pytest
import torch
from cases import Case, inputs
from public_call import LEAVES, assert_same, call, check_gradients, drawn_seed, gradients, leaves, run
from torch.utils.checkpoint import checkpoint

import peft_kernels as pk
from peft_kernels.kernels.lora_linear import op, reference

SMALL = Case(7, 5, 11, 3, torch.float64)
BOTH = [pytest.param(0.0, id="plain"), pytest.param(0.5, id="dropout")]
SUBSETS = [names for n in range(1, 6) for names in combinations(LEAVES, n)]

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("p", BOTH)
@pytest.mark.parametrize("needed", [LEAVES, *((name,) for name in LEAVES)], ids="-".join)
@pytest.mark.parametrize("lacking", [(), ("weight",), ("bias",), ("weight", "bias")], ids="-".join)
def test_gradcheck(device, p, needed, lacking):
    case = replace(SMALL, dropout=p, weight=None if "weight" in lacking else "contiguous")
    case = replace(case, bias=None if "bias" in lacking else "same")
    args = leaves(inputs(case, device), needed)
    given = [name for name in LEAVES if args[name] is not None]
    if not set(needed) & set(given):
        return  # the only differentiable argument is the one that is lacking: nothing to differentiate

    def function(*tensors):
        return call({**args, **dict(zip(given, tensors, strict=True))}, case)

    assert torch.autograd.gradcheck(function, [args[name] for name in given])


@pytest.mark.parametrize("p", BOTH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("needed", SUBSETS, ids="-".join)
def test_every_subset_of_requires_grad(device, p, dtype, needed):
    check_gradients(Case(37, 53, 71, 12, dtype, dropout=p, adapters=torch.float32, bias=torch.float32), device, needed)


@pytest.mark.parametrize("p", BOTH)
def test_without_grad_nothing_is_saved(device, p):
    case = replace(SMALL, dropout=p)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda t: t):
        y = call(leaves(inputs(case, device), ()), case)
    assert not y.requires_grad and saved == []
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(saved.append, lambda t: t):
        y = call(leaves(inputs(case, device)), case)
    assert not y.requires_grad and saved == []


@pytest.mark.parametrize("shape", [(11,), (1, 11), (2, 3, 11), (2, 1, 3, 11), (0, 11), (2, 0, 11)], ids=str)
def test_leading_dimensions(device, shape):
    """Any number of them gives what the flattened call gives."""
    data = inputs(replace(SMALL, M=max(1, torch.Size(shape[:-1]).numel())), device)
    x = data.x[: torch.Size(shape[:-1]).numel()].reshape(shape)
    dy = data.dy[: x[..., 0].numel()].reshape(*shape[:-1], 5)
    results = []
    for one_x, one_dy in ((x, dy), (x.reshape(-1, 11), dy.reshape(-1, 5))):
        args = {**leaves(data), "x": one_x.clone().requires_grad_()}
        y = call(args, SMALL)
        assert y.shape == one_dy.shape
        y.backward(one_dy)
        grads = gradients(args)
        assert grads["x"].shape == one_x.shape
        results.append({"y": y.detach().reshape(-1, 5), **grads, "x": grads["x"].reshape(-1, 11)})
    assert_same(*results, "from the flattened call's")


@pytest.mark.parametrize("layout", ["transposed", "rows", "columns", "expanded", "offset"])
def test_strides_of_x_and_dy(device, layout):
    """Same values in other memory: within the bound of the contiguous call's truth."""
    case = Case(37, 53, 71, 12, torch.float32, layout=layout)
    data = inputs(case, device)
    x = data.x.detach().requires_grad_()
    args = {**leaves(data), "x": x}
    y = call(args, case)
    y.backward(data.dy)
    tensors = data.x, data.weight, data.lora_a, data.lora_b
    bounds.assert_within(y, *bounds.forward(*tensors, data.bias, data.mask, case.scaling)["y"], "y")
    truth = bounds.backward(data.dy, *tensors, None, data.mask, case.scaling)
    for name in ("x", "lora_a", "lora_b", "bias"):
        bounds.assert_within(args[name].grad, *truth[f"d{name}"], f"d{name}")


@pytest.mark.parametrize("p", BOTH)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_the_call_on_cast_inputs(device, dtype, p):
    case = Case(37, 53, 71, 12, torch.float32, dropout=p)
    data = inputs(case, device)
    under, cast = leaves(data), leaves(data)
    with torch.autocast(device, dtype):
        y = call(under, case)
    assert y.dtype == dtype
    expected = call({**cast, "x": cast["x"].to(dtype), "weight": cast["weight"].to(dtype)}, case)
    assert torch.equal(y, expected)
    dy = data.dy.to(dtype)
    y.backward(dy)
    expected.backward(dy)
    assert all(grad.dtype == torch.float32 for grad in gradients(under).values())
    assert_same(gradients(under), gradients(cast), "under autocast")


@pytest.mark.parametrize("p", BOTH)
def test_retain_graph_gives_the_same_twice(device, p):
    case = Case(37, 53, 71, 12, torch.bfloat16, dropout=p)
    data = inputs(case, device)
    args = leaves(data)
    y = call(args, case)
    y.backward(data.dy, retain_graph=True)
    first = {name: grad.clone() for name, grad in gradients(args).items()}
    for tensor in args.values():
        tensor.grad = None
    y.backward(data.dy)
    assert_same(first, gradients(args), "in the second backward")


@pytest.mark.parametrize("p", BOTH)
def test_nothing_saved_and_no_input_is_written(device, p):
    case = Case(37, 53, 71, 12, torch.bfloat16, dropout=p)
    data = inputs(case, device)
    args, saved = leaves(data), []

    def pack(tensor):
        saved.append((tensor, tensor.detach().clone()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = call(args, case)
    dy = data.dy.clone()
    y.backward(dy)
    assert saved and all(torch.equal(now, before) for now, before in saved)
    assert torch.equal(dy, data.dy)
    assert all(torch.equal(args[name], getattr(data, name)) for name in LEAVES)
    assert all(tensor._version == 0 for tensor in args.values())


@pytest.mark.parametrize("p", BOTH)
@pytest.mark.parametrize("wanted", ["x", "lora_a", "lora_b", "bias"])
def test_second_derivative_is_refused(device, p, wanted):
    case = replace(SMALL, dropout=p)
    args = leaves(inputs(case, device))
    y = call(args, case)
    (first,) = torch.autograd.grad(y.square().sum(), args[wanted], create_graph=True)
    with pytest.raises(RuntimeError, match="lora_linear has no second derivative"):
        first.sum().backward()


@pytest.mark.parametrize("p", BOTH)
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_activation_checkpointing(device, p, reentrant):
    """The recomputed forward draws the same mask: the gradients are those of the plain call, bit for bit."""
    case = Case(37, 53, 71, 12, torch.bfloat16, dropout=p, adapters=torch.float32)
    y, grads = run(case, device)
    again, recomputed = run(case, device, function=partial(checkpoint, pk.lora_linear, use_reentrant=reentrant))
    assert torch.equal(y, again)
    assert_same(grads, recomputed, "under checkpointing")


def test_manual_seed_gives_the_documented_mask(device):
    case = Case(37, 53, 71, 12, torch.float32, dropout=0.5)
    data = inputs(case, device)
    y = call(leaves(data), case)
    seed = drawn_seed(device)
    tensors = data.x, data.weight, data.lora_a, data.lora_b, data.bias
    mask = reference.dropout_mask(seed, *data.x.shape, data.threshold)
    bounds.assert_within(y, *bounds.forward(*tensors, mask, data.scaling)["y"], "y")
    assert not torch.equal(pk.lora_linear(*tensors[:4], 2.0, data.bias, 0.5), y), "two calls drew the same mask"


def _bad(device: str) -> dict[str, tuple[dict, str]]:
    """What is wrong -> (changed arguments, what the message must say)."""
    z = partial(torch.zeros, device=device)
    return {
        "x of rank 0": ({"x": z(())}, r"x is torch.float32 \[\] .*at least one dimension"),
        "x of integers": ({"x": z(4, 11, dtype=torch.int64)}, r"x is torch.int64 \[4, 11\].*floating"),
        "x complex": ({"x": z(4, 11, dtype=torch.complex64)}, r"x is torch.complex64.*floating"),
        "x too wide": ({"x": z(4, 12)}, r"x is .*\[4, 12\].*expected \[..., 11\] to match weight"),
        "lora_a too wide": ({"lora_a": z(3, 12)}, r"lora_a is .*\[3, 12\].*expected \[R, 11\]"),
        "lora_a of rank 1": ({"lora_a": z(11)}, r"lora_a is .*\[11\].*expected \[R, 11\]"),
        "lora_a without ranks": ({"lora_a": z(0, 11), "lora_b": z(5, 0)}, r"lora_a is .*rank R of at least 1"),
        "lora_a of integers": ({"lora_a": z(3, 11, dtype=torch.int8)}, r"lora_a is torch.int8.*floating"),
        "lora_b of another rank": ({"lora_b": z(5, 4)}, r"lora_b is .*\[5, 4\].*expected \[N, 3\]"),
        "lora_b transposed": ({"lora_b": z(3, 5)}, r"lora_b is .*\[3, 5\].*expected \[N, 3\]"),
        "weight transposed": ({"weight": z(11, 5)}, r"weight is .*\[11, 5\].*expected \[5, 11\]"),
        "weight of another dtype": ({"weight": z(5, 11).half()}, r"weight is torch.float16.*x's dtype, torch.float32"),
        "bias too long": ({"bias": z(6)}, r"bias is .*\[6\].*expected \[5\]"),
        "bias a column": ({"bias": z(5, 1)}, r"bias is .*\[5, 1\].*expected \[5\]"),
        "weight on another device": ({"weight": z(5, 11, device="meta")}, r"weight is .* on meta.*device of x"),
        "lora_b on another device": ({"lora_b": z(5, 3, device="meta")}, r"lora_b is .* on meta.*device of x"),
        "bias on another device": ({"bias": z(5, device="meta")}, r"bias is .* on meta.*device of x"),
        "dropout_p negative": ({"dropout_p": -0.1}, r"dropout_p is -0.1.*\[0, 1\]"),
        "dropout_p above 1": ({"dropout_p": 1.5}, r"dropout_p is 1.5.*\[0, 1\]"),
        "dropout_p NaN": ({"dropout_p": float("nan")}, r"dropout_p is nan.*\[0, 1\]"),
    }


@pytest.mark.parametrize("wrong", _bad("cpu"))
def test_bad_input_is_refused_before_any_kernel(device, monkeypatch, wrong):
    changed, message = _bad(device)[wrong]
    z = partial(torch.zeros, device=device)
    args = {"x": z(4, 11), "weight": z(5, 11), "lora_a": z(3, 11), "lora_b": z(5, 3), "scaling": 2.0, "bias": z(5)}
    calls = []
    monkeypatch.setattr(op, "lora_linear_fwd", lambda *a: calls.append(a))
    with pytest.raises(ValueError, match=message):
        pk.lora_linear(**{**args, **changed})
    assert calls == []
