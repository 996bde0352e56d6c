"""`peft_kernels.nf4_linear` as autograd sees it: values, gradients, what is saved, repeats, compile, errors."""

from functools import partial

import bounds
import bounds_nf4
import bounds_sums
import nf4_linear_checks as checks
import pytest
import torch
from nf4_linear_checks import Case
from torch.utils.checkpoint import checkpoint

import peft_kernels as pk
from peft_kernels.kernels.nf4_linear import op

M, N, K = 37, 53, 72
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

pytestmark = pytest.mark.usefixtures("poisoned")


def leaves(device, dtype=torch.float32, needed=("x", "bias"), bias=None, shape=(M,), nested=True) -> dict:
    """x [*shape, K], a 4-bit weight [N, K] and bias [N]; those in `needed` require grad."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, K, generator=generator, dtype=torch.float64).to(dtype)
    row = torch.randn(N, generator=generator, dtype=torch.float64).to(bias or dtype)
    weight = checks.weight_of(Case(M, N, K, nested=nested), device)
    return {
        "x": x.to(device).requires_grad_("x" in needed),
        "weight": weight,
        "bias": row.to(device).requires_grad_("bias" in needed),
    }


def gradient_of(y: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype).to(y.device)


def run(args: dict, function=pk.nf4_linear) -> dict:
    y = function(*args.values())
    y.backward(gradient_of(y))
    return {"y": y.detach(), "x": args["x"].grad, "bias": args["bias"].grad}


def assert_same(one: dict, other: dict) -> None:
    for name, value in one.items():
        same = other[name] is None if value is None else torch.equal(value, other[name])
        assert same, f"{name} differs"


@pytest.mark.parametrize("bias", [None, torch.float32], ids=["same", "fp32-bias"])
@pytest.mark.parametrize("needed", [("x",), ("bias",), ("x", "bias")], ids="-".join)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_which_gradients(device, dtype, needed, bias):
    args = leaves(device, dtype, needed, bias)
    found = run(args)
    dy = gradient_of(found["y"])
    truth = {
        "y": bounds_nf4.forward(args["x"], args["weight"], args["bias"], None),
        "x": bounds_nf4.backward(dy, args["weight"], None),
        "bias": bounds_sums.bias_grad(dy, args["bias"].dtype),
    }
    for name, value in found.items():
        if name != "y" and name not in needed:
            assert value is None, f"{name} does not require grad and got one"
            continue
        assert name == "y" or value.dtype == args[name].dtype
        bounds.assert_within(value, *truth[name], name)


@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (2, 1, 3), (0,), (2, 0)], ids=str)
def test_leading_dimensions(device, shape):
    """Any number of them gives what F.linear over the dequantised weight gives, and its shapes."""
    args, other = (leaves(device, torch.float64, shape=shape) for _ in range(2))
    weight = pk.nf4_dequantize(args["weight"], torch.float64)
    theirs = run(other, lambda x, _, bias: torch.nn.functional.linear(x, weight, bias))
    for name, value in run(args).items():
        assert value.shape == theirs[name].shape
        torch.testing.assert_close(value, theirs[name])


@pytest.mark.parametrize("needed", [("x",), ("bias",), ("x", "bias")], ids="-".join)
def test_gradcheck(device, needed):
    args = leaves(device, torch.float64, needed, shape=(5,))
    assert torch.autograd.gradcheck(partial(_by_tensors, args["weight"]), (args["x"], args["bias"]))


def _by_tensors(weight, x, bias):
    return pk.nf4_linear(x, weight, bias)


def test_strides_of_x(device):
    args = leaves(device)
    dense = pk.nf4_linear(*args.values())
    x = args["x"].detach()
    for other in (x.t().contiguous().t(), torch.cat([x, x], 1)[:, :K], x.repeat_interleave(2, 1)[:, ::2]):
        assert torch.equal(pk.nf4_linear(other, args["weight"], args["bias"]), dense)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_autocast(device, dtype):
    args = leaves(device)
    with torch.autocast(device, dtype):
        y = pk.nf4_linear(*args.values())
        assert y.dtype == dtype
        assert pk.nf4_linear(*leaves(device, torch.float64).values()).dtype == torch.float64
    bounds.assert_within(y, *bounds_nf4.forward(args["x"].to(dtype), args["weight"], args["bias"], None), "y")
    y.backward(gradient_of(y))
    assert args["x"].grad.dtype == args["bias"].grad.dtype == torch.float32


def saved(args: dict) -> list[torch.Tensor]:
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        pk.nf4_linear(*args.values())
    return kept


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_saved_are_the_4_bit_tensors_alone(device, dtype, nested):
    """Never x, and no copy: the tensors themselves, and none where x needs no gradient."""
    args = leaves(device, dtype, nested=nested)
    tensors = [t for t in args["weight"].tensors() if t is not None]
    assert [t.data_ptr() for t in saved(args)] == [t.data_ptr() for t in tensors]
    assert saved(leaves(device, dtype, ("bias",), nested=nested)) == []


def test_a_weight_changed_before_the_backward_is_found_out(device):
    args = leaves(device)
    y = pk.nf4_linear(*args.values())
    args["weight"].packed.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_retain_graph_gives_the_same_twice_and_nothing_is_written(device):
    args = leaves(device, torch.bfloat16)
    tensors = [args["x"], args["bias"], *args["weight"].tensors()]
    before = [t.detach().clone() for t in tensors]
    y = pk.nf4_linear(*args.values())
    wanted = args["x"], args["bias"]
    first = torch.autograd.grad(y, wanted, gradient_of(y), retain_graph=True)
    second = torch.autograd.grad(y, wanted, gradient_of(y))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) and a._version == 0 for a, b in zip(tensors, before, strict=True))


@pytest.mark.parametrize("wanted", ["x", "bias"])
def test_second_derivative_is_refused(device, wanted):
    args = leaves(device)
    y = pk.nf4_linear(*args.values())
    (first,) = torch.autograd.grad(y.square().sum(), args[wanted], create_graph=True)
    with pytest.raises(RuntimeError, match="nf4_linear has no second derivative"):
        first.sum().backward()


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_activation_checkpointing(device, reentrant):
    again = run(leaves(device, torch.bfloat16), partial(checkpoint, pk.nf4_linear, use_reentrant=reentrant))
    assert_same(run(leaves(device, torch.bfloat16)), again)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_compiled_without_graph_breaks(device, dtype, nested):
    compiled = torch.compile(pk.nf4_linear, backend="aot_eager", fullgraph=True)
    args = [leaves(device, dtype, bias=torch.float32, shape=(2, M), nested=nested) for _ in range(2)]
    assert_same(run(args[0]), run(args[1], compiled))


def test_meta_tensors_give_shapes_and_dtypes():
    args = leaves("meta", torch.bfloat16, bias=torch.float32, shape=(2, M))
    y = pk.nf4_linear(*args.values())
    y.backward(torch.ones_like(y))
    assert y.shape == (2, M, N) and args["x"].grad.shape == (2, M, K)
    assert args["bias"].grad.shape == (N,) and args["bias"].grad.dtype == torch.float32


def _bad() -> dict[str, tuple[dict, str]]:
    """What is wrong -> (changed arguments, what the message must say)."""
    z = torch.zeros
    three = checks.weight_of(Case(1, 5, 11))
    three = type(three)(*three.tensors(), (5, 11, 1), torch.float32)
    return {
        "x of rank 0": ({"x": z(())}, r"x is torch.float32 \[\] .*expected \[..., 11\]"),
        "x too wide": ({"x": z(4, 12)}, r"x is .*\[4, 12\].*expected \[..., 11\] to match weight \[5, 11\]"),
        "x of integers": ({"x": z(4, 11, dtype=torch.int64)}, "x is torch.int64.*floating"),
        "x no tensor": ({"x": 3.0}, "x is 3.0; expected a tensor"),
        "weight a tensor": ({"weight": z(5, 11)}, "weight is Tensor; expected an NF4Weight"),
        "weight of three dimensions": ({"weight": three}, r"weight has shape \[5, 11, 1\]; expected two dimensions"),
        "weight elsewhere": ({"weight": three.to("meta")}, "weight .*"),
        "bias too long": ({"bias": z(6)}, r"bias is .*\[6\].*expected \[5\]"),
        "bias a column": ({"bias": z(5, 1)}, r"bias is .*\[5, 1\].*expected \[5\]"),
        "bias of integers": ({"bias": z(5, dtype=torch.int8)}, "bias is torch.int8.*floating"),
    }


@pytest.mark.parametrize("wrong", _bad())
def test_bad_input_is_refused_before_any_work(monkeypatch, wrong):
    changed, message = _bad()[wrong]
    monkeypatch.setattr(op, "nf4_linear_fwd", lambda *a: pytest.fail("work was done"))
    args = {"x": torch.zeros(4, 11), "weight": checks.weight_of(Case(1, 5, 11)), "bias": torch.zeros(5), **changed}
    with pytest.raises(ValueError, match=f"nf4_linear: {message}"):
        pk.nf4_linear(**args)
