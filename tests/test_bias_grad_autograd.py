"""`peft_kernels.bias_linear` as autograd sees it: values, which gradients, what is saved, repeats, compile, errors."""

from functools import partial
from itertools import combinations

import bounds
import bounds_sums
import pytest
import torch
import torch.nn.functional as F
from cases import LAYOUTS, lay_out
from torch.utils.checkpoint import checkpoint

import peft_kernels as pk
from peft_kernels.kernels.bias_grad import op

M, N, K = 37, 53, 72
LEAVES = ("x", "weight", "bias")
FROZEN = ("x", "bias")  # what requires grad where only biases train
SUBSETS = [names for n in range(1, 4) for names in combinations(LEAVES, n)]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

pytestmark = pytest.mark.usefixtures("poisoned")


def leaves(device, dtype=torch.float32, needed=LEAVES, bias=None, shape=(M,), layout="contiguous") -> dict:
    """x [*shape, K], weight [N, K] and bias [N] as leaves; those in `needed` require grad."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (*shape, K), "weight": (N, K), "bias": (N,)}
    drawn = {name: torch.randn(size, generator=generator, dtype=torch.float64) for name, size in shapes.items()}
    drawn["weight"] *= K**-0.5
    drawn = {name: t.to(dtype if name != "bias" else bias or dtype).to(device) for name, t in drawn.items()}
    if layout != "contiguous":
        drawn["x"] = lay_out(drawn["x"], layout)
    return {name: t.requires_grad_(name in needed) for name, t in drawn.items()}


def gradient_of(y: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype).to(y.device)


def run(args: dict, function=pk.bias_linear) -> dict:
    """y and the gradients of one forward and backward, by name."""
    y = function(*args.values())
    y.backward(gradient_of(y))
    return {"y": y.detach(), **{name: t.grad for name, t in args.items()}}


def assert_same(one: dict, other: dict) -> None:
    for name, value in one.items():
        same = other[name] is None if value is None else torch.equal(value, other[name])
        assert same, f"{name} differs"


def check(args: dict, needed=LEAVES) -> None:
    """Output and gradients against fp64 truth, in their leaf's dtype; none for what does not require grad."""
    found, dtype = run(args), args["x"].dtype
    x, weight = bounds.Approx.exact(args["x"]), bounds.Approx.exact(args["weight"])
    bias = bounds.Approx.exact(args["bias"]).rounded(dtype)
    dy = gradient_of(found["y"])
    row = bounds.Approx(bias.value.expand(*dy.shape), bias.error.expand(*dy.shape))
    y = x.matmul(weight.t, dtype).plus(row).rounded(bounds.accumulator(dtype)).rounded(dtype)
    grad = bounds.Approx.exact(dy)
    truth = {"y": (y.value, y.error)}
    for name, left, right in (("x", grad, weight), ("weight", grad.t, x)):
        product = left.matmul(right, dtype).rounded(dtype)
        truth[name] = product.value, product.error
    truth["bias"] = bounds_sums.bias_grad(dy, args["bias"].dtype)
    assert found["y"].dtype == dtype
    for name, value in found.items():
        if name in LEAVES and name not in needed:
            assert value is None, f"{name} does not require grad and got one"
            continue
        assert name == "y" or value.dtype == args[name].dtype
        bounds.assert_within(value, *truth[name], name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("needed", SUBSETS, ids="-".join)
def test_every_subset_of_requires_grad(device, needed, dtype):
    check(leaves(device, dtype, needed), needed)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_a_bias_of_another_dtype_comes_from_the_fp32_sums(device, dtype):
    check(leaves(device, dtype, bias=torch.float32))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_of_x(device, layout):
    check(leaves(device, layout=layout))


@pytest.mark.parametrize("needed", [LEAVES, *((name,) for name in LEAVES)], ids="-".join)
def test_gradcheck(device, needed):
    args = [t[..., :5, :7] if t.dim() == 2 else t[:5] for t in leaves(device, torch.float64).values()]
    args = [t.detach().clone().requires_grad_(n in needed) for n, t in zip(LEAVES, args, strict=True)]
    assert torch.autograd.gradcheck(pk.bias_linear, args)


@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (2, 1, 3), (0,), (2, 0)], ids=str)
def test_leading_dimensions(device, shape):
    """Any number of them gives what F.linear gives, and its shapes."""
    ours, theirs = (run(leaves(device, torch.float64, shape=shape), f) for f in (pk.bias_linear, F.linear))
    for name, value in ours.items():
        assert value.shape == theirs[name].shape
        torch.testing.assert_close(value, theirs[name])


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_autocast_as_linear(device, dtype):
    with torch.autocast(device, dtype):
        ours, theirs = (f(*leaves(device).values()) for f in (pk.bias_linear, F.linear))
    assert ours.dtype == theirs.dtype == dtype and torch.equal(ours, theirs)
    args = leaves(device)
    with torch.autocast(device, dtype):
        y = pk.bias_linear(*args.values())
    dy = gradient_of(y)
    y.backward(dy)
    assert all(t.grad.dtype == torch.float32 for t in args.values())
    bounds.assert_within(args["bias"].grad, *bounds_sums.bias_grad(dy, torch.float32), "dbias")
    with torch.autocast(device, dtype):
        assert pk.bias_linear(*leaves(device, torch.float64).values()).dtype == torch.float64


def saved(args: dict) -> list[torch.Tensor]:
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        pk.bias_linear(*args.values())
    return kept


