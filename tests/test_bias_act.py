"""relu_fwd and act_bwd against fp64 truth, for every implementation: sizes, strides, every bf16 number, inf and NaN."""

import act_checks as checks
import bounds
import bounds_act
import pytest
import torch
import torch.nn.functional as F
from act_checks import ACTIVATIONS, DTYPES, SMOOTH, mask_of, pair, run_of, wide

from peft_kernels._core.registry import OWNERS
from peft_kernels.kernels.bias_grad import activations, op

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("check", checks.CHECKS, ids=lambda check: check.__name__)
def test_values(impl, check, activation, dtype):
    check(run_of(impl.name), activation, dtype, impl.device)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", checks.LARGE, ids=str)
def test_large(impl, shape, activation, dtype):
    checks.check(run_of(impl.name), *pair(*shape, dtype, impl.device), activation)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("check", [checks.check_same_sign, checks.check_far], ids=lambda check: check.__name__)
def test_long_and_far(impl, check, activation, dtype):
    check(run_of(impl.name), activation, dtype, impl.device)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_same_bits_for_any_number_of_threads(impl, activation, dtype):
    if OWNERS["act_bwd", "CPU"] == "reference" or impl.name == "reference":
        pytest.skip("a promise of the C++ kernel; Torch's sum makes none")
    before, run = torch.get_num_threads(), run_of(impl.name)
    found = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results = []
            for N, layout in ((3, "contiguous"), (300, "contiguous"), (300, "transposed"), (300, "columns")):
                dy, z = pair(2053, N, dtype, impl.device, layout)
                results += run.act_bwd(dy, mask_of(z) if activation == "relu" else z, activation, True, True, dtype)
                results += run.relu_fwd(z)
            found.append(results)
    finally:
        torch.set_num_threads(before)
    for one in found[1:]:
        assert all(torch.equal(*two) for two in zip(found[0], one, strict=True))


def _torchs(activation: str):
    return {"gelu": F.gelu, "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"), "silu": F.silu}[activation]


@pytest.mark.parametrize("activation", SMOOTH)
def test_truth_is_the_derivative_of_torchs_forward(activation):
    """By Torch's own fp64 backward, and by differences of its forward: two sources beside the formula's."""
    z = torch.linspace(-12, 12, 4801, dtype=torch.float64, requires_grad=True)
    truth = bounds_act.derivative(z, activation, torch.float64).value
    (theirs,) = torch.autograd.grad(_torchs(activation)(z).sum(), z)
    # Torch subtracts tanh**2 from 1, which errs by a few units of 1 times what follows: at most z v' (2 z**3 here).
    few = 8 * bounds.unit_roundoff(torch.float64)
    assert ((truth - theirs).abs() <= few * (1 + 2 * z.abs() + 2 * z.abs() ** 3)).all()
    step = 2.0**-17
    with torch.no_grad():
        slope = (_torchs(activation)(z + step) - _torchs(activation)(z - step)) / (2 * step)
    torch.testing.assert_close(truth, slope, rtol=0, atol=1e-9)  # step**2 / 6 of the third derivative, fp64 / step


@pytest.mark.parametrize("activation", SMOOTH)
def test_the_bound_is_a_few_roundings(activation):
    """Half an ulp of a 16-bit dz and little more; in fp32 tens of units of the two terms, which cancel below 0."""
    z = torch.linspace(-4, 4, 801, dtype=torch.float64).unsqueeze(1)
    dy = torch.ones_like(z)
    value, error = bounds_act.act_bwd(dy.bfloat16(), z.bfloat16(), activation, torch.float32)["dz"]
    assert (error <= 1.01 * bounds.unit_roundoff(torch.bfloat16) * value.abs() + 2.0**-16).all()
    value, error = bounds_act.act_bwd(dy.float(), z.float(), activation, torch.float32)["dz"]
    assert (error <= 200 * bounds.unit_roundoff(torch.float32)).all()
    tail = bounds_act.derivative(torch.tensor([-9.0]), activation, torch.float32)
    assert tail.error / tail.value.abs() < 1e-4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_opcheck(device, activation, dtype):
    """Schema, fake kernel and functionalisation agree with what the kernels do."""
    for shape, layout in (((37, 53), "contiguous"), ((9, 16), "transposed"), ((0, 5), "contiguous")):
        dy, z = pair(*shape, dtype, device, layout)
        kept = mask_of(z) if activation == "relu" else z
        for needs in ((True, True), (True, False), (False, True)):
            torch.library.opcheck(op.act_bwd, (dy, kept, activation, *needs, wide(dtype)))
        if activation == "relu":
            torch.library.opcheck(op.relu_fwd, (z,))


def _refused() -> dict[str, tuple[tuple, str]]:
    """What is wrong -> (act_bwd's dy, kept, activation, dtype; what the message must say)."""
    dy, z, mask = torch.zeros(4, 9), torch.zeros(4, 9), torch.zeros(4, 2, dtype=torch.uint8)
    wide, half = torch.float32, torch.float16
    names = "expected one of relu, gelu, gelu_tanh, silu"
    return {
        "unknown": ((dy, z, "swish", wide), f"activation is '?swish'?; {names}"),
        "dy of one dimension": ((dy[0], z, "gelu", wide), r"dy has shape \[9\]; expected two dimensions"),
        "z of one dimension": ((dy, z[0], "gelu", wide), r"kept has shape \[9\]; expected \[4, 9\], z of dy \[4, 9\]"),
        "z too narrow": ((dy, z[:, 1:], "silu", wide), r"kept has shape \[4, 8\]; expected \[4, 9\]"),
        "z too short": ((dy, z[1:], "silu", wide), r"kept has shape \[3, 9\]; expected \[4, 9\]"),
        "z for a mask": ((dy, z, "relu", wide), r"kept has shape \[4, 9\]; expected \[4, 2\], the mask of dy"),
        "mask for z": ((dy[:, :2], mask, "gelu", wide), "kept is (torch.uint8|Byte); expected (torch.float32|Float)"),
        "mask of floats": ((dy, z[:, :2], "relu", wide), "kept is (torch.float32|Float); expected (torch.uint8|Byte)"),
        "z of another dtype": ((dy, z.half(), "gelu", wide), "kept is (torch.float16|Half); expected"),
        "dtype": ((dy, z, "gelu", half), "dtype is (torch.float16|Half); expected (torch.float32|Float)"),
    }


@pytest.mark.parametrize("wrong", _refused())
def test_bad_arguments_are_refused(device, wrong):
    (dy, kept, activation, dtype), message = _refused()[wrong]
    for run in (activations.act_bwd, op.act_bwd):
        with pytest.raises((ValueError, RuntimeError), match=f"act_bwd: {message}"):
            run(dy.to(device), kept.to(device), activation, True, True, dtype)


@pytest.mark.parametrize("z", [torch.zeros(4), torch.zeros(2, 3, 4), torch.zeros(3, 4, dtype=torch.int32)], ids=str)
def test_relu_refuses(device, z):
    for run in (activations.relu_fwd, op.relu_fwd):
        with pytest.raises((ValueError, RuntimeError), match="relu_fwd: z (has shape|is)"):
            run(z.to(device))
