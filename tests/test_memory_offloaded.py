"""offloaded_adamw: the same update, errors, and states that a prediction leaves on the host."""

import sys
import types

import pytest
import torch
from torch import nn

import peft_kernels as pk


def test_on_a_cpu_it_is_torchs_adamw_on_what_is_trained():
    torch.manual_seed(0)
    frozen, ours, theirs = nn.Linear(3, 4).requires_grad_(False), nn.Linear(4, 5), nn.Linear(4, 5)
    theirs.load_state_dict(ours.state_dict())
    settings = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.3}
    one = pk.offloaded_adamw(nn.Sequential(frozen, ours).parameters(), **settings)
    other = torch.optim.AdamW(theirs.parameters(), fused=True, **settings)
    x = torch.randn(7, 4)
    for _ in range(3):
        for layer, optimizer in ((ours, one), (theirs, other)):
            layer(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert torch.equal(ours.weight, theirs.weight) and torch.equal(ours.bias, theirs.bias)
    assert len(one.param_groups[0]["params"]) == 2


def test_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match="none of the parameters requires grad"):
        pk.offloaded_adamw(nn.Linear(3, 4).requires_grad_(False).parameters())


def test_elsewhere_it_is_torchaos(monkeypatch):
    """No GPU is here: parameters on the meta device stand for one, and a recorder for torchao."""
    calls = []

    def recorder(parameters, optimizer, **settings):
        calls.append((len(parameters), optimizer, settings))
        return "made"

    monkeypatch.setitem(sys.modules, "torchao", types.ModuleType("torchao"))
    monkeypatch.setitem(sys.modules, "torchao.optim", types.SimpleNamespace(CPUOffloadOptimizer=recorder))
    layer = nn.Linear(3, 4, device="meta")
    layer.bias.requires_grad_(False)
    assert pk.offloaded_adamw(layer.parameters(), lr=0.5) == "made"
    ((count, optimizer, settings),) = calls
    assert count == 1 and optimizer is torch.optim.AdamW
    assert settings["lr"] == 0.5 and settings["fused"] and settings["minimal_size"] == 4096


def test_torchao_is_asked_for_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(ImportError, match="needs torchao on a GPU: pip install torchao"):
        pk.offloaded_adamw(nn.Linear(3, 4, device="meta").parameters())


def test_a_prediction_leaves_its_states_on_the_host():
    """Moments of 4,096 elements and more; a smaller parameter's stay on the GPU."""

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(64, 128, bias=False), nn.Linear(128, 8, bias=False))

    def peak(optimizer, arch=90) -> int:
        batch = {"input": torch.empty(2, 64)}
        loss = lambda model, batch: model(batch["input"]).sum()  # noqa: E731
        found = pk.predict_memory(build, batch, loss=loss, optimizer=optimizer, arch=arch)
        return found.replay.phases["step"].kinds.get("optimizer", 0)

    def fused(parameters):
        return torch.optim.AdamW(parameters, fused=True)

    large, small = 2 * 4 * 64 * 128, 2 * 4 * 128 * 8
    both, offloaded = peak(fused), peak(pk.offloaded_adamw)
    assert both - offloaded == large + 4, "the large parameter's moments, and its step counter"
    assert offloaded >= small
    assert peak(pk.offloaded_adamw, arch=None) >= large + small, "on a CPU the host is where they are"