@pytest.mark.parametrize("shape", [(M,), (2, M)], ids=str)
@pytest.mark.parametrize("bias", [None, torch.float32], ids=["same", "fp32-bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_saved_is_the_weight_alone(device, dtype, bias, shape):
    """Of the tensors themselves: no copy of the weight, never x while the weight is frozen."""
    for needed, names in ((FROZEN, ["weight"]), (("bias",), []), (LEAVES, ["x", "weight"]), (("weight",), ["x"])):
        args = leaves(device, dtype, needed, bias, shape)
        kept = [t.untyped_storage().data_ptr() for t in saved(args)]
        assert kept == [args[name].untyped_storage().data_ptr() for name in names], f"{needed}: saved {len(kept)}"


def test_saved_under_autocast_is_the_parameter_not_its_copy(device):
    args = leaves(device, needed=FROZEN)
    with torch.autocast(device, torch.bfloat16):
        (kept,) = saved(args)
    assert kept.data_ptr() == args["weight"].data_ptr()


@pytest.mark.parametrize("needed", [FROZEN, LEAVES], ids="-".join)
def test_retain_graph_gives_the_same_twice_and_nothing_is_written(device, needed):
    args = leaves(device, torch.bfloat16, needed)
    before = {name: t.detach().clone() for name, t in args.items()}
    y = pk.bias_linear(*args.values())
    wanted = [args[name] for name in needed]
    first = torch.autograd.grad(y, wanted, gradient_of(y), retain_graph=True)
    second = torch.autograd.grad(y, wanted, gradient_of(y))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(t, before[name]) and t._version == 0 for name, t in args.items())


@pytest.mark.parametrize("wanted", LEAVES)
def test_second_derivative_is_refused(device, wanted):
    args = leaves(device)
    y = pk.bias_linear(*args.values())
    (first,) = torch.autograd.grad(y.square().sum(), args[wanted], create_graph=True)
    with pytest.raises(RuntimeError, match="bias_linear has no second derivative"):
        first.sum().backward()


class NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, dy):
        return None


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_where_y_has_no_gradient_nothing_has(device, activation):
    args = leaves(device)
    y = pk.bias_linear(*args.values(), activation)
    assert torch.autograd.grad(NoGradient.apply(y).sum(), list(args.values()), allow_unused=True) == (None,) * 3


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_activation_checkpointing(device, reentrant):
    again = run(leaves(device, torch.bfloat16), partial(checkpoint, pk.bias_linear, use_reentrant=reentrant))
    assert_same(run(leaves(device, torch.bfloat16)), again)


@pytest.mark.parametrize("needed", [FROZEN, LEAVES], ids="-".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_without_graph_breaks(device, dtype, needed):
    compiled = torch.compile(pk.bias_linear, backend="aot_eager", fullgraph=True)
    args = [leaves(device, dtype, needed, torch.float32, (2, M)) for _ in range(2)]
    assert_same(run(args[0]), run(args[1], compiled))


def test_meta_tensors_give_shapes_and_dtypes():
    args = leaves("meta", torch.bfloat16, FROZEN, torch.float32, (2, M))
    y = pk.bias_linear(*args.values())
    y.backward(torch.ones_like(y))
    assert y.shape == (2, M, N) and args["x"].grad.shape == (2, M, K)
    assert args["bias"].grad.shape == (N,) and args["bias"].grad.dtype == torch.float32


def _bad(device: str) -> dict[str, tuple[dict, str]]:
    """What is wrong -> (changed arguments, what the message must say)."""
    z = partial(torch.zeros, device=device)
    return {
        "x of rank 0": ({"x": z(())}, r"x is torch.float32 \[\] .*expected \[..., 11\]"),
        "x too wide": ({"x": z(4, 12)}, r"x is .*\[4, 12\].*expected \[..., 11\] to match weight \[5, 11\]"),
        "x of integers": ({"x": z(4, 11, dtype=torch.int64)}, "x is torch.int64.*floating"),
        "weight of one dimension": ({"weight": z(11)}, r"weight is .*\[11\].*two dimensions"),
        "weight of another dtype": ({"weight": z(5, 11).half()}, "weight is torch.float16.*x's dtype, torch.float32"),
        "weight elsewhere": ({"weight": torch.zeros(5, 11, device="meta")}, "weight is .* on meta.*device of x"),
        "bias too long": ({"bias": z(6)}, r"bias is .*\[6\].*expected \[5\]"),
        "bias a column": ({"bias": z(5, 1)}, r"bias is .*\[5, 1\].*expected \[5\]"),
        "no bias": ({"bias": None}, "bias is None; expected a tensor"),
        "bias of integers": ({"bias": z(5, dtype=torch.int8)}, "bias is torch.int8.*floating"),
    }


@pytest.mark.parametrize("wrong", _bad("cpu"))
def test_bad_input_is_refused_before_any_work(device, monkeypatch, wrong):
    changed, message = _bad(device)[wrong]
    z = partial(torch.zeros, device=device)
    monkeypatch.setattr(F, "linear", lambda *a: pytest.fail("work was done"))
    with pytest.raises(ValueError, match=f"bias_linear: {message}"):
        pk.bias_linear(**{"x": z(4, 11), "weight": z(5, 11), "bias": z(5), **changed})


def test_the_gradient_is_the_ops(device, monkeypatch):
    """A fault in the op is one in the public function: nothing else makes the bias gradient."""
    monkeypatch.setattr(op, "bias_grad", lambda dy, dtype: dy.new_full((dy.shape[1],), 7, dtype=dtype))
    assert (run(leaves(device))["bias"] == 7).all()
