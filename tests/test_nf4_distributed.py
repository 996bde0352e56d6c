"""4-bit linears over two processes on the CPU: rows of x apart, and FSDP2 sharding packed bytes and scales."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import peft_kernels as pk

WORLD = 2
M, N, K, R = 12, 10, 64, 4

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this Torch is built without torch.distributed")


def _start(rank: int, check, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    torch.set_num_threads(1)
    check(rank)
    dist.barrier()
    os._exit(0)  # destroy_process_group sometimes aborts with torch 2.13: see test_distributed.py


def _tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (M, K), "lora_a": (R, K), "lora_b": (N, R), "bias": (N,), "dy": (M, N)}
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


def _weight() -> pk.NF4Weight:
    return pk.nf4_quantize(torch.randn(N, K, generator=torch.Generator().manual_seed(1)), double_quant=True)


def _run(args: dict, weight: pk.NF4Weight, low_rank: bool) -> dict[str, torch.Tensor]:
    args = {name: t.detach().requires_grad_(name != "dy") for name, t in args.items()}
    if low_rank:
        y = pk.qlora_linear(args["x"], weight, args["lora_a"], args["lora_b"], 2.0, args["bias"])
    else:
        y = pk.nf4_linear(args["x"], weight, args["bias"])
    y.backward(args["dy"])
    return {"y": y.detach(), **{name: t.grad for name, t in args.items() if t.grad is not None}}


def _rows_apart(rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (WORLD,))
    tensors, weight = _tensors(), _weight()
    whole = [None if t is None else distribute_tensor(t, mesh, [Replicate()]) for t in weight.tensors()]
    shared = pk.NF4Weight(*whole, weight.shape, weight.dtype)
    for rows in (Replicate(), Shard(0)):
        placed = {"x": rows, "dy": rows}
        args = {name: distribute_tensor(t, mesh, [placed.get(name, Replicate())]) for name, t in tensors.items()}
        for low_rank in (False, True):
            alone, found = _run(tensors, weight, low_rank), _run(args, shared, low_rank)
            assert found["y"].placements == (rows,)
            assert alone.keys() == found.keys()
            for name, value in alone.items():
                torch.testing.assert_close(found[name].full_tensor(), value, msg=lambda text, n=name: f"{n}: {text}")


def _fsdp(rank: int) -> None:
    """Bytes and scales are sharded whatever their number is by two; gradients are those of one process."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    torch.manual_seed(0)
    first = pk.NF4Linear.from_linear(torch.nn.Linear(K, 7), double_quant=True)
    model = torch.nn.Sequential(torch.nn.Linear(K, K), first, torch.nn.Linear(7, N))
    model[0].bias.requires_grad_(False)
    x, dy = torch.randn(M, K), torch.randn(M, N)
    model(x).backward(dy)
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert expected.keys() == {"0.weight", "1.bias", "2.weight", "2.bias"}
    state = model.state_dict()
    model.zero_grad()
    for layer in model:
        fully_shard(layer, mesh=init_device_mesh("cpu", (WORLD,)))
    assert all(isinstance(p, DTensor) for p in model.parameters())
    assert sum(p.to_local().nbytes for p in first.parameters() if not p.requires_grad) < 0.6 * sum(
        p.nbytes for p in first.parameters() if not p.requires_grad
    )
    mine = slice(rank * M // WORLD, (rank + 1) * M // WORLD)
    for _ in range(2):
        model.zero_grad()
        model(x[mine]).backward(dy[mine])
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == (name in expected), name
            if parameter.grad is not None:
                torch.testing.assert_close(WORLD * parameter.grad.full_tensor(), expected[name])
    assert all(torch.equal(p.full_tensor(), q) for p, q in zip(first.parameters(), _parameters(state), strict=True))


def _parameters(state: dict) -> list[torch.Tensor]:
    """Of a layer made from the state of layer 1, in the order of its Parameters."""
    layer = pk.NF4Linear(K, 7, double_quant=True)
    layer.load_state_dict({name.removeprefix("1."): t for name, t in state.items() if name.startswith("1.")})
    return list(layer.parameters())


@pytest.mark.parametrize("check", [_rows_apart, _fsdp], ids=lambda check: check.__name__[1:])
def test_two_ranks(check, tmp_path):
    mp.spawn(_start, args=(check, str(tmp_path / "store")), nprocs=WORLD)
