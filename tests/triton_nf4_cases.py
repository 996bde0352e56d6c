"""The Triton quantisers' value tests: on a GPU, or on CPU tensors under Triton's interpreter (TRITON_INTERPRET=1).

test_nf4_triton.py runs them, in a process of their own where there is no GPU. Every value is the reference's, bit by
bit: there are no tolerances here.
"""

import pytest
import torch

from peft_kernels.formats import nf4_values
from peft_kernels.formats.nf4 import BLOCKSIZES, FP4_BOUNDS, NF4_BOUNDS, nested_code
from peft_kernels.kernels._shared import nf4 as shared
from peft_kernels.kernels.nf4 import reference, triton_impl

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    # The interpreter computes with NumPy, which warns of 1 / 0 and 0 * inf in blocks of zeros.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]


def same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Fail unless dtype, shape and bits are the same; a NaN is any NaN."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    actual, expected = actual.cpu(), expected.cpu()
    if actual.is_floating_point():
        assert torch.equal(actual.isnan(), expected.isnan())
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.itemsize]
        actual, expected = (t.nan_to_num(0.0, torch.inf, -torch.inf).view(bits) for t in (actual, expected))
    differ = (actual != expected).nonzero()
    assert not len(differ), f"{len(differ)} of {actual.numel()} differ, first at {differ[0].tolist()}"


def check_quantize(weight: torch.Tensor, quant_type: str, blocksize: int) -> None:
    packed, absmax = triton_impl.nf4_quantize(weight.to(DEVICE), quant_type, blocksize)
    expected = reference.nf4_quantize(weight, quant_type, blocksize)
    same_bits(packed, expected[0])
    same_bits(absmax, expected[1])


def stored(numel: int, quant_type: str, blocksize: int, nested: bool) -> tuple:
    """Codes and scales of random values, as NF4Weight.tensors(), on DEVICE."""
    packed, absmax = nf4_values.encode(torch.randn(numel), quant_type, blocksize)
    rest = None, None, None
    if nested:
        absmax, nested_absmax, offset = nf4_values.encode_scales(absmax, nested_code())
        rest = nested_absmax, nested_code(), offset
    return tuple(t if t is None else t.to(DEVICE) for t in (packed, absmax, *rest))


