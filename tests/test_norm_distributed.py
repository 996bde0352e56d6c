"""layer_norm and rms_norm on DTensors over two processes on the CPU: one process's gradients, no needless messages."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from norm_public import FUNCTIONS

from peft_kernels.kernels.norm import op

WORLD = 2
M, K = 12, 10
LEAVES = ("x", "residual", "weight", "bias")

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this Torch is built without torch.distributed")


def _start(rank: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    torch.set_num_threads(1)
    for name in FUNCTIONS:
        _sharded(name)
    dist.barrier()
    os._exit(0)  # destroy_process_group sometimes aborts with torch 2.13: see test_distributed.py


def _gradients(name: str, args: dict) -> dict[str, torch.Tensor]:
    args = {leaf: t.detach().requires_grad_(leaf in LEAVES) for leaf, t in args.items()}
    y, total = FUNCTIONS[name](args["x"], args["weight"], args["bias"], 1e-5, args["residual"])
    torch.autograd.backward([y, total], [args["dy"], args["dtotal"]])
    return {"y": y.detach(), "total": total.detach(), **{leaf: args[leaf].grad for leaf in LEAVES}}


def _sharded(name: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode

    mesh, rms = init_device_mesh("cpu", (WORLD,)), name == "rms_norm"
    generator = torch.Generator().manual_seed(0)
    shapes = dict.fromkeys(("x", "residual", "dy", "dtotal"), (M, K)) | {"weight": (K,), "bias": (K,)}
    tensors = {one: torch.randn(shape, generator=generator, dtype=torch.float64) for one, shape in shapes.items()}
    rows, whole = Shard(0), Replicate()
    alone = _gradients(name, tensors)
    for placed, sums in ((rows, Partial()), (whole, whole)):
        given = {
            one: distribute_tensor(t, mesh, [whole if one in ("weight", "bias") else placed])
            for one, t in tensors.items()
        }
        with CommDebugMode() as communication:
            y, total, mean, rstd = op.norm_fwd(
                given["x"], given["residual"], given["weight"], given["bias"], 1e-5, rms, torch.float64
            )  # fmt: skip
            args = given["dy"], given["dtotal"], total, None if rms else mean, rstd, given["weight"], rms
            grads = op.norm_bwd(*args, True, True, True, torch.float64, torch.float64)
        assert communication.get_total_counts() == 0
        assert [t.placements for t in (y, total, rstd)] == [(placed,)] * 3
        assert [t.placements for t in grads] == [(placed,), (sums,), (sums,)]
        for one, result in _gradients(name, given).items():
            torch.testing.assert_close(result.full_tensor(), alone[one], msg=f"{name} {placed}, {one}: {{}}".format)


def test_two_processes_give_what_one_gives(tmp_path):
    mp.spawn(_start, args=(str(tmp_path / "store"),), nprocs=WORLD)
