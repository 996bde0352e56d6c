"""The activation pass on DTensors over two processes on the CPU: the gradients of one process, no needless talk."""

import os
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import peft_kernels as pk
from peft_kernels.kernels.bias_grad import op
from peft_kernels.kernels.bias_grad.activations import ACTIVATIONS

WORLD = 2
M, N, K = 12, 10, 16

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this Torch is built without torch.distributed")


def _start(rank: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    torch.set_num_threads(1)
    for activation in ACTIVATIONS:
        _ops_on_parts(activation)
        _linear_on_parts(activation)
    dist.barrier()
    os._exit(0)  # destroy_process_group sometimes aborts with torch 2.13: see test_distributed.py


def _mesh():
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (WORLD,))


def _ops_on_parts(activation: str) -> None:
    from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode

    mesh, whole = _mesh(), Replicate()
    dy, z = torch.randn(2, M, N, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kept = op.relu_fwd(z)[1] if activation == "relu" else z
    alone = op.act_bwd(dy, kept, activation, True, True, torch.float64)
    layouts = {Shard(0): Partial(), Shard(1): Shard(0), whole: whole}
    if activation == "relu":
        del layouts[Shard(1)]  # a byte of the mask is eight columns
        placed = distribute_tensor(z, mesh, [Shard(0)])
        with CommDebugMode() as communication:
            y, mask = op.relu_fwd(placed)
        assert communication.get_total_counts() == 0 and y.placements == mask.placements == (Shard(0),)
        assert torch.equal(mask.full_tensor(), kept) and torch.equal(y.full_tensor(), z.relu())
    for rows, sums in layouts.items():
        parts = distribute_tensor(dy, mesh, [rows]), distribute_tensor(kept, mesh, [rows])
        for needs in ((True, True), (True, False), (False, True)):
            with CommDebugMode() as communication:
                found = op.act_bwd(*parts, activation, *needs, torch.float64)
            assert communication.get_total_counts() == 0, f"{activation}, {rows}: communication"
            expected = zip(found, alone, (rows, sums), needs, strict=True)
            for one, other, placement, needed in expected:
                assert one.placements == ((placement if needed else whole),), f"{activation}, {rows}: {one.placements}"
                torch.testing.assert_close(one.full_tensor(), other if needed else other.new_empty(0))


def _gradients(args: dict, activation: str) -> dict[str, torch.Tensor]:
    args = {name: t.detach().requires_grad_(name in ("x", "bias")) for name, t in args.items()}
    y = pk.bias_linear(args["x"], args["weight"], args["bias"], activation)
    y.backward(args["dy"])
    return {"y": y.detach(), "x": args["x"].grad, "bias": args["bias"].grad}


def _linear_on_parts(activation: str) -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    rows, columns, whole = Shard(0), Shard(1), Replicate()
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tensors = {"x": draw(M, K), "weight": draw(N, K), "bias": draw(N), "dy": draw(M, N)}
    everything = dict.fromkeys(tensors, whole)
    layouts = {
        "replicated": everything,
        "column": {**everything, "weight": rows, "bias": rows, "dy": columns},
        "data": {**everything, "x": rows, "dy": rows},
    }
    alone, mesh = _gradients(tensors, activation), _mesh()
    for kind, layout in layouts.items():
        placed = {name: distribute_tensor(t, mesh, [layout[name]]) for name, t in tensors.items()}
        for name, result in _gradients(placed, activation).items():
            msg = f"{activation}, {kind} parallel, {name}: {{}}".format
            torch.testing.assert_close(result.full_tensor(), alone[name], msg=msg)


def test_two_processes_give_what_one_gives(tmp_path):
    mp.spawn(_start, args=(str(tmp_path / "store"),), nprocs=WORLD)
