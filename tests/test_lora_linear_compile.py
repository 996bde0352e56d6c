"""The LoRA linear under torch.compile, torch.func and torch.library's own checks."""

from functools import partial

import pytest
import torch
from cases import DTYPES, Case, inputs
from public_call import assert_same, call, gradients, leaves, run
from torch._dynamo.testing import CompileCounterWithBackend

import peft_kernels as pk
from peft_kernels.kernels.lora_linear import op

CASE = Case(37, 53, 72, 12, torch.float32)
BOTH = [pytest.param(0.0, id="plain"), pytest.param(0.5, id="dropout")]


@pytest.mark.parametrize("p", BOTH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_without_graph_breaks(device, dtype, p):
    """The eager kernels run in both: the same output and gradients, the same mask."""
    case = Case(37, 53, 72, 12, dtype, dropout=p, adapters=torch.float32)
    y, grads = run(case, device)
    compiled = torch.compile(pk.lora_linear, backend="aot_eager", fullgraph=True)
    again, compiled_grads = run(case, device, function=compiled)
    assert torch.equal(y, again)
    assert_same(grads, compiled_grads, "when compiled")


def test_inductor_inside_a_larger_graph(device):
    """Between other ops, which inductor fuses; its own random numbers are switched off to draw eager's seed."""

    def block(x, weight, lora_a, lora_b, scaling, bias, dropout_p):
        return pk.lora_linear(x * 2, weight, lora_a, lora_b, scaling, bias, dropout_p).relu()

    case = Case(37, 53, 72, 12, torch.float32, dropout=0.5)
    y, grads = run(case, device, function=block)
    with torch._inductor.config.patch(fallback_random=True):
        again, compiled_grads = run(case, device, function=torch.compile(block, fullgraph=True))
    assert torch.equal(y, again)
    assert_same(grads, compiled_grads, "under inductor")


def test_new_batch_sizes_do_not_recompile_each_time(device):
    """One graph for the first size, one for all others."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(pk.lora_linear, backend=counter, fullgraph=True)
    for M in (4, 6, 9, 16, 33, 100):
        case = Case(M, 53, 72, 12, torch.float32, dropout=0.1)
        y, grads = run(case, device)
        again, compiled_grads = run(case, device, function=compiled)
        assert torch.equal(y, again)
        assert_same(grads, compiled_grads, f"at M = {M}")
    assert counter.frame_count <= 2


@pytest.mark.parametrize("p", BOTH)
@pytest.mark.parametrize(
    "case",
    [CASE, Case(5, 7, 13, 3, torch.bfloat16, adapters=torch.float32), Case(9, 64, 128, 16, torch.bfloat16)],
    ids=str,
)
@pytest.mark.parametrize("weight", [True, False], ids=["weight", "no-weight"])
def test_opcheck(device, case, p, weight):
    """Schema, fake kernel, and functionalisation agree with what the kernels do."""
    data = inputs(Case(**{**vars(case), "dropout": p}), device)
    base = data.weight if weight else None
    args = data.x, base, data.lora_a, data.lora_b, data.bias, data.seed, data.scaling, data.threshold
    torch.library.opcheck(op.lora_linear_fwd, args)
    _, s, mask = op.lora_linear_fwd(*args)
    for needed in ((True, True, True, True), (False, True, False, True), (True, False, True, False)):
        x, kept_s = data.x if needed[1] else None, s if needed[2] else None
        back = (data.dy, x, base, data.lora_a, data.lora_b, kept_s, mask, data.scaling, *needed)
        torch.library.opcheck(op.lora_linear_bwd, back)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_meta_tensors_give_shapes_and_dtypes(dtype):
    case = Case(37, 53, 71, 12, dtype, dropout=0.5, adapters=torch.float32, bias=torch.float32)
    real = leaves(inputs(case))
    meta = {name: tensor.detach().to("meta").requires_grad_() for name, tensor in real.items()}
    outs = []
    for args in (real, meta):
        y = call(args, case)
        y.backward(torch.ones_like(y))
        outs.append([(t.shape, t.dtype) for t in (y, *gradients(args).values())])
    assert outs[0] == outs[1]


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap], ids=["grad", "vmap"])
def test_function_transforms_say_that_they_are_not_supported(device, transform):
    data = inputs(CASE, device)
    args = leaves(data, ("lora_a",))
    function = partial(pk.lora_linear, weight=args["weight"], lora_a=args["lora_a"], lora_b=args["lora_b"], scaling=2.0)
    with pytest.raises(RuntimeError, match="setup_context|functorch"):
        transform(lambda x: function(x).sum())(data.x)
