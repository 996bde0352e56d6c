"""`peft_kernels.qlora_linear`: values and gradients, what is saved, dropout, checkpoints, compile, errors."""

from dataclasses import replace
from functools import partial
from itertools import combinations

import pytest
import qlora_cases
import torch
from cases import Case, inputs
from qlora_cases import LEAVES, call, leaves, quantized, run
from test_saved_bytes import saved_bytes
from torch.utils.checkpoint import checkpoint

import peft_kernels as pk
from peft_kernels.kernels.qlora_linear import configs, parts

pytestmark = pytest.mark.usefixtures("poisoned")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MANY = configs.DENSE_ROWS + 5  # rows with which the weight is dequantised
ROWS = (1, 3, 37, 130, configs.DENSE_ROWS - 1, configs.DENSE_ROWS, MANY)
DOUBLE = [pytest.param(False, id="fp32-scales"), pytest.param(True, id="double-quant")]
BOTH = [pytest.param(0.0, id="plain"), pytest.param(0.5, id="dropout")]
PLAIN = Case(37, 53, 71, 12, torch.float32)


@pytest.mark.parametrize("double_quant", DOUBLE)
@pytest.mark.parametrize("M", ROWS)
@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64), ids=str)
def test_values_and_gradients(device, dtype, M, double_quant):
    """K = 71: rows begin in the middle of a byte, blocks cross rows; K = 192: neither."""
    for K in (71, 192):
        qlora_cases.check(Case(M, 53, K, 12, dtype), device, double_quant)
        qlora_cases.check(Case(M, 53, K, 12, dtype, dropout=0.5, adapters=torch.float32), device, double_quant)


@pytest.mark.parametrize("blocksize", [32, 64, 128, 4096])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("M", [5, MANY])
def test_every_kind_of_weight(device, M, quant_type, blocksize):
    case = Case(M, 80, 256, 8, torch.bfloat16, bias=torch.float32)
    qlora_cases.check(case, device, True, quant_type=quant_type, blocksize=blocksize)


@pytest.mark.parametrize("M", [37, MANY])
@pytest.mark.parametrize("needed", [names for n in range(1, 5) for names in combinations(LEAVES, n)], ids="-".join)
def test_every_subset_of_requires_grad(device, M, needed):
    qlora_cases.check(Case(M, 53, 71, 12, torch.bfloat16, dropout=0.5, adapters=torch.float32), device, True, needed)


@pytest.mark.parametrize("M", [37, MANY])
@pytest.mark.parametrize("layout", ["transposed", "rows", "columns", "expanded", "offset"])
def test_strides_of_x_and_dy(device, M, layout):
    qlora_cases.check(replace(PLAIN, M=M, layout=layout), device, True)


@pytest.mark.parametrize("shape", [(0, 5, 7, 2), (2, 1, 1, 1), (1, 65, 129, 3), (600, 3, 640, 16)], ids=str)
@pytest.mark.parametrize("bias", ["same", None], ids=["bias", "no-bias"])
def test_odd_sizes(device, shape, bias):
    qlora_cases.check(Case(*shape, torch.bfloat16, bias=bias), device, True)


@pytest.mark.parametrize("shape", [(71,), (2, 3, 71), (0, 71), (2, 0, 71)], ids=str)
def test_leading_dimensions(device, shape):
    data = inputs(PLAIN, device)
    weight = quantized(data, True)
    x = torch.randn(shape, device=device)
    y = pk.qlora_linear(x, weight, data.lora_a, data.lora_b, 2.0, data.bias)
    flat = pk.qlora_linear(x.reshape(-1, 71), weight, data.lora_a, data.lora_b, 2.0, data.bias)
    assert y.shape == (*shape[:-1], 53) and torch.equal(y.reshape(-1, 53), flat)


@pytest.mark.parametrize("M", [7, MANY])
@pytest.mark.parametrize("p", BOTH)
def test_gradcheck(device, M, p):
    case = Case(M, 5, 11, 3, torch.float64, dropout=p)
    data = inputs(case, device)
    args, weight = leaves(data), quantized(data, True)

    def function(*tensors):
        return call(dict(zip(LEAVES, tensors, strict=True)), weight, case)

    assert torch.autograd.gradcheck(function, [args[name] for name in LEAVES], fast_mode=True)


@pytest.mark.parametrize("M", [MANY, 33])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_exact_bytes_saved(device, M, p):
    """Besides parameters: x, S and the mask's bits. A dequantised weight is never among them."""
    N, K, R = 96, 136, 16
    case = Case(M, N, K, R, torch.bfloat16, adapters=torch.float32, dropout=p)
    data = inputs(case, device)
    weight = quantized(data, True)

    def ours(needed) -> int:
        args = leaves(data, needed)
        owned = [tensor for tensor in (*weight.tensors(), *args.values()) if tensor is not args["x"]]
        return saved_bytes(lambda: call(args, weight, case), owned)

    x, s, mask = 2 * M * K, 2 * M * R, M * -(-K // 8) * bool(p)
    assert ours(LEAVES) == x + s + mask
    assert ours(("x", "lora_b")) == s + mask  # LoRA-FA: lora_a is frozen
    assert ours(("x",)) == mask
    assert ours(("bias",)) == 0


@pytest.mark.parametrize("needed", [("x",), ("lora_a", "lora_b", "bias")], ids="-".join)
def test_the_weight_is_kept_for_dx_alone(device, needed):
    data = inputs(PLAIN, device)
    weight, saved = quantized(data, True), []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor.data_ptr()), lambda tensor: tensor
    ):
        call(leaves(data, needed), weight, PLAIN)
    assert (weight.packed.data_ptr() in saved) == ("x" in needed)


