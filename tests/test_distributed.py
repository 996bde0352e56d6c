"""Two processes on the CPU: FSDP2 and DTensor sharding give the gradients of one process."""

import os
import subprocess
import sys

import bounds
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import peft_kernels as pk

WORLD = 2
M, N, K, R = 12, 10, 16, 4
DTENSOR = "torch.distributed.tensor"  # imported by the processes only: it takes most of a second

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this Torch is built without torch.distributed")


def _start(rank: int, check, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    torch.set_num_threads(1)
    check(rank)
    dist.barrier()
    # Without destroy_process_group: in a third of runs with torch 2.13 it aborts ("terminate called without an active
    # exception"), after everything that is tested here is done.
    os._exit(0)


def _on_two_ranks(check, tmp_path) -> None:
    """Run check(rank) in two processes; an assertion that fails there fails here."""
    mp.spawn(_start, args=(check, str(tmp_path / "store")), nprocs=WORLD)


def _tensors(dtype=torch.float64) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (M, K), "weight": (N, K), "lora_a": (R, K), "lora_b": (N, R), "bias": (N,), "dy": (M, N)}
    return {name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in shapes.items()}


def _gradients(args: dict, p: float = 0.0) -> dict[str, torch.Tensor]:
    """Output and gradients of one process or of DTensors, by name."""
    args = {name: None if t is None else t.detach().requires_grad_(name != "dy") for name, t in args.items()}
    torch.manual_seed(7)
    y = pk.lora_linear(args["x"], args["weight"], args["lora_a"], args["lora_b"], 2.0, args["bias"], p)
    y.backward(args["dy"])
    grads = {name: t.grad for name, t in args.items() if t is not None and name != "dy"}
    return {"y": y.detach(), **grads}


def _tensor_parallel(rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode

    mesh = init_device_mesh("cpu", (WORLD,))
    whole, split, columns = Replicate(), Shard(0), Shard(1)
    everything = dict.fromkeys(("x", "weight", "lora_a", "lora_b", "bias", "dy"), whole)
    layouts = {
        "replicated": everything,
        "column": {**everything, "weight": split, "lora_b": split, "bias": split, "dy": columns},
        "data": {**everything, "x": split, "dy": split},
        "row": {**everything, "x": columns, "weight": columns, "lora_a": columns},
    }
    for kind, layout in layouts.items():
        for p in (0.0, 0.5):
            tensors = _tensors()
            if kind == "row":
                tensors["bias"] = None
            expected = _gradients(tensors, p)
            sharded = {
                name: None if t is None else distribute_tensor(t, mesh, [layout[name]]) for name, t in tensors.items()
            }
            with CommDebugMode() as communication:
                results = _gradients(sharded, p)
            # With dropout a split x is gathered first: the mask is that of the whole tensor.
            if p == 0.0 or kind in ("replicated", "column"):
                assert communication.get_total_counts() == 0, f"{kind}: {communication.get_comm_counts()}"
            for name, result in results.items():
                explain = f"{kind} parallel, dropout {p}, {name}: {{}}".format
                torch.testing.assert_close(result.full_tensor(), expected[name], msg=explain)


def _fsdp(rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    first, second = torch.nn.Linear(K, N, dtype=torch.float64), torch.nn.Linear(N, K, dtype=torch.float64)
    model = torch.nn.Sequential(pk.FusedLoRALinear.from_linear(first, r=R), pk.FusedLoRALinear.from_linear(second, r=R))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    x, dy = _tensors()["x"], torch.randn(M, K, dtype=torch.float64)
    (model(x) * dy).sum().backward()
    # fully_shard averages over ranks; the whole batch's loss here is a sum over both halves.
    expected = {name: t.grad / WORLD for name, t in model.named_parameters() if t.requires_grad}
    assert expected
    model.zero_grad()
    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    mine = slice(rank * M // WORLD, (rank + 1) * M // WORLD)
    for _ in range(2):
        model.zero_grad()
        (model(x[mine]) * dy[mine]).sum().backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == (name in expected), name
            if parameter.grad is not None:
                torch.testing.assert_close(parameter.grad.full_tensor(), expected[name])


def _fsdp_mixed_dtypes(rank: int) -> None:
    """A bf16 base and fp32 adapters in one FSDP group; the mean of two halves' bounds bounds the mean gradient."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    layer = pk.FusedLoRALinear.from_linear(torch.nn.Linear(K, N, dtype=torch.bfloat16), r=R, lora_alpha=2 * R)
    torch.nn.init.normal_(layer.lora_B["default"])
    parameters = layer.weight, layer.lora_A["default"], layer.lora_B["default"]
    weight, lora_a, lora_b = (tensor.detach().clone() for tensor in parameters)
    assert lora_a.dtype == torch.float32
    tensors = _tensors(torch.bfloat16)
    fully_shard(layer, mesh=init_device_mesh("cpu", (WORLD,)))
    halves = [(tensors["x"][half], tensors["dy"][half]) for half in (slice(0, M // 2), slice(M // 2, M))]
    x, dy = halves[rank]
    layer(x).backward(dy)
    per_half = [bounds.backward(dy, x, weight, lora_a, lora_b, None, None, 2.0) for x, dy in halves]
    for name, parameter in (("dlora_a", layer.lora_A["default"]), ("dlora_b", layer.lora_B["default"])):
        truth, bound = (sum(half[name][i] for half in per_half) / WORLD for i in (0, 1))
        # Adding two ranks' gradients and halving the sum: two more roundings in fp32.
        mean = bounds.Approx(truth, bound).rounded(torch.float32).rounded(torch.float32)
        bounds.assert_within(parameter.grad.full_tensor(), mean.value, mean.error, name)


@pytest.mark.parametrize("check", [_tensor_parallel, _fsdp, _fsdp_mixed_dtypes], ids=lambda check: check.__name__[1:])
def test_two_ranks(check, tmp_path):
    _on_two_ranks(check, tmp_path)


@pytest.mark.parametrize("probes", [0, 2])
@pytest.mark.parametrize("first", ["peft_kernels", DTENSOR])
def test_rules_are_registered_in_either_order(first, probes):
    """And importing the package alone does not import DTensor, nor does asking whether it is there lose the rules."""
    script = f"""
import sys, importlib, importlib.util
importlib.import_module({first!r})
if {first == "peft_kernels"}:
    assert {DTENSOR!r} not in sys.modules, "importing peft_kernels imported DTensor"
for _ in range({probes}):
    assert importlib.util.find_spec({DTENSOR!r}).origin.endswith("__init__.py")
module = importlib.import_module({DTENSOR!r})
assert type(module.__spec__.loader).__module__ == "_frozen_importlib_external"
assert not any("peft_kernels" in type(finder).__module__ for finder in sys.meta_path)
from torch.distributed.tensor import DTensor
from peft_kernels.kernels.lora_linear import op
known = DTensor._op_dispatcher.sharding_propagator.op_strategy_funcs
assert op.lora_linear_fwd in known and op.lora_linear_bwd in known
"""
    subprocess.run([sys.executable, "-c", script], check=True)
