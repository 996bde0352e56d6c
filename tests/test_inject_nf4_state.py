"""A whole model in 4 bits: adapters saved and loaded, state_dict, quantize and dequantize, hooks, BitFit."""

import copy
import json

import pytest
import torch
from test_inject_nf4 import QLORA, assert_same_function, kinds, small, with_adapters
from tiny_models import bert, gpt2, ids, llama, train_a_little
from torch import nn

import peft_kernels as pk


@pytest.mark.parametrize("build", [llama, gpt2])
def test_adapters_are_saved_in_hf_pefts_format_and_load_over_either_base(build, tmp_path):
    model = with_adapters(build)
    pk.save_adapter(model, tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert not {"base", "blocksize", "double_quant"} & settings.keys()
    again = pk.quantize(build(), double_quant=True)
    again.load_state_dict({k: v for k, v in model.state_dict().items() if "lora_" not in k})
    pk.load_adapter(again, tmp_path)
    tokens = ids()
    assert torch.equal(again.eval()(tokens).logits, model.eval()(tokens).logits)
    assert len(small(again)) == len(small(model))


def test_hf_peft_reads_what_was_trained_over_four_bits(tmp_path):
    peft = pytest.importorskip("peft")
    base = pk.dequantize(pk.quantize(llama()))
    ours = pk.inject(copy.deepcopy(base), pk.LoraConfig(target_modules="all-linear", r=3, **QLORA))
    train_a_little(ours)
    pk.save_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    loaded = pk.load_adapter(copy.deepcopy(base), tmp_path)
    assert_same_function(loaded, theirs)


def test_state_dict_of_the_whole_model_loads_strictly():
    model = with_adapters()
    twin = with_adapters(double_quant=False)
    assert not any(twin.load_state_dict(model.state_dict()))
    assert torch.equal(twin.eval()(ids()).logits.isfinite().all(), torch.tensor(True))
    tokens = ids()
    assert torch.equal(twin(tokens).logits, model.eval()(tokens).logits)


@pytest.mark.parametrize("build", [llama, gpt2, bert])
def test_quantize_and_dequantize_are_each_others_way_back(build):
    model = build().bfloat16()
    before = kinds(model)
    shapes = {name: (p.shape, p.dtype) for name, p in model.named_parameters()}
    assert pk.quantize(model, "fp4", 32, double_quant=True, skip_modules=["0"]) is model
    chosen = small(model)
    assert chosen and not any(".0." in name for name in chosen)
    assert all(model.get_submodule(name).quantised.quant_type == "fp4" for name in chosen)
    state = copy.deepcopy(model.state_dict())
    assert pk.dequantize(model) is model
    assert kinds(model) == before and not small(model)
    assert {name: (p.shape, p.dtype) for name, p in model.named_parameters()} == shapes
    assert_same_function_of_layers(model, state, chosen)


def assert_same_function_of_layers(model: nn.Module, state: dict, names: set[str]) -> None:
    """Each dense layer's weight is what the 4-bit one of the state_dict stood for, turned where it is a Conv1D's."""
    for name in names:
        dense = model.get_submodule(name)
        turned = type(dense).__name__ == "Conv1D"
        weight = dense.weight.t() if turned else dense.weight
        layer = pk.NF4Linear(*reversed(weight.shape), bias=dense.bias is not None)
        layer.load_state_dict({k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")})
        assert torch.equal(weight, layer.dequantize())


def test_quantize_refuses_what_is_not_there():
    with pytest.raises(ValueError, match="skip_modules: no module of this model is named 'head'"):
        pk.quantize(llama(), skip_modules=["head"])
    with pytest.raises(ValueError, match="quant_type is 'int4'"):
        pk.quantize(llama(), "int4")
    with pytest.raises(ValueError, match="no linear layer to quantise"):
        pk.quantize(nn.Sequential(nn.ReLU()))
    with pytest.raises(ValueError, match="no layer in 4 bits"):
        pk.dequantize(llama())


def test_quantize_leaves_hf_pefts_wrappers_alone():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="q_proj is HF PEFT's Linear"):
        pk.quantize(model)
    assert not small(model)


def test_a_model_without_memory_has_the_shapes_of_one_with():
    with torch.device("meta"):
        model = llama()
    pk.inject(model, pk.LoraConfig(target_modules=["q_proj"], **QLORA))
    real = pk.inject(llama(), pk.LoraConfig(target_modules=["q_proj"], **QLORA))
    assert {n: (p.shape, p.dtype) for n, p in model.named_parameters()} == {
        n: (p.shape, p.dtype) for n, p in real.named_parameters()
    }
    assert all(p.is_meta for p in model.parameters())


def test_hooks_go_there_and_back():
    model = llama()
    seen = []
    handle = model.model.layers[0].mlp.up_proj.register_forward_hook(lambda module, *args: seen.append(type(module)))
    for step in (pk.quantize, pk.dequantize):
        step(model)
        model(ids())
    assert seen == [pk.NF4Linear, nn.Linear]
    assert not {"quantised", "conv1d"} & vars(model.model.layers[0].mlp.up_proj).keys()
    handle.remove()
    model(ids())
    assert len(seen) == 2


def test_what_is_in_four_bits_does_not_train_whole():
    model = pk.quantize(llama())
    config = pk.LoraConfig(target_modules=["q_proj"], modules_to_save=["up_proj"])
    with pytest.raises(ValueError, match="modules_to_save chooses 'model.layers.0.mlp.up_proj', which is in 4 bits"):
        pk.inject(model, config)


def test_bitfit_trains_the_biases_over_four_bits():
    model = pk.quantize(bert(), skip_modules=["classifier"])
    pk.inject(model, pk.BitFitConfig(modules_to_save=["classifier"]))
    model(ids(), labels=torch.tensor([0, 1])).loss.backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert "bert.encoder.layer.0.attention.self.query.bias" in trained
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    rows = [row for row in pk.coverage(model) if row.path == "nf4 linear"]
    assert len(rows) == 13 and all("the gradient of its bias by torch" in row.reason for row in rows)
