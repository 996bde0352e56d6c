"""Arguments and models that quantize and its like cannot take: each is named."""

import pytest
import torch
from test_inject_nf4 import small
from tiny_models import llama
from torch import nn

import peft_kernels as pk

ASKED = {
    "swapped": ({"quant_type": 64, "blocksize": "nf4"}, "quant_type is 64; expected 'nf4' or 'fp4'"),
    "list": ({"quant_type": ["nf4"]}, "quant_type is .'nf4'.; expected 'nf4' or 'fp4'"),
    "float": ({"blocksize": 64.0}, "blocksize is 64.0; expected one of"),
    "text": ({"blocksize": "64"}, "blocksize is '64'; expected one of"),
    "bool": ({"blocksize": True}, "blocksize is True; expected one of"),
    "double": ({"double_quant": "no"}, "double_quant is 'no'; expected True or False"),
}


@pytest.mark.parametrize("fault", ASKED)
def test_arguments_of_other_types_are_named(fault, tmp_path):
    settings, message = ASKED[fault]
    model = llama()
    for caller, call in (
        ("quantize", lambda: pk.quantize(model, **settings)),
        ("load_quantized", lambda: pk.load_quantized(model, tmp_path, **settings)),
        ("nf4_quantize", lambda: pk.nf4_quantize(model.lm_head.weight, **settings)),
        ("nf4_quantize", lambda: pk.NF4Linear(8, 4, **settings)),
    ):
        with pytest.raises(ValueError, match=f"^{caller}: {message}"):
            call()
    assert not small(model)


def test_what_has_nothing_to_quantise_is_told_why():
    for model, message in (
        (nn.Linear(4, 4), "Linear has no linear layer to quantise inside: it is one itself, for NF4Linear.from_linear"),
        (pk.quantize(llama()), "LlamaForCausalLM has no linear layer to quantise: 21 are in 4 bits already"),
        (nn.ReLU(), "ReLU has no linear layer to quantise$"),
        (torch.ones(3, 3), "model is Tensor; expected a torch.nn.Module"),
    ):
        with pytest.raises(ValueError, match=message):
            pk.quantize(model)
    with pytest.raises(ValueError, match=r"skip_modules is \[1\]; expected a list of names"):
        pk.quantize(llama(), skip_modules=[1])
    model = pk.quantize(llama())
    with pytest.raises(ValueError, match="dtype is 'bfloat16'; expected float16, bfloat16, float32 or float64"):
        pk.dequantize(model, "bfloat16")
    assert len(small(model)) == 21


@pytest.mark.parametrize("adapters", [False, True])
def test_files_are_not_read_into_a_model_that_is_in_4_bits(adapters, tmp_path):
    llama().save_pretrained(tmp_path)
    config = pk.LoraConfig(target_modules=["q_proj"], base="nf4")
    model = pk.inject(llama(), config) if adapters else pk.quantize(llama())
    with pytest.raises(ValueError, match="LlamaForCausalLM has 21 layers in 4 bits already; expected a dense model"):
        pk.load_quantized(model, tmp_path)
