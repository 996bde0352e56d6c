"""bitsandbytes' own objects: their bytes, their values, whole models with HF PEFT and without, there and back."""

import copy
import subprocess
import sys

import pytest
import torch
from bnb_models import bnb, linear4bit, loaded, saved
from nf4_states import assert_same_states
from tiny_models import gpt2, ids
from torch import nn

import peft_kernels as pk

pytestmark = pytest.mark.filterwarnings("ignore:Adapter .* LoRA tensor")
KINDS = [
    ("nf4", True, torch.uint8, torch.bfloat16),
    ("nf4", False, torch.uint8, torch.float16),
    ("fp4", True, torch.uint8, torch.float32),
    ("fp4", False, torch.bfloat16, torch.bfloat16),
    ("nf4", True, torch.float16, torch.bfloat16),
    ("nf4", True, torch.float32, torch.float32),
]
each_kind = pytest.mark.parametrize(("quant_type", "nested", "storage", "dtype"), KINDS, ids=str)


def frozen(state: dict) -> dict:
    return {key: tensor.detach().clone() for key, tensor in state.items()}


@each_kind
@pytest.mark.parametrize("sizes", [(128, 32), (64, 1), (256, 300)], ids=str)
def test_a_layers_state_dict_loads_and_comes_out_as_the_same_bytes(quant_type, nested, storage, dtype, sizes):
    theirs = linear4bit(*sizes, quant_type, nested, storage, dtype)
    state = frozen(theirs.state_dict())
    ours = pk.NF4Linear(*sizes, dtype=dtype)
    assert not any(ours.load_state_dict(state))
    assert_same_states(ours.state_dict(), state)
    expected = bnb.functional.dequantize_4bit(theirs.weight.data, theirs.weight.quant_state)
    assert torch.equal(ours.dequantize(), expected) and ours.dequantize().dtype == dtype


@each_kind
def test_live_objects_are_taken_without_a_copy(quant_type, nested, storage, dtype):
    theirs = linear4bit(quant_type=quant_type, nested=nested, storage=storage, dtype=dtype)
    state = frozen(theirs.state_dict())
    ours = pk.from_bitsandbytes(theirs)
    assert isinstance(ours, pk.NF4Linear) and ours.bias is theirs.bias and ours.training == theirs.training
    assert ours.weight.data_ptr() == theirs.weight.data_ptr()
    assert ours.absmax.data_ptr() == theirs.weight.quant_state.absmax.data_ptr()
    assert type(ours.weight) is nn.Parameter
    assert_same_states(ours.state_dict(), state)
    for weight in (
        pk.from_bitsandbytes(theirs.weight),
        pk.from_bitsandbytes(theirs.weight.data, theirs.weight.quant_state),
    ):
        assert isinstance(weight, pk.NF4Weight)
        assert torch.equal(pk.nf4_dequantize(weight), ours.dequantize())


@pytest.mark.parametrize("nested", [False, True])
def test_scales_that_are_not_finite_are_refused(nested):
    theirs = linear4bit(nested=nested)
    state = theirs.weight.quant_state
    (state.state2 if nested else state).absmax[-1] = torch.nan
    key = "nested_absmax" if nested else "absmax"
    model = nn.Sequential(nn.Linear(3, 3), theirs)
    with pytest.raises(ValueError, match=rf"1.weight.{key} holds NaN or an infinity"):
        pk.from_bitsandbytes(model)
    assert model[1] is theirs
    with pytest.raises(ValueError, match=rf"weight.{key} holds NaN or an infinity"):
        pk.from_bitsandbytes(theirs.weight)
    if nested:
        state.state2.absmax[-1], state.offset = 1.0, torch.tensor(torch.inf)
        with pytest.raises(ValueError, match="weight.quant_state.bitsandbytes__nf4 holds nested_offset inf"):
            pk.from_bitsandbytes(theirs)


def test_a_rounded_map_means_the_exact_levels_to_bitsandbytes_too():
    theirs = linear4bit(dtype=torch.float32)
    expected = theirs.weight.quant_state.code.clone()
    values = bnb.functional.dequantize_4bit(theirs.weight.data, theirs.weight.quant_state)
    theirs.weight.quant_state.code = expected.half().float()
    assert torch.equal(bnb.functional.dequantize_4bit(theirs.weight.data, theirs.weight.quant_state), values)
    assert torch.equal(pk.from_bitsandbytes(theirs).dequantize(), values)


