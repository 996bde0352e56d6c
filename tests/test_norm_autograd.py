"""`peft_kernels.layer_norm` and `rms_norm` as autograd sees them: values, which gradients, repeats, compile, errors."""

from functools import partial
from itertools import combinations

import bounds
import bounds_norm
import pytest
import torch
from cases import LAYOUTS
from norm_public import EPS, FUNCTIONS, LEAVES, K, M, assert_same, call, gradient_of, leaves, run, torchs
from torch.utils.checkpoint import checkpoint

from peft_kernels.kernels.norm import autograd, op

SUBSETS = [names for n in range(1, 5) for names in combinations(LEAVES, n)]
FROZEN = ("x", "bias")  # what requires grad where only biases train
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.parametrize("name", FUNCTIONS),
]


def check(name: str, args: dict, use_total: bool = True) -> None:
    """Outputs and gradients against fp64 truth, in their leaf's dtype; none for what does not require grad."""
    found, rms = run(FUNCTIONS[name], args, use_total), name == "rms_norm"
    x, weight, bias = args["x"].detach(), args.get("weight"), args.get("bias")
    residual, dtotal = args.get("residual"), None
    if residual is not None:
        bounds.assert_within(found["total"], *bounds_norm.total(x, residual), "total")
        x, residual = found["total"], residual.detach()
        needed = args["x"].requires_grad or args["residual"].requires_grad
        dtotal = gradient_of(x, 2) if use_total and needed else None
    truth = bounds_norm.forward(x, weight, bias, EPS, rms, x.dtype)
    bounds.assert_within(found["y"], *truth["y"], "y")
    dy, statistics = gradient_of(found["y"]), bounds_norm.statistics(x, EPS, rms)
    for leaf, gradient in (("x", "dx"), ("residual", "dx"), ("weight", "dweight"), ("bias", "dbias")):
        if leaf not in args or not args[leaf].requires_grad:
            assert found.get(leaf) is None, f"{leaf} does not require grad and got one"
            continue
        dtype = args[leaf].dtype
        truth = bounds_norm.backward(dy, dtotal, x, statistics, weight, rms, dtype, x.dtype)
        assert found[leaf].dtype == dtype
        bounds.assert_within(found[leaf], *truth[gradient], gradient)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("needed", SUBSETS, ids="-".join)
def test_every_subset_of_requires_grad(device, name, needed, dtype):
    check(name, leaves(device, dtype, needed))
    if "residual" not in needed:
        alone = leaves(device, dtype, needed)
        del alone["residual"]
        check(name, alone)


@pytest.mark.parametrize("left_out", [("weight",), ("bias",), ("weight", "bias")], ids="-".join)
def test_without_weight_or_bias(device, name, left_out):
    check(name, {leaf: t for leaf, t in leaves(device).items() if leaf not in left_out})


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_a_weight_and_bias_of_another_dtype_get_the_fp32_sums(device, name, dtype):
    check(name, leaves(device, dtype, affine=torch.float32))
    mixed = leaves(device, dtype)
    check(name, mixed | {"bias": mixed["bias"].detach().float().requires_grad_()})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(device, name, layout):
    check(name, leaves(device, layout=layout))


def test_a_gradient_of_the_total_counts_once_and_may_be_missing(device, name):
    for use_total in (False, True):
        check(name, leaves(device, torch.bfloat16), use_total)
    args = leaves(device)
    _, total = call(FUNCTIONS[name], args)
    total.backward(dtotal := gradient_of(total))
    assert torch.equal(args["x"].grad, dtotal) and torch.equal(args["residual"].grad, dtotal)
    assert args["weight"].grad is None or not args["weight"].grad.any()


def test_what_comes_from_frozen_inputs_asks_for_no_gradient(device, name):
    y, total = call(FUNCTIONS[name], leaves(device, needed=("bias",)))
    assert y.requires_grad and not total.requires_grad
    assert not any(one.requires_grad for one in call(FUNCTIONS[name], leaves(device, needed=())))


@pytest.mark.parametrize("needed", [LEAVES, *((leaf,) for leaf in LEAVES)], ids="-".join)
def test_gradcheck(device, name, needed):
    args = leaves(device, torch.float64, needed, shape=(5,), k=7)
    assert torch.autograd.gradcheck(lambda x, r, w, b: FUNCTIONS[name](x, w, b, EPS, r), list(args.values()))
    del args["residual"]
    if "residual" not in needed:
        assert torch.autograd.gradcheck(lambda x, w, b: FUNCTIONS[name](x, w, b), list(args.values()))


@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (2, 1, 3), (0,), (2, 0)], ids=str)
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
def test_leading_dimensions(device, name, residual, shape):
    """Any number of them gives what Torch's own gives, and its shapes."""
    pair = [leaves(device, torch.float64, shape=shape) for _ in range(2)]
    pair = [args if residual else {k: v for k, v in args.items() if k != "residual"} for args in pair]
    ours, theirs = run(FUNCTIONS[name], pair[0]), run(torchs(name), pair[1])
    for one, value in ours.items():
        assert value is theirs[one] is None or value.shape == theirs[one].shape
        torch.testing.assert_close(value, theirs[one])


def test_the_default_eps_is_torchs(device, name):
    for dtype in (*DTYPES, torch.float64):
        x = torch.full((3, 8), 1e-3, dtype=dtype, device=device) + torch.arange(8, device=device).to(dtype) / 2**12
        theirs = getattr(torch.nn.functional, name)(x, (8,))
        u = 4 * bounds.unit_roundoff(dtype) if dtype.itemsize == 2 else 1e-4  # the eps in question change it by 9 %
        torch.testing.assert_close(FUNCTIONS[name](x), theirs, rtol=u, atol=u)


