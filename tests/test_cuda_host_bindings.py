"""The bindings of the CUDA kernels, run on a CPU over them: they compile, fit their schemas and give what is right.

tests/test_cuda_host_nf4_bindings.py has those of the 4-bit formats.
"""

from pathlib import Path

import act_checks
import bias_grad_checks
import norm_cases
import norm_checks
import pytest
import torch
from cuda_host import act, bias_grad, norm
from cuda_host.bindings import Ops
from cuda_host.build import CXX
from norm_cases import Run

from peft_kernels.kernels.bias_grad import activations
from peft_kernels.kernels.bias_grad import op as bias_op
from peft_kernels.kernels.bias_grad import reference as bias_reference
from peft_kernels.kernels.lora_linear import op as lora_op
from peft_kernels.kernels.lora_linear import reference as lora_reference
from peft_kernels.kernels.norm import op as norm_op
from peft_kernels.kernels.norm import reference as norm_reference

pytestmark = [pytest.mark.skipif(CXX is None, reason="needs a C++ compiler"), pytest.mark.usefixtures("poisoned")]
TESTED = {"bias_grad", "lora_linear", "nf4", "nf4_linear", "norm"}
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="session")
def cache(pytestconfig):
    return pytestconfig.cache.mkdir("cuda_host")


@pytest.fixture(scope="session")
def norms(cache):
    ops = {norm_op.norm_fwd: norm_reference.norm_fwd, norm_op.norm_bwd: norm_reference.norm_bwd}
    return Ops(cache, "norm", [norm.FORWARD, norm.BACKWARD], ops)


@pytest.fixture(scope="session")
def biases(cache):
    ops = {bias_op.bias_grad: bias_reference.bias_grad}
    ops |= {getattr(bias_op, name): getattr(activations, name) for name in ("relu_fwd", "act_bwd")}
    return Ops(cache, "bias_grad", [bias_grad.SOURCE, act.SOURCE], ops)


@pytest.fixture(scope="session")
def loras(cache):
    """Its kernels are Hopper's, which nothing runs here: every call goes to the general ops."""
    names = "lora_linear_fwd", "lora_linear_bwd"
    return Ops(cache, "lora_linear", [], {getattr(lora_op, name): getattr(lora_reference, name) for name in names})


def test_every_binding_is_run():
    root = Path(__file__).resolve().parent.parent / "csrc"
    assert {path.parent.name for path in root.glob("*/bind_cuda.cpp")} == TESTED


@pytest.mark.parametrize("dtype", [*KERNEL_DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("check", [norm_checks.check_kinds, norm_checks.check_layouts], ids=lambda one: one.__name__)
def test_norm(norms, check, dtype):
    run = Run(norms.norm_fwd, norms.norm_bwd)
    check(run, dtype, "cpu")
    norms.general.clear()
    norm_cases.check(run, norm_cases.data(5, 64, dtype, "cpu", norm_cases.FULL[0]))
    assert bool(norms.general) == (dtype == torch.float64)


@pytest.mark.parametrize("dtype", [*KERNEL_DTYPES, torch.float64], ids=str)
def test_bias_grad(biases, dtype):
    biases.general.clear()
    bias_grad_checks.check_layouts(biases.bias_grad, dtype, "cpu")
    run = act_checks.Run(biases.relu_fwd, biases.act_bwd)
    for activation in ("relu", "silu"):
        act_checks.check_layouts(run, activation, dtype, "cpu")
    assert bool(biases.general) == (dtype == torch.float64)


def test_lora_linear(loras):
    x, weight, lora_a, lora_b, bias = (torch.randn(size) for size in ((3, 8), (5, 8), (2, 8), (5, 2), (5,)))
    args = x, weight, lora_a, lora_b, bias, None, 0.5, 0
    y, s, mask = loras.lora_linear_fwd(*args)
    assert all(map(torch.equal, (y, s, mask), lora_reference.lora_linear_fwd(*args)))
    args = y, x, weight, lora_a, lora_b, s, mask, 0.5, True, True, True, True
    assert all(map(torch.equal, loras.lora_linear_bwd(*args), lora_reference.lora_linear_bwd(*args)))
    assert loras.general == ["lora_linear_fwd", "lora_linear_bwd"]


def test_wrong_calls(norms, biases):
    """Named, not run into the kernel."""
    x, row = torch.randn(3, 8), torch.randn(8)
    with pytest.raises(ValueError, match="x has shape"):
        norms.norm_fwd(row, None, None, None, 1e-5, True, torch.float32)
    with pytest.raises(ValueError, match="weight has shape"):
        norms.norm_fwd(x, None, row[:7], None, 1e-5, True, torch.float32)
    with pytest.raises(ValueError, match="residual is"):
        norms.norm_fwd(x, x.bfloat16(), row, None, 1e-5, True, torch.float32)
    with pytest.raises(ValueError, match="rstd is None"):
        norms.norm_bwd(x, None, x, None, None, row, True, True, True, True, torch.float32, torch.float32)
    for call in (lambda: biases.bias_grad(row, torch.float32), lambda: biases.relu_fwd(row)):
        with pytest.raises(ValueError, match="expected two dimensions"):
            call()