def test_computes_what_bitsandbytes_does(K=192):
    """In fp32, to the rounding of fp32: bitsandbytes dequantises and multiplies, with its weight in fp32 too."""
    theirs = linear4bit(K, 48, dtype=torch.float32).train()
    ours = pk.from_bitsandbytes(copy.deepcopy(theirs))
    x = torch.randn(5, K, requires_grad=True)
    twin = x.detach().clone().requires_grad_(True)
    dy = torch.randn(5, 48)
    ours(x).backward(dy)
    theirs(twin).backward(dy)
    torch.testing.assert_close(ours(x), theirs(twin))
    torch.testing.assert_close(x.grad, twin.grad)


@each_kind
def test_the_way_back_gives_the_same_bytes(quant_type, nested, storage, dtype):
    model = nn.Sequential(linear4bit(quant_type=quant_type, nested=nested, storage=storage, dtype=dtype), nn.ReLU())
    state = frozen(model.state_dict())
    assert pk.from_bitsandbytes(model) is model and isinstance(model[0], pk.NF4Linear)
    assert pk.to_bitsandbytes(model, dtype) is model and type(model[0]) is bnb.nn.Linear4bit
    assert_same_states(model.state_dict(), state)
    assert model[0].compute_dtype == dtype and model[0].weight.bnb_quantized
    model.train()(torch.randn(2, 128, dtype=dtype))
    with pytest.raises(ValueError, match="has no NF4Linear"):
        pk.to_bitsandbytes(model)


def test_a_model_of_transformers_and_back(tmp_path):
    model = loaded(saved(tmp_path, dtype=torch.float32), torch.float32)
    tokens, state = ids(), frozen(model.state_dict())
    before = model(tokens).logits
    pk.from_bitsandbytes(model)
    assert_same_states(model.state_dict(), state)
    assert sum(isinstance(m, pk.NF4Linear) for m in model.modules()) == 21
    assert not any(type(m).__module__.startswith("bitsandbytes") for m in model.modules())
    now = model(tokens).logits
    torch.testing.assert_close(now, before)
    assert model.config.quantization_config["load_in_4bit"] and not getattr(model, "is_quantized", False)
    pk.inject(model, pk.LoraConfig(target_modules=["q_proj"]))
    model(tokens, labels=tokens).loss.backward()
    pk.delete_adapter(model, "default")
    with pytest.raises(ValueError, match="q_proj holds adapters of ours"):
        pk.to_bitsandbytes(model)
    model = pk.from_bitsandbytes(loaded(str(tmp_path), torch.float32))
    pk.to_bitsandbytes(model, torch.float32)
    assert_same_states(model.state_dict(), state)
    assert model.is_quantized and model.hf_quantizer is not None and model.config.quantization_config is not None
    assert torch.equal(model.train()(tokens).logits, before)


def test_conv1d_models_come_over_as_rows_of_outputs(tmp_path):
    model = pk.from_bitsandbytes(loaded(saved(tmp_path, gpt2)))
    layer = model.transformer.h[0].attn.c_attn
    assert (layer.in_features, layer.out_features) == (16, 48)
    pk.dequantize(model)
    assert type(model.transformer.h[0].attn.c_attn).__name__ == "Conv1D"
    assert model.transformer.h[0].attn.c_attn.weight.shape == (16, 48)


def test_inside_hf_pefts_wrapper_and_accelerated(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False, lora_dropout=0.0)
    model = peft.get_peft_model(loaded(saved(tmp_path, dtype=torch.float32), torch.float32), config).train()
    tokens = ids()
    state = frozen(model.state_dict())

    def step() -> dict[str, torch.Tensor]:
        model.zero_grad()
        out = model(input_ids=tokens, labels=tokens)
        out.loss.backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
        return {"logits": out.logits.detach(), **grads}

    expected = step()
    pk.from_bitsandbytes(model)
    torch.testing.assert_close(step(), expected)
    pk.accelerate(model)
    assert_same_states(model.state_dict(), state)
    rows = [row for row in pk.coverage(model) if row.module.endswith(("q_proj", "up_proj"))]
    assert len(rows) == 6 and all(row.path == "nf4 base + default in one call" for row in rows)
    torch.testing.assert_close(step(), expected)
    with pytest.raises(RuntimeError, match="cannot merge into a 4-bit weight"):
        model.merge_and_unload()
    with pytest.raises(ValueError, match="is HF PEFT's, accelerated"):
        pk.to_bitsandbytes(model)
    with model.disable_adapter():
        assert not torch.equal(model(input_ids=tokens).logits, expected["logits"])
    pk.dequantize(model)
    torch.testing.assert_close(step(), expected)
    model.merge_and_unload()


