"""Two processes on the CPU: FSDP2 shards the tensors of a 4-bit weight, and the gradients are those of one process."""

import os

import pytest
import torch
import torch.distributed as dist
from nf4_states import assert_same_states
from safetensors.torch import load_file
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
    """Gathered, and texts without the spaces behind them."""
    state = {key: t.full_tensor() if hasattr(t, "full_tensor") else t for key, t in state.items()}
    return {key: t[: t.tolist().index(ord("}")) + 1] if "quant_state" in key else t for key, t in state.items()}


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
    assert_same_states(whole(gathered), state)
    for assign in (False, True):
        other = shard(make())  # of another seed
        assert not torch.equal(other(x), y)
        other.load_state_dict(sharded, assign=assign)
        assert_same_states(whole(other.state_dict()), state)
        assert torch.equal(other(x), y)
    empty = shard(make("meta")).to_empty(device="cpu")
    empty.load_state_dict(sharded)
    assert torch.equal(empty(x), y)


def _sets_a_whole_state(rank: int) -> None:
    """set_model_state_dict cuts what has a Parameter's name, and adds the layer's Parameters to the dict."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    torch.manual_seed(0)
    model = make()
    x = torch.randn(M, K)
    state, y = {key: t.clone() for key, t in model.state_dict().items()}, model(x).detach()
    for device, strict in ((None, True), (None, False), ("meta", True)):
        other = shard(make(device))
        options = StateDictOptions(full_state_dict=True, strict=strict)
        assert not any(set_model_state_dict(other, dict(state), options=options))
        assert_same_states(whole(other.state_dict()), state)
        assert all(hasattr(parameter, "device_mesh") for parameter in other.parameters())
        assert torch.equal(other(x), y)
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: \"0.absmax\""):
        make().load_state_dict({**state, "0.absmax": torch.zeros(25)})
    for key in ("0.weight.absmax", "1.weight.nested_absmax"):
        with pytest.raises(RuntimeError, match=f"{key} is missing"):
            without = {name: tensor for name, tensor in state.items() if name != key}
            set_model_state_dict(shard(make()), without, options=StateDictOptions(full_state_dict=True))


def _saves_what_trains(rank: int) -> None:
    """The adapters and the optimizer by their own names, which is what ignore_frozen_params is for."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict

    model = shard(make())
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameter for parameter in model.parameters() if parameter.requires_grad)
    model(torch.randn(M, K)).sum().backward()
    optimizer.step()
    gathered = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    assert set(trained) <= gathered.keys()
    states, optimizers = get_state_dict(model, optimizer)
    assert states.keys() == gathered.keys() and sorted(optimizers["state"]) == sorted(trained)
    # Not by us, and not to be told from Torch's other questions: the frozen Parameters' names are no keys.
    with pytest.raises(KeyError, match="0.absmax"):
        get_model_state_dict(model, options=StateDictOptions(ignore_frozen_params=True))


def _goes_through_a_distributed_checkpoint(rank: int, folder: str) -> None:
    import torch.distributed.checkpoint as checkpoint
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    torch.manual_seed(0)
    model = shard(make())
    checkpoint.save({"model": get_model_state_dict(model)}, checkpoint_id=folder)
    x = torch.randn(M, K)
    for other in (shard(make()), shard(make("meta")).to_empty(device="cpu")):
        read = {"model": get_model_state_dict(other)}
        checkpoint.load(read, checkpoint_id=folder)
        set_model_state_dict(other, read["model"])
        assert_same_states(whole(other.state_dict()), whole(model.state_dict()))
        assert torch.equal(other(x), model(x))


def _writes_files(rank: int, folder: str) -> None:
    """save_adapter and save_quantized gather, and rank 0 writes what one process would, also after a forward."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(K, K), torch.nn.Linear(K, 1), torch.nn.Linear(1, 1))
    config = pk.LoraConfig(r=R, target_modules=["0"], base="nf4", double_quant=True, init_lora_weights=False)
    pk.inject(model, config)
    model[1].one, model[1].other = torch.nn.Embedding(5, 2), torch.nn.Embedding(5, 2)
    model[1].other.weight = model[1].one.weight  # written once
    pk.save_adapter(model, f"{folder}/alone-{rank}/adapter")
    pk.save_quantized(model, f"{folder}/alone-{rank}/base")
    fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)))
    with torch.no_grad():
        model(torch.randn(M, K))  # after which the root's Parameters are whole
    pk.save_quantized(model, f"{folder}/together-{rank}/base", max_shard_size=10**9)
    with torch.no_grad():
        model(torch.randn(M, K))
    pk.save_adapter(model, f"{folder}/together-{rank}/adapter")
    assert os.path.exists(f"{folder}/together-{rank}") == (rank == 0), "each rank was given another folder"
    with pytest.raises(ValueError, match="sharded this model; load the adapter before fully_shard"):
        pk.load_adapter(model, f"{folder}/alone-{rank}/adapter")
    for name in ("adapter/adapter_model", "base/model") if rank == 0 else ():
        found, expected = (load_file(f"{folder}/{who}-0/{name}.safetensors") for who in ("together", "alone"))
        assert_same_states(found, expected)  # byte for byte, the texts too


def _training(rank: int) -> None:
    _trains(rank)
    _saves_what_trains(rank)
    _writes_files(rank, os.environ["PEFT_KERNELS_TEST_FOLDER"])


def _saving(rank: int) -> None:
    _saves_and_loads(rank)
    _sets_a_whole_state(rank)
    _goes_through_a_distributed_checkpoint(rank, os.environ["PEFT_KERNELS_TEST_FOLDER"])


@pytest.mark.parametrize("check", [_training, _saving], ids=lambda check: check.__name__[1:])
def test_two_ranks(check, tmp_path, monkeypatch):
    monkeypatch.setenv("PEFT_KERNELS_TEST_FOLDER", str(tmp_path / "checkpoint"))
    _on_two_ranks(check, tmp_path)
