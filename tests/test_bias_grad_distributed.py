"""bias_linear on DTensors over two processes on the CPU: the gradients of one process, no needless communication."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import peft_kernels as pk
from peft_kernels.kernels.bias_grad import op

WORLD = 2
M, N, K = 12, 10, 16

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this Torch is built without torch.distributed")


def _start(rank: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    torch.set_num_threads(1)
    _sharded(rank)
    dist.barrier()
    os._exit(0)  # destroy_process_group sometimes aborts with torch 2.13: see test_distributed.py


def _gradients(args: dict) -> dict[str, torch.Tensor]:
    args = {name: t.detach().requires_grad_(name in ("x", "bias")) for name, t in args.items()}
    y = pk.bias_linear(args["x"], args["weight"], args["bias"])
    y.backward(args["dy"])
    return {"y": y.detach(), "x": args["x"].grad, "bias": args["bias"].grad}


def _sharded(rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode

    mesh = init_device_mesh("cpu", (WORLD,))
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (M, K), "weight": (N, K), "bias": (N,), "dy": (M, N)}
    tensors = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    rows, columns, whole = Shard(0), Shard(1), Replicate()
    for placed, expected in ((rows, Partial()), (columns, rows), (whole, whole)):
        dy = distribute_tensor(tensors["dy"], mesh, [placed])
        with CommDebugMode() as communication:
            dbias = op.bias_grad(dy, torch.float64)
        assert communication.get_total_counts() == 0 and dbias.placements == (expected,), (
            f"{placed}: {dbias.placements}"
        )
        torch.testing.assert_close(dbias.full_tensor(), tensors["dy"].sum(0))
    everything = dict.fromkeys(tensors, whole)
    layouts = {
        "replicated": everything,
        "column": {**everything, "weight": rows, "bias": rows, "dy": columns},
        "data": {**everything, "x": rows, "dy": rows},
    }
    alone = _gradients(tensors)
    for kind, layout in layouts.items():
        found = _gradients({name: distribute_tensor(t, mesh, [layout[name]]) for name, t in tensors.items()})
        for name, result in found.items():
            torch.testing.assert_close(result.full_tensor(), alone[name], msg=f"{kind} parallel, {name}: {{}}".format)


def test_two_processes_give_what_one_gives(tmp_path):
    mp.spawn(_start, args=(str(tmp_path / "store"),), nprocs=WORLD)