def test_one_seed_draws_the_adapters_that_hf_peft_draws(tmp_path):
    peft = pytest.importorskip("peft")
    folder, settings = saved(tmp_path), {"target_modules": ["q_proj", "down_proj"], "r": 4}
    torch.manual_seed(3)
    theirs = peft.get_peft_model(loaded(folder), peft.LoraConfig(**settings))
    torch.manual_seed(3)
    ours = pk.inject(pk.from_bitsandbytes(loaded(folder)), pk.LoraConfig(**settings))
    drawn = {name: p for name, p in ours.named_parameters() if "lora_A" in name}
    assert len(drawn) == 6
    for name, parameter in drawn.items():
        other = theirs.get_parameter(f"base_model.model.{name}.weight")
        assert other.dtype == parameter.dtype and torch.equal(other, parameter), name


class Subclass(bnb.nn.Linear4bit):
    def forward(self, x):
        return super().forward(x)


REFUSED = {
    "nothing": (lambda: nn.Linear(3, 3), "Sequential has no layer of bitsandbytes' Linear4bit"),
    "not quantised": (lambda: bnb.nn.Linear4bit(32, 32), "1.weight is not quantised yet"),
    "subclass": (lambda: Subclass(32, 32).to("cpu"), "1: has a forward of its own"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_taken_is_refused_before_anything_changes(case):
    build, message = REFUSED[case]
    model = nn.Sequential(nn.ReLU() if case == "nothing" else linear4bit(), build())
    before = list(model)
    with pytest.raises(ValueError, match=message):
        pk.from_bitsandbytes(model)
    assert list(model) == before
    with pytest.raises(ValueError, match="source is dict; expected a model, a layer or a weight"):
        pk.from_bitsandbytes({})


def test_a_weight_that_was_packed_anew_for_the_cpu_is_refused():
    layer = linear4bit()
    layer.weight.quant_state.packing_format_for_cpu = True  # as bitsandbytes marks it, with AVX512-BF16, in eval mode
    with pytest.raises(ValueError, match="packed anew for bitsandbytes' CPU kernel"):
        pk.from_bitsandbytes(layer)


def test_the_deprecated_layout_becomes_a_dense_layer_of_the_same_values():
    """A weight quantised as [K, N] and kept as a row of bytes: x @ W, W's blocks along N."""
    source = torch.randn(128, 64, dtype=torch.bfloat16)
    packed, state = bnb.functional.quantize_4bit(source, quant_type="nf4", compress_statistics=True)
    layer = linear4bit(bias=False)
    layer.weight = bnb.nn.Params4bit(packed.t(), quant_state=state, bnb_quantized=True, module=layer)
    layer.quant_state = state
    x = torch.randn(3, 128, dtype=torch.bfloat16)
    with pytest.warns(DeprecationWarning, match="quantized from a .K, N. tensor"):
        expected = bnb.matmul_4bit(x, layer.weight.t(), quant_state=state)
    with pytest.warns(UserWarning, match="0 holds its weight transposed"):
        model = pk.from_bitsandbytes(nn.Sequential(layer))
    assert type(model[0]) is nn.Linear
    assert torch.equal(model[0].weight.t(), bnb.functional.dequantize_4bit(packed, state))
    torch.testing.assert_close(model(x), expected)


def test_nothing_here_imports_bitsandbytes():
    code = "import sys, torch, peft_kernels as pk; pk.quantize(torch.nn.Sequential(torch.nn.Linear(8, 8)));"
    code += "assert not {'bitsandbytes', 'transformers', 'peft', 'safetensors'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
