"""nf4_quantize, nf4_quantize_scales and nf4_dequantize: every implementation's bits, the public functions, the ops."""

import copy
import pickle

import nf4_checks as checks
import pytest
import torch
from nf4_checks import IN_DTYPES, OP, OUT_DTYPES, REFERENCE, TYPES, Ops, quantized, weights
from nf4_truth import CODE, same_bits, true_scales

import peft_kernels as pk
from peft_kernels.formats.nf4 import BLOCKSIZES, NF4Weight
from peft_kernels.kernels.nf4 import op

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture(params=["reference", "op"])
def ops(request) -> Ops:
    return {"reference": REFERENCE, "op": OP}[request.param]


@pytest.mark.parametrize("dtype", IN_DTYPES, ids=str)
@pytest.mark.parametrize("check", checks.CHECKS, ids=lambda check: check.__name__)
def test_quantize(ops, device, check, dtype):
    check(ops, dtype, device)


@pytest.mark.parametrize("check", checks.SCALE_CHECKS, ids=lambda check: check.__name__)
def test_scales(ops, device, check):
    check(ops, torch.float32, device)


@pytest.mark.parametrize("dtype", OUT_DTYPES, ids=str)
@pytest.mark.parametrize("check", checks.VALUE_CHECKS, ids=lambda check: check.__name__)
def test_dequantize(ops, device, check, dtype):
    check(ops, dtype, device)


@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0)], ids=str)
@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "nested"])
def test_nothing_to_quantise(ops, device, shape, double_quant):
    empty = torch.zeros(shape, device=device)
    packed, absmax = ops.quantize(empty, "nf4", 64)
    assert (packed.dtype, absmax.dtype) == (torch.uint8, torch.float32) and packed.numel() == absmax.numel() == 0
    codes, nested, offset = ops.quantize_scales(absmax, CODE.to(device))
    assert (codes.dtype, nested.dtype) == (torch.uint8, torch.float32) and codes.numel() == nested.numel() == 0
    assert offset.shape == (1,) and offset.isnan().all(), "PyTorch's mean of nothing is NaN"
    values = pk.nf4_dequantize(pk.nf4_quantize(empty, double_quant=double_quant))
    assert values.shape == shape and values.dtype == torch.float32


@pytest.mark.parametrize("dtype", IN_DTYPES, ids=str)
@pytest.mark.parametrize("quant_type", TYPES)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "nested"])
def test_a_weight_comes_back_within_half_a_step(device, dtype, quant_type, blocksize, double_quant):
    """What is between two levels goes to the nearer one, by fp32's roundings: half the widest step of the block's
    scale, and what storing that in 8 bits adds: half its widest step of the deviation from the mean. There are fewer
    than 16 roundings on the way, each of 2^-24 of absmax at most."""
    weight = weights(70 * 61, dtype, device).view(70, 61)
    q = pk.nf4_quantize(weight, quant_type, blocksize, double_quant)
    level = torch.tensor(sorted(checks.LEVELS[quant_type]), dtype=torch.float64)
    step, code_step = (level[1:] - level[:-1]).max(), (CODE[1:] - CODE[:-1]).max().double()
    plain, absmax = op.nf4_quantize(weight, quant_type, blocksize)
    absmax = absmax.double().cpu()
    moved = (absmax - absmax.mean()).abs().max() * code_step / 2 if double_quant else 0
    limit = absmax * step / 2 + moved + absmax.max() * 2**-20
    error = (pk.nf4_dequantize(q, torch.float64) - weight.double()).abs().flatten().cpu()
    assert torch.equal(q.packed, plain)
    assert (error <= limit.repeat_interleave(blocksize)[: len(error)]).all()


