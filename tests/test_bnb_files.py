"""load_quantized and save_quantized: files of transformers and bitsandbytes, byte for byte, one weight at a time."""

import copy
import json
import weakref

import pytest
import torch
from accelerate import init_empty_weights
from bnb_models import SIZES, loaded, saved
from nf4_states import assert_same_states, make_state
from safetensors.torch import load_file, save_file
from test_bnb_files_faults import WEIGHTS, good, one_layer
from tiny_models import gpt2, ids, llama, transformers
from torch import nn

import peft_kernels as pk
from peft_kernels.interop.checkpoint_plan import CheckpointPlan


def empty(build=llama) -> nn.Module:
    with init_empty_weights():
        return build(**SIZES) if build is llama else build()


def tied() -> nn.Module:
    return llama(**SIZES, tie_word_embeddings=True)


def buffers_too(build=llama) -> nn.Module:
    with torch.device("meta"):
        return build(**SIZES)


@pytest.mark.parametrize("build", [llama, gpt2, tied], ids=lambda build: build.__name__)
@pytest.mark.parametrize("double_quant", [False, True])
def test_gives_the_model_that_quantize_gives(build, double_quant, tmp_path):
    dense = build(**SIZES) if build is llama else build()
    dense.save_pretrained(tmp_path)
    expected = pk.quantize(copy.deepcopy(dense), blocksize=32, double_quant=double_quant)
    model = pk.load_quantized(empty(build), tmp_path, blocksize=32, double_quant=double_quant)
    assert_same_states(model.state_dict(), expected.state_dict())
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert [type(m) for m in model.modules()] == [type(m) for m in expected.modules()]
    if build is not llama:
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    tokens = ids()
    assert torch.equal(model.eval()(tokens).logits, expected.eval()(tokens).logits)


def test_one_dense_weight_at_a_time_is_in_memory(tmp_path, monkeypatch):
    folder = saved(tmp_path)
    alive, seen = weakref.WeakSet(), []
    original = CheckpointPlan.read

    def read(self, key):
        tensor = original(self, key)
        if key.endswith("proj.weight"):
            alive.add(tensor)
            seen.append(len(alive))
        return tensor

    monkeypatch.setattr(CheckpointPlan, "read", read)
    pk.load_quantized(empty(), folder)
    assert seen == [1] * 21 and not alive


def test_dtype_and_device_and_what_is_skipped(tmp_path, device):
    folder = saved(tmp_path, dtype=torch.float32)
    model = pk.load_quantized(empty(), folder, skip_modules=["k_proj"], dtype=torch.bfloat16, device=device)
    assert model.lm_head.weight.dtype == model.model.norm.weight.dtype == torch.bfloat16
    layer = model.model.layers[0].self_attn
    assert type(layer.k_proj) is nn.Linear and layer.k_proj.weight.dtype == torch.bfloat16
    assert layer.q_proj.dequantize().dtype == torch.bfloat16
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {device}


