"""transformers' own save_pretrained and from_pretrained of models in 4 bits: the same bytes, the same function."""

import copy
import json

import pytest
import torch
from bnb_models import SIZES, bnb, loaded, saved
from nf4_states import assert_same_states
from tiny_models import gpt2, ids, llama, transformers
from torch import nn

import peft_kernels as pk


def tied() -> nn.Module:
    return llama(**SIZES, tie_word_embeddings=True)


def plain() -> nn.Module:
    return llama(**SIZES)


def read(folder) -> nn.Module:
    """In train mode, where bitsandbytes computes with the bytes as they are, in their own dtype."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder).train()


def settings_of(folder) -> dict | None:
    return json.loads((folder / "config.json").read_text()).get("quantization_config")


def small(model: nn.Module) -> set[str]:
    return {name for name, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit | pk.NF4Linear)}


@pytest.mark.parametrize("build", [plain, tied, gpt2], ids=lambda build: build.__name__)
@pytest.mark.parametrize(
    ("quant_type", "blocksize", "double_quant"),
    [("nf4", 64, True), ("nf4", 64, False), ("fp4", 64, True), ("nf4", 32, True), ("nf4", 256, False)],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_what_quantize_made_is_saved_and_loaded_by_transformers(
    build, quant_type, blocksize, double_quant, dtype, tmp_path
):
    model = pk.quantize(build().to(dtype), quant_type, blocksize, double_quant).train()
    model.save_pretrained(tmp_path)
    theirs = read(tmp_path)
    assert small(theirs) == small(model) and "lm_head" not in small(theirs)
    assert_same_states(theirs.state_dict(), model.state_dict())
    assert theirs.config.quantization_config.bnb_4bit_compute_dtype == dtype
    if build is tied:
        assert theirs.lm_head.weight is theirs.model.embed_tokens.weight
    if dtype == torch.float32 and build is not gpt2 and blocksize <= 64:  # else it drops out, or reads wrong scales
        tokens = ids()
        torch.testing.assert_close(theirs(tokens).logits, model(tokens).logits)


def test_layers_left_out_are_left_out_by_transformers(tmp_path):
    model = pk.quantize(plain(), skip_modules=["k_proj", "layers.1.mlp"])
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    dense = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    assert settings_of(tmp_path)["llm_int8_skip_modules"] == dense and len(dense) == 3 + 3 + 1
    theirs = read(tmp_path)
    assert small(theirs) == small(model) and len(small(model)) == 15
    assert_same_states(theirs.state_dict(), model.state_dict())


def test_a_model_without_an_output_embedding_is_loaded_with_its_head_in_4_bits(tmp_path):
    """Told of no layer to leave, transformers would leave the last one dense: its guess at an output layer."""
    config = transformers.LlamaConfig(vocab_size=40, num_hidden_layers=1, num_attention_heads=2, num_labels=32, **SIZES)
    model = pk.quantize(transformers.LlamaForSequenceClassification(config))
    model.save_pretrained(tmp_path)
    theirs = type(model).from_pretrained(tmp_path)
    assert "score" in small(model) and small(theirs) == small(model)
    assert_same_states(theirs.state_dict(), model.state_dict())


def test_a_base_with_adapters_is_saved_as_the_base_and_they_with_it(tmp_path):
    """As from_pretrained reports: it has no place for them. save_adapter is for them."""
    config = pk.LoraConfig(target_modules=["q_proj"], base="nf4", double_quant=True)
    model = pk.inject(plain(), config)
    model.save_pretrained(tmp_path)
    theirs = read(tmp_path)
    own = {key: tensor for key, tensor in model.state_dict().items() if "lora_" not in key}
    assert_same_states(theirs.state_dict(), own)


def test_saves_where_only_adapters_stand_on_a_dense_layer(tmp_path):
    model = pk.quantize(plain(), skip_modules=["q_proj"])
    pk.inject(model, pk.LoraConfig(target_modules=["q_proj", "v_proj"]))
    pk.save_quantized(model, tmp_path / "a")
    assert {f"model.layers.{i}.self_attn.q_proj" for i in range(3)} <= set(
        settings_of(tmp_path / "a")["llm_int8_skip_modules"]
    )
    own = {key: tensor for key, tensor in model.state_dict().items() if "lora_" not in key}
    assert_same_states(read(tmp_path / "a").state_dict(), own)


@pytest.mark.parametrize("way", ["load_quantized", "from_bitsandbytes", "to_bitsandbytes", "deepcopy"])
def test_every_way_into_4_bits_can_be_saved(way, tmp_path):
    folder = saved(tmp_path / "dense")
    if way == "load_quantized":
        model = pk.load_quantized(plain().to("meta").to_empty(device="cpu"), folder, double_quant=True)
    elif way == "deepcopy":
        model = copy.deepcopy(pk.quantize(plain(), double_quant=True))
    else:
        model = pk.from_bitsandbytes(loaded(folder))
    if way == "to_bitsandbytes":
        pk.to_bitsandbytes(model)
    model.save_pretrained(tmp_path / "small")
    assert_same_states(read(tmp_path / "small").state_dict(), model.state_dict())


@pytest.mark.parametrize("adapters", [False, True])
def test_a_dequantised_model_is_saved_as_a_dense_one(adapters, tmp_path):
    model = plain()
    config = pk.LoraConfig(target_modules=["q_proj"], base="nf4")
    model = pk.inject(model, config) if adapters else pk.quantize(model)
    assert model.config.quantization_config["load_in_4bit"]
    pk.dequantize(model)
    assert not hasattr(model.config, "quantization_config")
    if adapters:
        pk.merge(model, restorable=False)
        pk.delete_adapter(model, "default")
    model.save_pretrained(tmp_path)
    theirs = read(tmp_path)
    assert not small(theirs) and settings_of(tmp_path) is None
    assert_same_states(theirs.state_dict(), model.state_dict())


def test_a_setting_of_transformers_own_is_left():
    model = plain()
    own = model.config.quantization_config = transformers.BitsAndBytesConfig(load_in_4bit=True)
    pk.quantize(model)
    assert model.config.quantization_config is own
    assert not hasattr(pk.quantize(nn.Sequential(nn.Linear(64, 64))), "config")


def test_what_transformers_keeps_in_fp32_stays_dense(tmp_path):
    """T5's `wo`: its from_pretrained leaves that dense whatever the file says, and would not find its size."""
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "vocab_size": 64}
    model = pk.quantize(transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)))
    dense = {name for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert {name.rpartition(".")[2] for name in dense} == {"wo", "lm_head"} and small(model)
    model.save_pretrained(tmp_path)
    theirs = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path)
    assert small(theirs) == small(model)
    assert_same_states(theirs.state_dict(), model.state_dict())