@pytest.mark.parametrize("M", [33, MANY])
def test_a_weight_overwritten_in_between_is_found_out(device, M):
    data = inputs(replace(PLAIN, M=M), device)
    weight = quantized(data, True)
    y = call(leaves(data), weight, PLAIN)
    weight.packed.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(data.dy)


def test_a_small_delta_is_not_lost_beside_the_base(device):
    """With few rows too the branch is added before the one rounding of y, not to a base that is rounded already."""
    M, N, K = 4, 64, 256
    torch.manual_seed(0)
    x = torch.randn(M, K, device=device).bfloat16()
    base = pk.nf4_quantize(torch.randn(N, K, device=device).bfloat16())
    lora_a = torch.randn(8, K, device=device).bfloat16()
    lora_b = torch.full((N, 8), 2.0**-14, device=device).bfloat16()
    plain = pk.nf4_linear(x, base).double()
    delta = (x.double() @ lora_a.double().T) @ lora_b.double().T
    moved = pk.qlora_linear(x, base, lora_a, lora_b, 1.0).double() - plain
    # Where y is far larger than delta both round to the same number; near zero they must not.
    small = plain.abs() < 64 * delta.abs()
    assert small.any() and (moved[small] != 0).any()


@pytest.mark.parametrize("M", [37, MANY])
@pytest.mark.parametrize("p", BOTH)
def test_repeats_checkpoints_and_retained_graphs(device, M, p):
    """The same bits: a second run, a second backward, and a forward recomputed under activation checkpointing."""
    case = Case(M, 53, 71, 12, torch.bfloat16, dropout=p, adapters=torch.float32)
    y, grads = run(case, device)
    for function in (None, *(partial(checkpoint, pk.qlora_linear, use_reentrant=kind) for kind in (True, False))):
        again, recomputed = run(case, device, function=function)
        assert torch.equal(y, again)
        assert all(torch.equal(grads[name], recomputed[name]) for name in LEAVES)
    data = inputs(case, device)
    args = leaves(data)
    y = call(args, quantized(data, True), case)
    y.backward(data.dy, retain_graph=True)
    y.backward(data.dy)
    assert all(torch.equal(args[name].grad, grads[name] + grads[name]) for name in LEAVES)


@pytest.mark.parametrize("M", [37, MANY])
@pytest.mark.parametrize("wanted", LEAVES)
def test_second_derivative_is_refused(device, M, wanted):
    data = inputs(Case(M, 5, 11, 3, torch.float64), device)
    args = leaves(data)
    y = call(args, quantized(data, True), PLAIN)
    (first,) = torch.autograd.grad(y.square().sum(), args[wanted], create_graph=True)
    with pytest.raises(RuntimeError, match="qlora_linear has no second derivative"):
        first.sum().backward()


@pytest.mark.parametrize("p", BOTH)
def test_compiled_without_graph_breaks(device, p):
    compiled = torch.compile(pk.qlora_linear, backend="aot_eager", fullgraph=True)
    for M in (37, MANY):
        case = Case(M, 53, 72, 12, torch.bfloat16, dropout=p, adapters=torch.float32)
        y, grads = run(case, device)
        again, compiled_grads = run(case, device, function=compiled)
        assert torch.equal(y, again)
        assert all(torch.equal(grads[name], compiled_grads[name]) for name in LEAVES)


@pytest.mark.parametrize("M", [37, MANY])
def test_autocast_is_the_call_on_cast_inputs(device, M):
    case = Case(M, 53, 71, 12, torch.float32)
    data = inputs(case, device)
    weight, args = quantized(data, True), leaves(data)
    with torch.autocast(device, torch.bfloat16):
        y = call(args, weight, case)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, call({**args, "x": args["x"].bfloat16()}, weight, case))
    y.backward(data.dy.bfloat16())
    assert all(args[name].grad.dtype == torch.float32 for name in LEAVES)


def _bad() -> dict[str, tuple[dict, str]]:
    z = torch.zeros
    other = pk.nf4_quantize(z(6, 11))
    return {
        "weight not quantised": ({"weight": z(5, 11)}, "weight is Tensor; expected an NF4Weight"),
        "weight of another N": ({"weight": other}, r"weight has shape \[6, 11\]; expected \[5, 11\]"),
        "weight of three dimensions": ({"weight": pk.nf4_quantize(z(5, 11, 1))}, r"\[5, 11, 1\]; expected \[5, 11\]"),
        "weight elsewhere": ({"weight": pk.nf4_quantize(z(5, 11)).to("meta")}, r"weight.packed .*meta.*device of x"),
        "x too wide": ({"x": z(4, 12)}, r"x is .*\[4, 12\].*expected \[..., 11\] to match weight"),
        "x of integers": ({"x": z(4, 11, dtype=torch.int64)}, r"x is torch.int64"),
        "x no tensor": ({"x": [1.0]}, r"x is \[1.0\]; expected a tensor"),
        "lora_b of another rank": ({"lora_b": z(5, 4)}, r"lora_b is .*expected \[N, 3\]"),
        "bias too long": ({"bias": z(6)}, r"bias is .*expected \[5\]"),
        "dropout_p above 1": ({"dropout_p": 1.5}, "dropout_p is 1.5"),
    }


@pytest.mark.parametrize("wrong", _bad())
def test_bad_input_is_refused_before_any_kernel(monkeypatch, wrong):
    changed, message = _bad()[wrong]
    z = torch.zeros
    args = {"x": z(4, 11), "weight": pk.nf4_quantize(z(5, 11)), "lora_a": z(3, 11), "lora_b": z(5, 3), "scaling": 2.0}
    monkeypatch.setattr(parts, "forward", lambda *a: pytest.fail("a kernel ran"))
    with pytest.raises(ValueError, match=message):
        pk.qlora_linear(**{**args, **changed})
