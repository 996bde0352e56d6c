"""Adapter checkpoints and the model's state: merged adapters, several active ones, settings already there."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import gpt2, ids, llama, outputs, train_a_little
from torch import nn

import peft_kernels as pk
from peft_kernels.methods.adapters import configs, fused_layers, trainable_copies


def injected(path, base: nn.Module | None = None, **settings) -> nn.Module:
    model = pk.inject(base or gpt2(), pk.LoraConfig(**{"target_modules": ["c_attn"], "r": 2, **settings}))
    train_a_little(model)
    pk.save_adapter(model, path)
    return model


def state(model: nn.Module) -> dict:
    layers = {name: (dict(layer.specs), dict(layer.scaling)) for name, layer in fused_layers(model)}
    tensors = {name: (p.tolist(), p.requires_grad) for name, p in model.named_parameters()}
    return {"configs": configs(model), "layers": layers, "tensors": tensors}


@pytest.mark.parametrize("active", [["default"], ["second"]])
def test_loading_while_merged_changes_nothing(active, tmp_path):
    injected(tmp_path, lora_alpha=6)
    model = pk.inject(gpt2(), pk.LoraConfig(target_modules=["c_attn"], r=2, lora_alpha=40))
    pk.inject(model, pk.LoraConfig(target_modules=["c_attn"], r=3), "second")
    train_a_little(model)
    pk.set_adapter(model, active)
    pk.merge(model, ["default"])
    before = state(model)
    for name in ("default", "second", "new"):
        with pytest.raises(RuntimeError, match="unmerge first"):
            pk.load_adapter(model, tmp_path, name)
        assert state(model) == before
    pk.unmerge(model)
    pk.load_adapter(model, tmp_path)
    assert fused_layers(model)[0][1].scaling["default"] == 3.0


@pytest.mark.parametrize("is_trainable", [False, True])
@pytest.mark.parametrize("active", [["default"], ["second", "default"], ["second"]])
def test_loading_freezes_or_trains_that_adapter_alone(active, is_trainable, tmp_path):
    injected(tmp_path, lora_bias=True, modules_to_save=["ln_f"])
    model = pk.inject(gpt2(), pk.LoraConfig(target_modules=["c_attn"], r=2, lora_bias=True, modules_to_save=["ln_f"]))
    pk.inject(model, pk.LoraConfig(target_modules=["c_attn", "c_fc"], r=3), "second")
    pk.set_adapter(model, active)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    pk.load_adapter(model, tmp_path, is_trainable=is_trainable)
    for name, parameter in model.named_parameters():
        own = ".default" in name
        assert parameter.requires_grad == (is_trainable and "default" in active if own else before[name]), name


def test_loading_frozen_freezes_the_trained_biases_too(tmp_path):
    model = injected(tmp_path, bias="all")
    pk.load_adapter(model, tmp_path)
    assert not any(p.requires_grad for p in model.parameters())
    pk.load_adapter(model, tmp_path, is_trainable=True)
    assert {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad} == {"default", "bias"}


def test_a_file_brings_its_own_alpha_pattern(tmp_path):
    base, tokens = gpt2(), ids()
    model = injected(tmp_path, copy.deepcopy(base), alpha_pattern={"h.1.attn.c_attn": 40})
    other = pk.inject(copy.deepcopy(base), pk.LoraConfig(target_modules=["c_attn"], r=2))
    pk.load_adapter(other, tmp_path)
    assert [layer.scaling["default"] for _, layer in fused_layers(other)] == [4.0, 20.0]
    assert torch.equal(outputs(other, tokens), outputs(model, tokens))


def test_tied_copies_of_saved_modules_are_stored_twice(tmp_path):
    base, tokens = llama(tie_word_embeddings=True), ids()
    settings = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
    model = pk.inject(copy.deepcopy(base), pk.LoraConfig(**settings))
    embedding, head = (wrapper.copies["default"] for _, wrapper in trainable_copies(model))
    head.weight = embedding.weight
    train_a_little(model)
    pk.save_adapter(model, tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    for name in ("model.embed_tokens", "lm_head"):
        assert torch.equal(stored[f"base_model.model.{name}.weight"], embedding.weight)
    assert torch.equal(outputs(pk.load_adapter(copy.deepcopy(base), tmp_path), tokens), outputs(model, tokens))


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_saving_while_merged_stores_the_base_bias(bias, tmp_path):
    model = injected(tmp_path / "before", lora_bias=True, bias=bias)
    expected = load_file(tmp_path / "before" / "adapter_model.safetensors")
    pk.merge(model)
    pk.save_adapter(model, tmp_path / "merged")
    stored = load_file(tmp_path / "merged" / "adapter_model.safetensors")
    assert stored.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(stored[key], value), key
    pk.unmerge(model)
    pk.merge(model, restorable=False)
    with pytest.raises(RuntimeError, match="the base bias was not kept"):
        pk.save_adapter(model, tmp_path / "lost")
    assert not (tmp_path / "lost").exists()


MALFORMED = {
    "[1]": "the config is a list",
    "{": "Expecting property name",
    '{"target_modules": 5}': "target_modules is 5",
    '{"target_modules": "("}': "is not a regular expression",
    '{"alpha_pattern": [1]}': "alpha_pattern is",
}


@pytest.mark.parametrize("text", MALFORMED)
def test_a_malformed_config_is_named(text, tmp_path):
    injected(tmp_path)
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match=rf"adapter_config\.json: .*{MALFORMED[text]}"):
        pk.load_adapter(gpt2(), tmp_path)


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_a_cut_weights_file_is_named(size, tmp_path):
    injected(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is not a whole safetensors file"):
        pk.load_adapter(gpt2(), tmp_path)