@pytest.mark.parametrize("dtype", OUT_DTYPES, ids=str)
def test_public_functions_are_the_ops(device, dtype):
    weight = weights(37 * 53, torch.bfloat16, device).view(37, 53)
    for quant_type in TYPES:
        for double_quant in (False, True):
            q = pk.nf4_quantize(weight, quant_type, 32, double_quant)
            packed, absmax = op.nf4_quantize(weight, quant_type, 32)
            expected = (packed, absmax)
            if double_quant:
                codes, nested, offset = true_scales(absmax)
                expected = (packed, codes, nested, CODE, offset)
            for i, one in enumerate(expected):
                same_bits(q.tensors()[i], one, f"tensor {i}")
            values = op.nf4_dequantize(*q.tensors(), quant_type, 32, weight.numel(), dtype)
            assert torch.equal(pk.nf4_dequantize(q, dtype), values.view(37, 53))
            assert pk.nf4_dequantize(q).dtype == torch.bfloat16
            assert (q.shape, q.dtype, q.quant_type, q.blocksize) == ((37, 53), torch.bfloat16, quant_type, 32)


def test_a_weight_with_a_gradient_is_read_without_it(device):
    weight = torch.randn(4, 64, device=device, requires_grad=True)
    assert not pk.nf4_dequantize(pk.nf4_quantize(weight)).requires_grad


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_weight_that_is_not_finite_is_refused(device, value):
    weight = torch.randn(3, 50, device=device)
    weight[2, 49] = value
    with pytest.raises(ValueError, match="weight is torch.float32 .* it holds NaN or an infinity"):
        pk.nf4_quantize(weight)


@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "nested"])
def test_an_nf4_weight_can_be_copied_stored_and_moved(device, double_quant):
    q = pk.nf4_quantize(torch.randn(33, 70, device=device), blocksize=128, double_quant=double_quant)
    for other in (pickle.loads(pickle.dumps(q)), copy.deepcopy(q), q.to("cpu").to(device)):
        for a, b in zip(q.tensors(), other.tensors(), strict=True):
            assert (a is None and b is None) or torch.equal(a, b)
        assert (other.shape, other.dtype, other.quant_type, other.blocksize) == ((33, 70), torch.float32, "nf4", 128)
        assert torch.equal(pk.nf4_dequantize(other), pk.nf4_dequantize(q))
    deep = copy.deepcopy(q)
    assert deep.packed.data_ptr() != q.packed.data_ptr()
    blocks = 19
    assert q.nbytes == 33 * 35 + (blocks + 4 + 256 * 4 + 4 if double_quant else 4 * blocks)


@pytest.mark.parametrize("dtype", IN_DTYPES, ids=str)
@pytest.mark.parametrize("numel", [0, 1, 33, 4097])
def test_opcheck(device, numel, dtype):
    """Schema, fake kernel and functionalisation agree with what the kernels do."""
    for quant_type in TYPES:
        torch.library.opcheck(op.nf4_quantize, (weights(numel, dtype, device), quant_type, 64))
        for double_quant in (False, True):
            tensors = quantized(numel, 64, double_quant, device)
            torch.library.opcheck(op.nf4_dequantize, (*tensors, quant_type, 64, numel, dtype))
    if numel:
        torch.library.opcheck(op.nf4_quantize_scales, (checks.scales_like(numel, device), CODE.to(device)))


def test_compiled_whole(device):
    q = pk.nf4_quantize(torch.randn(40, 64, device=device), double_quant=True)

    def scaled(*tensors):
        return op.nf4_dequantize(*tensors, "nf4", 64, 2560, torch.bfloat16) * 2

    compiled = torch.compile(scaled, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*q.tensors()), scaled(*q.tensors()))


def test_settings_are_checked(device):
    weight = torch.zeros(4, device=device)
    for arguments, message in (
        ((weight, "int4", 64), "nf4_quantize: quant_type is 'int4'; expected 'nf4' or 'fp4'"),
        ((weight, "nf4", 48), r"nf4_quantize: blocksize is 48; expected one of \(32, 64, 128"),
        ((weight, "nf4", 16), "blocksize is 16"),
        ((weight, "nf4", 8192), "blocksize is 8192"),
        ((weight, "nf4", -64), "blocksize is -64"),
        ((weight.double(), "nf4", 64), "weight is torch.float64; expected float16, bfloat16 or float32"),
        ((weight.int(), "nf4", 64), "weight is torch.int32; expected float16"),
    ):
        for run in (REFERENCE.quantize, OP.quantize, pk.nf4_quantize):
            with pytest.raises(ValueError, match=message):
                run(*arguments)
    with pytest.raises(ValueError, match="nf4_quantize: weight is 3; expected a tensor"):
        pk.nf4_quantize(3)
    with pytest.raises(ValueError, match="nf4_dequantize: weight is Tensor; expected an NF4Weight"):
        pk.nf4_dequantize(weight)


