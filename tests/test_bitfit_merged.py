"""Merged for good, a trained head is the model's own; a compiled model is the model that it wraps."""

import copy

import pytest
import torch
from bitfit_models import batch, bits, build, kinds, output, trained
from tiny_models import train_a_little
from torch import nn

import peft_kernels as pk

CONFIGS = {
    "bitfit": lambda: pk.BitFitConfig(modules_to_save=["classifier"]),
    "lora": lambda: pk.LoraConfig(target_modules=["query"], modules_to_save=["classifier"]),
}


@pytest.mark.parametrize("method", CONFIGS)
def test_merged_for_good_the_trained_head_takes_its_place(method):
    base, x = build("bert"), batch("bert")
    model = pk.inject(copy.deepcopy(base), CONFIGS[method]())
    train_a_little(model)
    pk.merge(model, restorable=False)
    expected, head = output(model, x), model.classifier.copies["default"]
    assert not torch.equal(expected, output(base, x))
    pk.delete_adapter(model, "default")
    assert model.classifier is head and type(head) is nn.Linear
    assert torch.equal(output(model, x), expected)
    assert model.state_dict().keys() == base.state_dict().keys()
    assert not any(p.requires_grad for p in model.parameters())
    base.load_state_dict(model.state_dict())
    torch.testing.assert_close(output(base, x), expected)


def test_a_head_that_did_not_run_when_another_adapter_was_merged_is_dropped():
    base, x = build("bert"), batch("bert")
    model = pk.inject(copy.deepcopy(base), CONFIGS["lora"]())
    pk.inject(model, CONFIGS["lora"](), "second")
    train_a_little(model)
    with torch.no_grad():
        model.classifier.copies["second"].bias += 1
    pk.merge(model, restorable=False)
    expected, head = output(model, x), model.classifier.copies["default"]
    pk.delete_adapter(model, "second")
    assert torch.equal(output(model, x), expected)
    pk.delete_adapter(model, "default")
    assert torch.equal(output(model, x), expected) and model.classifier is head


def test_deleted_without_a_merge_the_head_is_the_old_one():
    base, x = build("bert"), batch("bert")
    model = trained(base, modules_to_save=["classifier"])
    pk.merge(model)
    pk.unmerge(model)
    pk.delete_adapter(model, "default")
    assert bits(model) == bits(base) and torch.equal(output(model, x), output(base, x))


class RootBias(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.bias = nn.Linear(8, 8), nn.Parameter(torch.zeros(8))

    def forward(self, x):
        return self.linear(x) + self.bias


@pytest.mark.parametrize("which", ["before", "after"])
@pytest.mark.parametrize("make", [RootBias, lambda: build("mlp").float()], ids=["root bias", "mlp"])
def test_a_compiled_model_is_the_model_it_wraps(make, which, tmp_path):
    model, x = make(), torch.randn(3, 8)
    base = copy.deepcopy(model)
    compiled = torch.compile(model, backend="eager")
    given = compiled if which == "before" else model
    assert pk.inject(given, pk.BitFitConfig()) is given
    train_a_little(model)
    values, adapted = bits(model), model(x)
    torch.testing.assert_close(compiled(x), adapted)
    with pk.disable_adapter(compiled):
        assert bits(model) == bits(base) and kinds(model) == kinds(base)
        torch.testing.assert_close(compiled(x), base(x))
    assert bits(model) == values
    assert list(pk.coverage(compiled)) == list(pk.coverage(model))
    pk.save_adapter(compiled, tmp_path)
    other = torch.compile(copy.deepcopy(base), backend="eager")
    assert pk.load_adapter(other, tmp_path) is other and bits(other._orig_mod) == values
    pk.set_adapter(compiled, "default", inference_mode=True)
    pk.merge(compiled)
    pk.unmerge(compiled)
    pk.delete_adapter(compiled, "default")
    assert bits(model) == bits(base) and kinds(model) == kinds(base)
    assert "peft_kernels_biases" not in vars(model)