def test_a_residual_of_another_dtype_is_added_as_torch_adds(device, name):
    args = leaves(device, affine=torch.float32)
    args["x"] = args["x"].detach().bfloat16().requires_grad_()
    y, total = call(FUNCTIONS[name], args)
    assert y.dtype == total.dtype == torch.float32 and torch.equal(total, args["x"] + args["residual"])
    y.sum().backward()
    assert args["x"].grad.dtype == torch.bfloat16 and args["residual"].grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_autocast_gives_torchs_dtype(device, name, dtype):
    for own in (dtype, torch.float32, torch.float64):
        args = leaves(device, own)
        del args["residual"]
        with torch.autocast(device, dtype):
            ours, theirs = (call(f, args)[0] for f in (FUNCTIONS[name], torchs(name)))
        assert ours.dtype == theirs.dtype


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_an_autocast_that_widens_norms(device, name, dtype, monkeypatch):
    """As on a GPU: y in fp32 from a 16-bit x, of which no fp32 copy is kept."""
    monkeypatch.setitem(autograd._WIDENED, name, {device})
    args, kept = leaves(device, dtype, affine=torch.float32), []
    keep = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    with torch.autocast(device, dtype), keep:
        y, total = call(FUNCTIONS[name], args)
    assert y.dtype == torch.float32 and total.dtype == dtype
    assert [t.dtype for t in kept if t.dim() == 2] == [dtype]
    truth = bounds_norm.forward(total, args["weight"], args["bias"], EPS, name == "rms_norm", torch.float32)
    bounds.assert_within(y, *truth["y"], "y")
    y.backward(dy := gradient_of(y))
    statistics = bounds_norm.statistics(total, EPS, name == "rms_norm")
    truth = bounds_norm.backward(
        dy, None, total, statistics, args["weight"], name == "rms_norm", torch.float32, dtype
    )  # fmt: skip
    for leaf, gradient in (("x", "dx"), ("residual", "dx"), ("weight", "dweight"), ("bias", "dbias")):
        assert args[leaf].grad.dtype == args[leaf].dtype
        bounds.assert_within(args[leaf].grad, *truth[gradient], gradient)


@pytest.mark.parametrize("needed", [FROZEN, LEAVES], ids="-".join)
def test_retain_graph_gives_the_same_twice_and_nothing_is_written(device, name, needed):
    args = leaves(device, torch.bfloat16, needed)
    before = {leaf: t.detach().clone() for leaf, t in args.items()}
    outputs, wanted = call(FUNCTIONS[name], args), [args[leaf] for leaf in needed]
    grads = [gradient_of(one, seed) for seed, one in enumerate(outputs)]
    first = torch.autograd.grad(outputs, wanted, grads, retain_graph=True)
    second = torch.autograd.grad(outputs, wanted, grads)
    assert all(map(torch.equal, first, second))
    assert all(torch.equal(t, before[leaf]) and t._version == 0 for leaf, t in args.items())


@pytest.mark.parametrize("wanted", LEAVES)
def test_second_derivative_is_refused(device, name, wanted):
    args = leaves(device)
    y, _ = call(FUNCTIONS[name], args)
    (first,) = torch.autograd.grad(y.square().sum(), args[wanted], create_graph=True)
    with pytest.raises(RuntimeError, match=f"{name} has no second derivative: use torch.nn.functional.{name}"):
        first.sum().backward()


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_activation_checkpointing(device, name, reentrant):
    again = run(partial(checkpoint, FUNCTIONS[name], use_reentrant=reentrant), leaves(device, torch.bfloat16))
    assert_same(run(FUNCTIONS[name], leaves(device, torch.bfloat16)), again)


@pytest.mark.parametrize("needed", [FROZEN, LEAVES, ("bias",)], ids="-".join)
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
def test_compiled_without_graph_breaks(device, name, residual, needed):
    compiled = torch.compile(FUNCTIONS[name], backend="aot_eager", fullgraph=True)
    pair = [leaves(device, torch.bfloat16, needed, torch.float32, (2, M)) for _ in range(2)]
    pair = [args if residual else {k: v for k, v in args.items() if k != "residual"} for args in pair]
    assert_same(run(FUNCTIONS[name], pair[0]), run(compiled, pair[1]))


def test_compiled_under_autocast(device, name):
    compiled = torch.compile(FUNCTIONS[name], backend="aot_eager", fullgraph=True)
    pair = [leaves(device, torch.bfloat16, affine=torch.float32) for _ in range(2)]
    with torch.autocast(device, torch.bfloat16):
        found = [call(f, args) for f, args in zip((FUNCTIONS[name], compiled), pair, strict=True)]
    assert all(map(torch.equal, *found))


def test_meta_tensors_give_shapes_and_dtypes(name):
    args = leaves("meta", torch.bfloat16, LEAVES, torch.float32, (2, M))
    y, total = call(FUNCTIONS[name], args)
    torch.autograd.backward([y, total], [torch.ones_like(y), torch.ones_like(y)])
    assert y.shape == total.shape == (2, M, K)
    assert all(t.grad.shape == t.shape and t.grad.dtype == t.dtype for t in args.values())


def test_the_gradients_are_the_ops(device, name, monkeypatch):
    """A fault in the op is one in the public function: nothing else makes the gradients."""

    def sevens(dy, *others):
        return dy.new_full(dy.shape, 7), dy.new_full((K,), 7), dy.new_full((K,), 7)

    monkeypatch.setattr(op, "norm_bwd", sevens)
    found = run(FUNCTIONS[name], leaves(device))
    assert all((found[leaf] == 7).all() for leaf in LEAVES)
