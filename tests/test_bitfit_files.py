"""BitFit's folder: the biases and modules_to_save, to the bit, and an error for a file that does not fit."""

import copy
import json

import pytest
import torch
from bitfit_models import batch, bits, build, kinds, output, trained
from safetensors.torch import load_file, save_file
from tiny_models import bert
from torch import nn

import peft_kernels as pk

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("present", [False, True])
def test_saved_and_loaded_to_the_bit(dtype, present, tmp_path):
    base, x = build("bert").to(dtype), batch("bert")
    model = trained(base, task_type="SEQ_CLS", exclude_terms=["pooler"])
    pk.save_adapter(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    stored = load_file(tmp_path / "adapter_model.safetensors")
    owned = {n for n, p in model.named_parameters() if p.requires_grad}
    expected = {f"base_model.model.{n}".replace("copies.default.", "") for n in owned}
    assert stored.keys() == expected and all(value.dtype == dtype for value in stored.values())
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["peft_type"] == "BITFIT" and settings["exclude_terms"] == ["pooler"]
    again = copy.deepcopy(base)
    if present:
        again = trained(base, task_type="SEQ_CLS", exclude_terms=["pooler"])
    flags = pk.trainable_parameters(model)
    assert pk.trainable_parameters(pk.load_adapter(again, tmp_path, is_trainable=True)) == flags
    assert bits(again) == bits(model) and torch.equal(output(again, x), output(model, x))
    pk.load_adapter(again, tmp_path)  # over the one that is there, frozen
    assert pk.trainable_parameters(again).trainable == 0
    assert pk.trainable_parameters(pk.load_adapter(again, tmp_path, is_trainable=True)) == flags
    pk.delete_adapter(again, "default")
    assert bits(again) == bits(base)
    frozen = pk.load_adapter(copy.deepcopy(base), tmp_path)
    assert pk.trainable_parameters(frozen).trainable == 0 and bits(frozen) == bits(model)


def test_saving_while_disabled_or_merged_stores_the_trained_biases(tmp_path):
    base = build("gpt2")
    model = trained(base)
    with pk.disable_adapter(model):
        pk.save_adapter(model, tmp_path / "disabled")
        with pytest.raises(RuntimeError, match="cannot load an adapter: the adapter is disabled"):
            pk.load_adapter(model, tmp_path / "disabled")
    pk.merge(model)
    pk.save_adapter(model, tmp_path / "merged")
    with pytest.raises(RuntimeError, match="cannot load an adapter: .* merged, unmerge first"):
        pk.load_adapter(model, tmp_path / "disabled")
    for name in ("disabled", "merged"):
        assert bits(pk.load_adapter(copy.deepcopy(base), tmp_path / name)) == bits(model)


def test_tied_biases_are_stored_once(tmp_path):
    base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    base[1].bias = base[0].bias
    model = trained(base)
    pk.save_adapter(model, tmp_path)
    assert list(load_file(tmp_path / "adapter_model.safetensors")) == ["base_model.model.0.bias"]
    assert bits(pk.load_adapter(copy.deepcopy(base), tmp_path)) == bits(model)


def test_a_file_that_does_not_fit_changes_nothing_and_lists_every_problem(tmp_path):
    model = trained(build("mlp"))
    pk.save_adapter(model, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors["base_model.model.0.bias"]
    tensors["base_model.model.2.bias"] = torch.ones(3)
    save_file({**tensors, "base_model.model.9.bias": torch.ones(1)}, file)
    for target in (build("mlp"), model):
        before = bits(target), kinds(target), [p.requires_grad for p in target.parameters()]
        with pytest.raises(ValueError, match="nothing was loaded") as error:
            pk.load_adapter(target, tmp_path)
        for text in (
            "missing key base_model.model.0.bias",
            "shape [3], expected [8]",
            "unexpected key base_model.model.9",
        ):
            assert text in str(error.value)
        assert before == (bits(target), kinds(target), [p.requires_grad for p in target.parameters()])


def test_files_of_the_other_method_are_refused_by_name(tmp_path):
    pk.save_adapter(trained(bert()), tmp_path / "biases")
    lora = pk.inject(bert(), pk.LoraConfig(target_modules=["query"]))
    pk.save_adapter(lora, tmp_path / "lora")
    with pytest.raises(ValueError, match="the file has a BitFitConfig, adapter 'default' a LoraConfig"):
        pk.load_adapter(lora, tmp_path / "biases")
    with pytest.raises(ValueError, match="the file has a LoraConfig, adapter 'default' a BitFitConfig"):
        pk.load_adapter(trained(bert()), tmp_path / "lora")
    with pytest.raises(ValueError, match="must be the only adapter"):
        pk.load_adapter(lora, tmp_path / "biases", "second")
    config = tmp_path / "biases" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "rank": 4}))
    with pytest.raises(ValueError, match=r"adapter_config\.json: rank=4 is not supported"):
        pk.load_adapter(bert(), tmp_path / "biases")
