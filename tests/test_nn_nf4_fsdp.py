"""Two processes on the CPU: FSDP2 shards the tensors of a 4-bit weight, and the gradients are those of one process."""

import pytest
import torch
import torch.distributed as dist
from nf4_states import assert_same_states
from test_distributed import WORLD, _on_two_ranks

import peft_kernels as pk

M, K, N, R = 6, 48, 33, 4

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this Torch is built without torch.distributed")


def make(device=None) -> torch.nn.Module:
    """A 4-bit layer and an adapted one."""
    second = pk.NF4Linear(N, K, double_quant=True, device=device)
    adapted = pk.FusedLoRALinear.from_linear(second, r=R, init_lora_weights=False)
    return torch.nn.Sequential(pk.NF4Linear(K, N, double_quant=True, device=device), adapted.to(device))


def shard(model: torch.nn.Module) -> torch.nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def whole(state: dict) -> dict[str, torch.Tensor]:
    return {key: t.full_tensor() if hasattr(t, "full_tensor") else t for key, t in state.items()}


def _trains(rank: int) -> None:
    torch.manual_seed(0)
    model = make()
    x, dy = torch.randn(M, K), torch.randn(M, K)
    (model(x) * dy).sum().backward()
    expected = {name: p.grad / WORLD for name, p in model.named_parameters() if p.grad is not None}
    assert {"1.lora_A.default", "1.lora_B.default"} <= expected.keys()
    bytes_before = sum(p.nbytes for p in model.parameters())
    shard(model)
    # Every tensor of the 4-bit weights is cut, so that a rank holds half: but for those of one element.
    assert sum(p.to_local().nbytes for p in model.parameters()) <= bytes_before / WORLD + 200
    mine = slice(rank * M // WORLD, (rank + 1) * M // WORLD)
    for _ in range(2):
        model.zero_grad()
        (model(x[mine]) * dy[mine]).sum().backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == (name in expected), name
            if parameter.grad is not None:
                torch.testing.assert_close(parameter.grad.full_tensor(), expected[name])


def _saves_and_loads(rank: int) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    torch.manual_seed(0)
    model = make()
    x = torch.randn(M, K)
    state, y = {key: t.clone() for key, t in model.state_dict().items()}, model(x).detach()
    sharded = shard(model).state_dict()
    assert_same_states(whole(sharded), state)
    gathered = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    assert_same_states(gathered, state)
    for assign in (False, True):
        other = shard(make())  # of another seed
        assert not torch.equal(other(x), y)
        other.load_state_dict(sharded, assign=assign)
        assert_same_states(whole(other.state_dict()), state)
        assert torch.equal(other(x), y)
    empty = shard(make("meta")).to_empty(device="cpu")
    empty.load_state_dict(sharded)
    assert torch.equal(empty(x), y)


@pytest.mark.parametrize("check", [_trains, _saves_and_loads], ids=lambda check: check.__name__[1:])
def test_two_ranks(check, tmp_path):
    _on_two_ranks(check, tmp_path)