def on_cpu(tensors: tuple) -> tuple:
    return tuple(t if t is None else t.cpu() for t in tensors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_quantize(quant_type, blocksize, dtype):
    for numel in (1, 2, 63, blocksize, blocksize + 1, 2 * 4096 + 17):
        check_quantize(torch.randn(numel).to(dtype), quant_type, blocksize)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_quantize_on_and_beside_every_bound(quant_type):
    bounds = torch.tensor(NF4_BOUNDS if quant_type == "nf4" else FP4_BOUNDS)
    near = [torch.nextafter(bounds, torch.full_like(bounds, to)) for to in (-torch.inf, torch.inf)]
    values = torch.cat([bounds, *near, torch.tensor([0.0, -0.0, 1.0])])
    check_quantize(torch.cat([values, -values]), quant_type, 4096)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_quantize_what_is_not_finite_or_has_no_reciprocal(quant_type):
    weight = torch.randn(8, 32)
    weight[1] = 0.0
    weight[2] = -0.0
    weight[3, 5] = torch.nan
    weight[4, 6] = -torch.inf
    weight[5] *= 1e-41  # 1 / absmax is infinite
    weight[5, 7] = 0.0
    weight[6, :2] = torch.tensor([torch.inf, torch.nan])
    check_quantize(weight, quant_type, 32)


def test_quantize_any_strides():
    weight = torch.randn(40, 66)
    for view in (weight.t(), weight[::2, 3:], weight.view(4, 10, 66).permute(2, 0, 1), weight[:, :1].expand(-1, 5)):
        check_quantize(view, "nf4", 32)
    check_quantize(torch.randn(0, 8), "nf4", 64)


def check_scales(absmax: torch.Tensor) -> None:
    args = absmax.to(DEVICE), nested_code(DEVICE)
    expected = reference.nf4_quantize_scales(*args)  # on the same device: the mean's last bit is the device's
    for actual, one in zip(triton_impl.nf4_quantize_scales(*args), expected, strict=True):
        same_bits(actual, one)


@pytest.mark.parametrize("count", [1, 255, 256, 257, 3000])
def test_quantize_scales(count):
    for absmax in (torch.rand(count), torch.full((count,), 0.3), torch.randn(count).exp()):
        check_scales(absmax)


def test_quantize_scales_on_and_beside_every_midpoint(monkeypatch):
    """Without an offset, and with a 1 in every block, scales are what is looked up."""
    monkeypatch.setattr(torch.Tensor, "mean", lambda absmax: absmax.new_zeros(()))
    code = nested_code()
    middle = (code[1:] + code[:-1]) * 0.5
    near = [torch.nextafter(middle, torch.full_like(middle, to)) for to in (-torch.inf, torch.inf)]
    values = torch.cat([middle, *near, code])
    rows = torch.nn.functional.pad(values, (0, -len(values) % 255)).view(-1, 255)
    check_scales(torch.cat([rows, torch.ones(len(rows), 1)], 1).flatten())


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_dequantize(quant_type, nested, blocksize, dtype):
    for numel in (0, 1, 7, 8, 4096, 8192 + 4097):
        if numel == 0 and nested:  # no scales have no mean
            continue
        tensors = stored(numel, quant_type, blocksize, nested)
        actual = triton_impl.nf4_dequantize(*tensors, quant_type, blocksize, numel, dtype)
        expected = reference.nf4_dequantize(*on_cpu(tensors), quant_type, blocksize, numel, dtype)
        same_bits(actual, expected)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_every_byte(quant_type):
    """All codes in both halves, -0 of FP4 too, beside scales that overflow, underflow and are not finite."""
    packed = torch.arange(256, dtype=torch.uint8).repeat(8)
    absmax = torch.tensor([1.0, -0.0, 0.0, 65_520.0, 1e-7, 1e-44, torch.inf, torch.nan])
    tensors = packed, absmax, None, None, None
    for dtype in DTYPES:
        actual = triton_impl.nf4_dequantize(
            *(t if t is None else t.to(DEVICE) for t in tensors), quant_type, 512, 4096, dtype
        )
        same_bits(actual, reference.nf4_dequantize(*tensors, quant_type, 512, 4096, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
@pytest.mark.parametrize(
    "N, K, rows, cols", [(70, 80, (0, 70), (16, 72)), (7, 200, (0, 7), (0, 128)), (64, 24, (0, 64), (8, 24))], ids=str
)
def test_columns_of_a_weight(N, K, rows, cols, nested, dtype):
    """What the linear layer's dx reads: all rows, some columns, in blocks that cross rows."""
    tensors = stored(N * K, "nf4", 64, nested)
    whole = reference.nf4_dequantize(*on_cpu(tensors), "nf4", 64, N * K, dtype).view(N, K)
    out = torch.empty(N, cols[1] - cols[0], dtype=dtype, device=DEVICE)
    shared.dequantize(tensors, "nf4", 64, out, cols[0], K)
    same_bits(out, whole[rows[0] : rows[1], cols[0] : cols[1]])


@pytest.mark.parametrize("K", [64, 33, 17])
def test_rows_of_a_weight(K):
    """What the linear layer's forward reads: some rows from a multiple of 64 on, of any length."""
    tensors = stored(150 * K, "nf4", 64, True)
    whole = reference.nf4_dequantize(*on_cpu(tensors), "nf4", 64, 150 * K, torch.bfloat16).view(150, K)
    out = torch.empty(1, 86 * K, dtype=torch.bfloat16, device=DEVICE)
    same_bits(shared.dequantize(tensors, "nf4", 64, out, 64 * K).view(86, K), whole[64:])


@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
def test_the_declared_workspace_is_what_is_allocated(transposed, monkeypatch):
    weight = torch.randn(40, 66, device=DEVICE)
    weight = weight.t() if transposed else weight
    copied, original = [], torch.Tensor.contiguous

    def counting(tensor):
        out = original(tensor)
        copied.append(0 if out is tensor else out.nbytes)
        return out

    monkeypatch.setattr(torch.Tensor, "contiguous", counting)
    triton_impl.nf4_quantize(weight, "nf4", 64)
    assert sum(copied) == triton_impl.nf4_quantize_workspace(weight, "nf4", 64) == transposed * weight.nbytes
