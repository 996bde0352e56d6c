"""LoRA's bias="all" and "lora_only": base biases train through the fused LoRA linear, none of them left without."""

import copy

import pytest
import torch
from lora_layers import randomise
from tiny_models import bert, gpt2, ids
from torch import nn

import peft_kernels as pk
from peft_kernels.methods.adapters import fused_layers

peft = pytest.importorskip("peft", reason="HF PEFT is the peer whose gradients are compared with")
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out")


def randomised(model: nn.Module) -> nn.Module:
    torch.manual_seed(3)
    randomise(nn.ModuleList(layer.lora_B for _, layer in fused_layers(model)))
    return model


def bias_gradients(model: nn.Module, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    logits = model(tokens).logits
    (logits * torch.cos(torch.arange(float(logits.numel()))).view(logits.shape)).sum().backward()
    trained = {name: p.grad for name, p in model.named_parameters() if name.endswith("bias") and p.requires_grad}
    return {name.replace("base_model.model.", "").replace("base_layer.", ""): grad for name, grad in trained.items()}


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize(("build", "targets"), [(bert, ["query", "dense"]), (gpt2, ["c_attn", "c_fc"])])
def test_every_base_bias_gets_peers_gradient(build, targets, bias):
    base, tokens = build().double().eval(), ids()
    settings = {"target_modules": targets, "r": 3, "bias": bias}
    ours = randomised(pk.inject(copy.deepcopy(base), pk.LoraConfig(**settings)))
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**settings))
    for name, layer in fused_layers(ours):
        twin = theirs.base_model.model.get_submodule(name)
        with torch.no_grad():
            twin.lora_A["default"].weight.copy_(layer.lora_A["default"])
            twin.lora_B["default"].weight.copy_(layer.lora_B["default"])
    single = bias_gradients(copy.deepcopy(theirs).float(), tokens)
    found, expected = bias_gradients(ours, tokens), bias_gradients(theirs, tokens)
    adapted = {f"{name}.bias" for name, _ in fused_layers(ours)}
    every = {name for name, _ in base.named_parameters() if name.endswith("bias")}
    assert found.keys() == expected.keys() == (every if bias == "all" else adapted)
    for name, value in expected.items():
        assert found[name] is not None, f"{name} trains and got no gradient"
        assert (found[name] - value).abs().max() <= (single[name] - value).abs().max(), name


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_bias_alone_trains_too(bias):
    """With the adapters frozen the bias is all that is left, and gets its gradient."""
    model = pk.inject(gpt2().eval(), pk.LoraConfig(target_modules=["c_attn"], r=2, bias=bias))
    for _, layer in fused_layers(model):
        layer.lora_A.requires_grad_(False)
        layer.lora_B.requires_grad_(False)
    model(ids()).logits.sum().backward()
    assert all(layer.bias.grad is not None and layer.bias.grad.any() for _, layer in fused_layers(model))