def test_a_part_of_a_model_quantised_by_hand_is_for_save_quantized(tmp_path):
    model = plain()
    pk.quantize(model.model)
    pk.save_quantized(model, tmp_path)
    assert settings_of(tmp_path)["llm_int8_skip_modules"] == ["lm_head"]
    assert_same_states(read(tmp_path).state_dict(), model.state_dict())


@pytest.mark.parametrize("way", ["quantize", "inject"])
def test_a_config_shared_by_two_models_tells_them_apart(way, tmp_path):
    """Built from one object, one is dense and one in 4 bits, then the other way round."""
    config = plain().config
    dense, small_one = (transformers.AutoModelForCausalLM.from_config(config) for _ in range(2))
    assert dense.config is small_one.config
    if way == "quantize":
        pk.quantize(small_one)
    else:
        pk.inject(small_one, pk.LoraConfig(r=2, target_modules="all-linear", base="nf4"))
    assert all(m.config is small_one.config for m in small_one.modules() if hasattr(m, "config"))
    dense.save_pretrained(tmp_path / "dense")
    small_one.save_pretrained(tmp_path / "small")
    assert settings_of(tmp_path / "dense") is None and settings_of(tmp_path / "small")["load_in_4bit"]
    assert not small(read(tmp_path / "dense")) and small(read(tmp_path / "small"))
    other = pk.quantize(transformers.AutoModelForCausalLM.from_config(small_one.config))
    pk.dequantize(other)
    other.save_pretrained(tmp_path / "other")
    small_one.save_pretrained(tmp_path / "small")
    assert settings_of(tmp_path / "other") is None and settings_of(tmp_path / "small")["load_in_4bit"]
    small_one.config.use_cache = False
    assert small_one.model.config.use_cache is False, "the model's modules read another config"