@pytest.mark.parametrize("storage", ["uint8", "bfloat16", "float16", "float32"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_files_of_bitsandbytes_are_read_and_written_byte_for_byte(storage, nested, quant_type, tmp_path):
    settings = {"bnb_4bit_quant_storage": storage, "bnb_4bit_use_double_quant": nested}
    theirs = loaded(saved(tmp_path / "dense"), bnb_4bit_quant_type=quant_type, **settings)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = pk.load_quantized(empty(), tmp_path / "theirs")
    assert sum(isinstance(m, pk.NF4Linear) for m in ours.modules()) == 21
    pk.save_quantized(ours, tmp_path / "ours")
    files = [(tmp_path / name / WEIGHTS).read_bytes() for name in ("theirs", "ours")]
    assert files[0] == files[1]


def test_transformers_loads_what_was_quantised_here(tmp_path):
    model = pk.quantize(llama(**SIZES).bfloat16(), double_quant=True)
    pk.save_quantized(model, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert sum(type(m).__module__.startswith("bitsandbytes") for m in theirs.modules()) == 21
    assert_same_states(theirs.state_dict(), model.state_dict())
    assert theirs.config.quantization_config.llm_int8_skip_modules == ["lm_head"]
    assert_same_states(pk.from_bitsandbytes(theirs).state_dict(), model.state_dict())


def test_adapters_are_not_in_the_files(tmp_path):
    config = pk.LoraConfig(target_modules=["q_proj"], base="nf4", double_quant=True)
    model = pk.inject(llama(**SIZES), config)
    pk.save_quantized(model, tmp_path / "base")
    pk.save_adapter(model, tmp_path / "adapter")
    assert not any("lora_" in key for key in load_file(tmp_path / "base" / WEIGHTS))
    again = pk.load_adapter(pk.load_quantized(empty(), tmp_path / "base"), tmp_path / "adapter", is_trainable=True)
    assert_same_states(again.state_dict(), model.state_dict())


def test_shards_with_an_index_and_back_to_one_file(tmp_path):
    model = pk.quantize(llama(**SIZES))
    pk.save_quantized(model, tmp_path, max_shard_size=30_000)
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(shards) > 3 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert_same_states(pk.load_quantized(empty(), tmp_path).state_dict(), model.state_dict())
    (tmp_path / shards[1]).rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=f"has no {shards[1]}, which model.safetensors.index.json names"):
        pk.load_quantized(empty(), tmp_path)
    pk.save_quantized(model, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "elsewhere", WEIGHTS]
    assert_same_states(pk.load_quantized(empty(), tmp_path).state_dict(), model.state_dict())


def test_the_deprecated_layout_is_read_as_dense_values(tmp_path):
    state = make_state("0.weight", shape=(40, 6), transposed=True)
    save_file(state, tmp_path / WEIGHTS)
    with init_empty_weights():
        model = nn.Sequential(nn.Linear(40, 6, bias=False))
    with pytest.warns(UserWarning, match="0 holds its weight transposed"):
        pk.load_quantized(model, tmp_path)
    packed = {**state, "0.weight": state["0.weight"].t().contiguous()}
    values = pk.NF4Linear(6, 40, bias=False)
    values.load_state_dict({key.removeprefix("0."): tensor for key, tensor in packed.items()})
    assert type(model[0]) is nn.Linear and torch.equal(model[0].weight, values.dequantize().t())


def test_files_that_cannot_be_read_are_refused(tmp_path):
    model = one_layer()
    with pytest.raises(FileNotFoundError, match="no such folder"):
        pk.load_quantized(model, tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"has no model.safetensors and no .*found: \[\]"):
        pk.load_quantized(model, tmp_path)
    (tmp_path / WEIGHTS).write_bytes(b"12345678 not one")
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        pk.load_quantized(model, tmp_path)
    save_file(good(), tmp_path / WEIGHTS)
    for text, message in (
        ("{", "config.json is not JSON"),
        ("[]", "config.json holds list"),
        (
            '{"quantization_config": {"quant_method": "gptq"}}',
            "quantization_config is {'quant_method': 'gptq'}; expected",
        ),
        ('{"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": true}}', "with load_in_4bit"),
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            pk.load_quantized(model, tmp_path)
    (tmp_path / "config.json").unlink()
    index = tmp_path / f"{WEIGHTS}.index.json"
    index.write_text(json.dumps({"weight_map": {"gone": WEIGHTS}}))
    with pytest.raises(ValueError, match="lacks gone, which the index says is there"):
        pk.load_quantized(model, tmp_path)
    index.write_text("{}")
    with pytest.raises(ValueError, match="holds no weight_map"):
        pk.load_quantized(model, tmp_path)


def test_a_weight_that_is_not_finite_leaves_the_model_as_it_was(tmp_path):
    folder = saved(tmp_path)
    state = load_file(tmp_path / WEIGHTS)
    state["model.layers.2.mlp.down_proj.weight"][0, 0] = torch.nan
    save_file(state, tmp_path / WEIGHTS, metadata={"format": "pt"})
    model = empty()
    with pytest.raises(ValueError, match="layers.2.mlp.down_proj: its weight holds NaN or an infinity"):
        pk.load_quantized(model, folder)
    assert all(p.is_meta for p in model.parameters()) and not any(isinstance(m, pk.NF4Linear) for m in model.modules())


def test_buffers_without_memory_are_named(tmp_path):
    folder = saved(tmp_path)
    with pytest.raises(ValueError, match="buffer model.rotary_emb.inv_freq is on the meta device and in no checkpoint"):
        pk.load_quantized(buffers_too(), folder)


def test_what_cannot_be_saved_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no layer in 4 bits"):
        pk.save_quantized(llama(), tmp_path)
    config = pk.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], base="nf4")
    with pytest.raises(ValueError, match="lm_head is one of modules_to_save"):
        pk.save_quantized(pk.inject(llama(), config), tmp_path)
    assert not list(tmp_path.iterdir())
