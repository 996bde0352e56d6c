"""`peft_kernels.bias_linear` with an activation as autograd sees it: values, what is saved, compile, errors."""

import re
from functools import partial
from itertools import combinations

import bounds
import bounds_act
import pytest
import torch
import torch.nn.functional as F
from act_checks import ACTIVATIONS, DTYPES, SMOOTH, mask_of, wide
from cases import LAYOUTS
from test_bias_grad_autograd import FROZEN, LEAVES, K, M, N, assert_same, gradient_of, leaves, run
from torch.utils.checkpoint import checkpoint

import peft_kernels as pk
from peft_kernels.kernels.bias_grad import op

SUBSETS = [names for n in range(1, 4) for names in combinations(LEAVES, n)]
TORCHS = {"relu": F.relu, "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh"), "silu": F.silu}

pytestmark = pytest.mark.usefixtures("poisoned")


def ours(activation: str):
    return partial(pk.bias_linear, activation=activation)


def theirs(activation: str):
    """What Torch has for it: two functions."""
    return lambda x, weight, bias: TORCHS[activation](F.linear(x, weight, bias))


def check(args: dict, activation: str, needed=LEAVES) -> None:
    """y bit for bit Torch's; gradients against fp64 truth, from the z that the forward has; none where none is due."""
    found = run(args, ours(activation))
    x, weight, dtype = args["x"].detach(), args["weight"].detach(), args["x"].dtype
    z = F.linear(x, weight, args["bias"].detach().to(dtype))
    assert torch.equal(found["y"], TORCHS[activation](z)), "y differs"
    dy = gradient_of(found["y"])
    kept = mask_of(z) if activation == "relu" else z
    sums = bounds_act.act_bwd(dy, kept, activation, dtype)
    dz = bounds.Approx(*sums["dz"])
    truth = {"bias": bounds_act.act_bwd(dy, kept, activation, args["bias"].dtype)["dbias"]}
    for name, left, right in (("x", dz, weight), ("weight", dz.t, x)):
        product = left.matmul(bounds.Approx.exact(right), dtype).rounded(dtype)
        truth[name] = product.value, product.error
    for name in LEAVES:
        assert (found[name] is not None) == (name in needed), f"{name} has {found[name]}"
        if name in needed:
            assert found[name].dtype == args[name].dtype
            bounds.assert_within(found[name], *truth[name], name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("needed", SUBSETS, ids="-".join)
def test_every_subset_of_requires_grad(device, needed, activation, dtype):
    check(leaves(device, dtype, needed), activation, needed)


@pytest.mark.parametrize("dtype", DTYPES[1:3], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_bias_of_another_dtype_comes_from_the_fp32_sums(device, activation, dtype):
    check(leaves(device, dtype, bias=torch.float32), activation)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_strides_of_x(device, activation, layout):
    check(leaves(device, layout=layout), activation)


@pytest.mark.parametrize("needed", [LEAVES, *((name,) for name in LEAVES)], ids="-".join)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(device, activation, needed):
    args = [t[..., :5, :7] if t.dim() == 2 else t[:5] for t in leaves(device, torch.float64).values()]
    args = [t.detach().clone().requires_grad_(n in needed) for n, t in zip(LEAVES, args, strict=True)]
    assert torch.autograd.gradcheck(ours(activation), args)


@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (2, 1, 3), (0,), (2, 0)], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_leading_dimensions(device, activation, shape):
    """Any number of them gives what Torch's two functions give, and their shapes."""
    one, other = (run(leaves(device, torch.float64, shape=shape), f(activation)) for f in (ours, theirs))
    for name, value in one.items():
        assert value.shape == other[name].shape
        torch.testing.assert_close(value, other[name])


@pytest.mark.parametrize("dtype", DTYPES[1:3], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_autocast_as_torchs(device, activation, dtype):
    args = leaves(device)
    with torch.autocast(device, dtype):
        y, other = ours(activation)(*args.values()), theirs(activation)(*leaves(device).values())
        z = F.linear(*(t.detach() for t in args.values()))
    assert y.dtype == other.dtype == dtype and torch.equal(y, other)
    dy = gradient_of(y)
    y.backward(dy)
    assert all(t.grad.dtype == torch.float32 for t in args.values())
    truth = bounds_act.act_bwd(dy, mask_of(z) if activation == "relu" else z, activation, torch.float32)
    bounds.assert_within(args["bias"].grad, *truth["dbias"], "dbias")
    with torch.autocast(device, dtype):
        assert ours(activation)(*leaves(device, torch.float64).values()).dtype == torch.float64


def saved(args: dict, function) -> list[torch.Tensor]:
    """What is kept and holds anything."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        function(*args.values())
    return [t for t in kept if t.numel()]


def saved_bytes(args: dict, function) -> int:
    """Bytes of the storages kept beside the arguments', each once."""
    own = {t.untyped_storage().data_ptr() for t in args.values()}
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved(args, function)}
    return sum(size for pointer, size in found.items() if pointer not in own)


@pytest.mark.parametrize("shape", [(M,), (2, M)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_saved_bytes_beside_torchs(device, activation, dtype, shape):
    """z where Torch keeps z, a bit where Torch keeps y; of the arguments weight if x needs a gradient, x if weight."""
    rows = torch.Size(shape).numel()
    for needed, names in ((FROZEN, ["weight"]), (("bias",), []), (LEAVES, ["x", "weight"]), (("weight",), ["x"])):
        args = leaves(device, dtype, needed, shape=shape)
        *kept, last = saved(args, ours(activation))
        assert [t.untyped_storage().data_ptr() for t in kept] == [args[n].untyped_storage().data_ptr() for n in names]
        own, others = (saved_bytes(args, f(activation)) for f in (ours, theirs))
        assert others == rows * N * dtype.itemsize
        assert own == last.untyped_storage().nbytes() == (rows * -(-N // 8) if activation == "relu" else others)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nothing_is_saved_where_nothing_needs_a_gradient(device, activation, monkeypatch):
    monkeypatch.setattr(op, "relu_fwd", lambda z: pytest.fail("a mask was made"))
    args = leaves(device, needed=())
    expected = theirs(activation)(*args.values())
    assert saved(args, ours(activation)) == []
    for needed in ((), LEAVES):
        with torch.no_grad():
            y = ours(activation)(*leaves(device, needed=needed).values())
        assert torch.equal(y, expected) and not y.requires_grad


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("needed", [FROZEN, LEAVES, ("bias",)], ids="-".join)
def test_retain_graph_gives_the_same_twice_and_nothing_is_written(device, needed, activation):
    args = leaves(device, torch.bfloat16, needed)
    before = {name: t.detach().clone() for name, t in args.items()}
    y = ours(activation)(*args.values())
    wanted, dy = [args[name] for name in needed], gradient_of(y)
    untouched = dy.clone()
    first = torch.autograd.grad(y, wanted, dy, retain_graph=True)
    second = torch.autograd.grad(y, wanted, dy)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(t, before[name]) and t._version == 0 for name, t in args.items())
    assert torch.equal(dy, untouched) and dy._version == 0


@pytest.mark.parametrize("wanted", LEAVES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_second_derivative_is_refused(device, activation, wanted):
    args = leaves(device)
    y = ours(activation)(*args.values())
    (first,) = torch.autograd.grad(y.square().sum(), args[wanted], create_graph=True)
    with pytest.raises(RuntimeError, match="bias_linear has no second derivative"):
        first.sum().backward()


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_checkpointing(device, activation, reentrant):
    again = run(leaves(device, torch.bfloat16), partial(checkpoint, ours(activation), use_reentrant=reentrant))
    assert_same(run(leaves(device, torch.bfloat16), ours(activation)), again)


@pytest.mark.parametrize("needed", [FROZEN, LEAVES], ids="-".join)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_compiled_without_graph_breaks(device, activation, needed):
    compiled = torch.compile(ours(activation), backend="aot_eager", fullgraph=True)
    args = [leaves(device, torch.bfloat16, needed, torch.float32, (2, M)) for _ in range(3)]
    assert_same(run(args[0], ours(activation)), run(args[1], compiled))
    with torch.no_grad():
        assert torch.equal(compiled(*args[2].values()), ours(activation)(*args[2].values()))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_meta_tensors_give_shapes_and_dtypes(activation):
    args = leaves("meta", torch.bfloat16, FROZEN, torch.float32, (2, M))
    y = ours(activation)(*args.values())
    y.backward(torch.ones_like(y))
    assert y.shape == (2, M, N) and args["x"].grad.shape == (2, M, K)
    assert args["bias"].grad.shape == (N,) and args["bias"].grad.dtype == torch.float32


@pytest.mark.parametrize("activation", ["swish", "", "GELU", torch.nn.GELU(), 3], ids=str)
def test_an_unknown_activation_is_refused_before_any_work(device, monkeypatch, activation):
    args = leaves(device)
    monkeypatch.setattr(F, "linear", lambda *a: pytest.fail("work was done"))
    said = re.escape(f"bias_linear: activation is {activation!r}; expected")
    with pytest.raises(ValueError, match=f"{said} None or one of relu, gelu, gelu_tanh, silu"):
        pk.bias_linear(*args.values(), activation)


@pytest.mark.parametrize("activation", SMOOTH)
def test_the_gradient_is_the_ops(device, monkeypatch, activation):
    """One pass makes both: a fault in the op is one in the public function."""
    asked = []

    def fake(dy, kept, activation, need_dz, need_dbias, dtype):
        asked.append((activation, need_dz, need_dbias, dtype))
        return torch.full_like(dy, 5), dy.new_full((dy.shape[1],), 7, dtype=dtype)

    monkeypatch.setattr(op, "act_bwd", fake)
    monkeypatch.setattr(op, "bias_grad", lambda *a: pytest.fail("a second pass over dy"))
    found = run(leaves(device, torch.bfloat16, bias=torch.float32), ours(activation))
    assert (found["bias"] == 7).all() and found["x"].abs().max() > 0
    run(leaves(device, torch.bfloat16, ("bias",)), ours(activation))
    run(leaves(device, torch.bfloat16, ("weight",)), ours(activation))
    wider = wide(torch.bfloat16)
    flags = (True, True, wider), (False, True, torch.bfloat16), (True, False, torch.bfloat16)
    assert asked == [(activation, *one) for one in flags]