def _faults(tensors: tuple, nested: bool) -> list[tuple[tuple, str]]:
    """Each a way in which the tensors of 130 elements at a blocksize of 64 do not fit."""
    packed, absmax, nested_absmax, code, offset = tensors
    own = torch.uint8 if nested else torch.float32

    def changed(**other):
        names = ("packed", "absmax", "nested_absmax", "nested_code", "nested_offset")
        return tuple(other.get(name, one) for name, one in zip(names, tensors, strict=True))

    found = [
        (changed(packed=packed[:-1]), r"packed is torch.uint8 \[64\].*expected torch.uint8 \[65\]"),
        (changed(packed=packed.repeat(2)[::2]), r"packed is torch.uint8 \[65\] with strides \(?\[?2"),
        (changed(packed=packed.view(-1, 1)), r"packed is torch.uint8 \[65, 1\]"),
        (changed(packed=packed.int()), "packed is torch.int32"),
        (changed(absmax=absmax[:-1]), rf"absmax is {own} \[2\].*expected {own} \[3\], dense"),
        (changed(absmax=absmax.double()), "absmax is torch.float64"),
    ]
    if not nested:
        return [*found, (changed(nested_code=CODE.to(packed.device)), "nested_absmax is None; expected all of nested")]
    return [
        *found,
        (changed(nested_absmax=nested_absmax.repeat(2)), r"nested_absmax is torch.float32 \[2\].*\[1\]"),
        (changed(nested_code=code[:-1]), r"nested_code is torch.float32 \[255\].*\[256\]"),
        (changed(nested_code=code.double()), "nested_code is torch.float64"),
        (changed(nested_offset=offset[0]), r"nested_offset is torch.float32 \[\].*expected torch.float32 \[1\]"),
        (changed(nested_code=None), "nested_code is None; expected"),
        (changed(nested_offset=None), "nested_offset is None; expected"),
    ]


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_tensors_that_do_not_fit_are_refused(device, nested):
    tensors = quantized(130, 64, nested, device)
    for faulty, message in _faults(tensors, nested):
        for run in (REFERENCE.dequantize, OP.dequantize):
            with pytest.raises(ValueError, match=f"nf4_dequantize: {message}"):
                run(*faulty, "nf4", 64, 130, torch.float32)
        with pytest.raises(ValueError, match=f"NF4Weight: {message}"):
            NF4Weight(*faulty, (10, 13), torch.float32)
    for run in (REFERENCE.dequantize, OP.dequantize):
        with pytest.raises(ValueError, match="dtype is torch.int8; expected float16, bfloat16, float32 or float64"):
            run(*tensors, "nf4", 64, 130, torch.int8)
        with pytest.raises(ValueError, match="packed is torch.uint8 .65"):
            run(*tensors, "nf4", 64, 132, torch.float32)


def test_scales_that_do_not_fit_are_refused(device):
    absmax, code = torch.ones(3, device=device), CODE.to(device)
    for arguments, message in (
        ((absmax.double(), code), r"absmax is torch.float64 \[3\]"),
        ((absmax.view(3, 1), code), r"absmax is torch.float32 \[3, 1\]"),
        ((absmax.repeat(2)[::2], code), r"absmax is torch.float32 \[3\] with strides"),
        ((absmax, code[1:]), r"nested_code is torch.float32 \[255\].*expected torch.float32 \[256\]"),
    ):
        for run in (REFERENCE.quantize_scales, OP.quantize_scales):
            with pytest.raises(ValueError, match=f"nf4_quantize_scales: {message}"):
                run(*arguments)
