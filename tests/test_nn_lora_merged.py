"""The state_dict of a layer while adapters are merged: that of the layer without merging, saved and loaded."""

import copy
import pickle

import pytest
import torch
from lora_layers import K, N, conv1d, make, randomise
from safetensors.torch import load_file
from test_distributed import _on_two_ranks
from tiny_models import gpt2, ids, outputs, train_a_little
from torch import nn

import peft_kernels as pk
from peft_kernels import FusedLoRALinear
from peft_kernels.methods.adapters import fused_layers

BASES = {"linear": lambda: nn.Linear(K, N), "no_bias": lambda: nn.Linear(K, N, bias=False), "conv1d": conv1d}
DTYPES = [torch.float64, torch.bfloat16]


def several(base: str = "linear", dtype=torch.float64) -> FusedLoRALinear:
    """Three adapters, two of them active, one of these with a bias of its own where the base has one."""
    layer = make(BASES[base](), dtype, lora_bias=base != "no_bias")
    for name in ("second", "third"):
        layer.add_adapter(name, r=2)
    randomise(layer)
    layer.set_adapter(["default", "second"])
    return layer


def snapshot(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_same(found: dict, expected: dict) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("base", BASES)
def test_holds_the_base_weight_beside_the_adapters(base, dtype):
    layer = several(base, dtype)
    before = snapshot(layer)
    layer.merge()
    assert not torch.equal(layer.weight, before["weight"])
    for keep_vars in (False, True):
        assert_same(layer.state_dict(keep_vars=keep_vars), before)
    fresh = several(base, dtype)
    fresh.load_state_dict(layer.state_dict())
    x = torch.randn(3, K, dtype=dtype)
    unmerged = copy.deepcopy(layer)
    unmerged.unmerge()
    assert torch.equal(fresh(x), unmerged(x))
    assert_same(unmerged.state_dict(), before)


def test_an_adapter_that_is_not_merged_has_no_say():
    layer = several()
    before = snapshot(layer)
    layer.merge("second")  # default's lora_bias leaves the base bias as it is
    assert_same(layer.state_dict(), before)
    layer.forget_base()
    layer.load_state_dict({"weight": before["weight"]}, strict=False)
    assert_same(layer.state_dict(), before)


def test_costs_no_memory_and_follows_another_dtype():
    layer = several()
    layer.merge()
    first, second = layer.state_dict(), layer.state_dict()
    assert first["weight"].data_ptr() == second["weight"].data_ptr() != layer.weight.data_ptr()
    layer.float()
    assert {tensor.dtype for tensor in layer.state_dict().values()} == {torch.float32}
    expected = layer.state_dict()["weight"]
    layer.unmerge()
    assert torch.equal(layer.weight, expected)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("restorable", [True, False])
@pytest.mark.parametrize("base", BASES)
def test_loading_into_a_merged_layer_unmerges_it(base, restorable, assign):
    source, layer = several(base), several(base)
    source.merge()
    layer.merge(restorable=restorable)
    layer.load_state_dict(source.state_dict(), assign=assign)
    assert not layer.merged
    source.unmerge()
    assert_same(layer.state_dict(), source.state_dict())
    x = torch.randn(3, K, dtype=torch.float64)
    assert torch.equal(layer(x), source(x))


def test_loading_a_part_into_a_merged_layer_leaves_the_base_weight():
    layer = several()
    before = snapshot(layer)
    layer.merge()
    part = {"lora_B.default": torch.ones_like(before["lora_B.default"])}
    assert layer.load_state_dict(part, strict=False).missing_keys == [name for name in before if name not in part]
    assert not layer.merged
    assert_same(layer.state_dict(), {**before, **part})


def test_loading_elsewhere_leaves_a_layer_merged():
    model = nn.Sequential(several(), nn.Linear(N, 2).double())
    model[0].merge()
    model.load_state_dict({"1.bias": torch.ones(2)}, strict=False)
    model.load_state_dict({}, strict=False)
    assert model[0].merged


def test_what_was_not_kept_is_neither_saved_nor_half_replaced():
    model = nn.Sequential(several())
    before = snapshot(model)
    model[0].merge(restorable=False)
    merged = model[0].weight.clone()
    with pytest.raises(
        RuntimeError, match=r"0\.weight adapters \['default', 'second'\] are merged with restorable=Fal"
    ):
        model.state_dict()
    for name, text in (("0.weight", "no such key"), ("0.bias", "no such key"), ("0.lora_A.default", None)):
        part = {key: tensor for key, tensor in before.items() if key != name}
        if text is None:
            part["0.weight"], text = torch.ones(2, 2), r"shape \[2, 2\]"
        with pytest.raises(RuntimeError, match=rf"into 0\.\w+, which the state_dict must replace .* it has {text}"):
            model.load_state_dict(part, strict=False)
    assert model[0].merged
    assert torch.equal(model[0].weight, merged)


def test_merged_for_good_the_weight_is_saved_without_the_adapters():
    model, tokens = gpt2().eval(), ids()
    names = set(model.state_dict())
    pk.inject(model, pk.LoraConfig(target_modules="all-linear", r=2))
    pk.inject(model, pk.LoraConfig(target_modules=["c_attn"], r=3), "second")
    randomise(nn.ModuleList(layer.lora_B for _, layer in fused_layers(model)))
    pk.merge(model)
    with pytest.raises(RuntimeError, match="unmerge first"):
        pk.delete_adapter(model, "default")
    pk.unmerge(model)
    pk.merge(model, restorable=False)
    expected = outputs(model, tokens)
    pk.delete_adapter(model, "default")
    assert not any(layer.merged for _, layer in fused_layers(model))
    pk.delete_adapter(model, "second")
    assert set(model.state_dict()) == names
    plain = gpt2()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(outputs(plain, tokens), expected)


def test_of_several_merged_for_good_each_is_deleted_for_itself():
    layer = several()
    layer.merge(restorable=False)
    x = torch.randn(2, K, dtype=torch.float64)
    merged = layer(x)
    layer.delete_adapter("default")
    assert layer.merged_adapters == ["second"]
    assert torch.equal(layer(x), merged)
    layer.delete_adapter("second")
    assert not layer.merged
    assert torch.equal(layer(x), merged)
    layer.set_adapter("third")
    assert list(layer.state_dict()) == ["weight", "bias", "lora_A.third", "lora_B.third"]


@pytest.mark.parametrize(
    "twin_of", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["deepcopy", "pickle"]
)
def test_copies_of_a_merged_layer_unmerge_for_themselves(twin_of):
    layer = several()
    before = snapshot(layer)
    layer.merge()
    twin = twin_of(layer)
    x = torch.randn(3, K, dtype=torch.float64)
    assert torch.equal(twin(x), layer(x))
    assert_same(twin.state_dict(), before)
    twin.state_dict()["weight"].zero_()
    twin.unmerge()
    assert not twin.weight.any()
    layer.unmerge()
    assert_same(snapshot(layer), before)


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
@pytest.mark.parametrize("lora_bias", [False, True])
def test_a_merged_model_saves_as_the_model_it_was(bias, lora_bias, tmp_path):
    base, tokens = gpt2(), ids()
    config = pk.LoraConfig(target_modules="all-linear", r=2, lora_bias=lora_bias, bias=bias)
    model = pk.inject(copy.deepcopy(base), config)
    train_a_little(model)
    before, expected = snapshot(model), outputs(model, tokens)
    pk.save_adapter(model, tmp_path / "before")
    pk.merge(model)
    assert_same(model.state_dict(), before)
    fresh = pk.inject(copy.deepcopy(base), config)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(outputs(fresh, tokens), expected)
    pk.save_adapter(model, tmp_path / "merged")
    stored, plain = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("merged", "before"))
    assert_same(dict(sorted(stored.items())), dict(sorted(plain.items())))
    assert torch.equal(outputs(pk.load_adapter(copy.deepcopy(base), tmp_path / "merged"), tokens), expected)
    if not lora_bias:
        pk.unmerge(model)
        pk.merge(model, restorable=False)  # the biases are as they were
        pk.save_adapter(model, tmp_path / "for good")
        stored = load_file(tmp_path / "for good" / "adapter_model.safetensors")
        assert_same(dict(sorted(stored.items())), dict(sorted(plain.items())))


def test_a_tied_weight_of_a_merged_layer_is_saved_as_its_base():
    model = nn.ModuleDict({"embed": nn.Embedding(N, K), "head": nn.Linear(K, N, bias=False)}).double()
    model["head"].weight = model["embed"].weight
    pk.inject(model, pk.LoraConfig(target_modules=["head"], r=2))
    randomise(model)
    before = snapshot(model)
    model["head"].merge()
    assert torch.equal(model.state_dict()["head.weight"], before["head.weight"])
    assert torch.equal(model.state_dict()["embed.weight"], model["head"].weight)  # the other holder sees the merged one
    model["head"].unmerge()
    assert_same(model.state_dict(), before)


def _sharded(rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    layer = several()
    before = snapshot(layer)
    whole = copy.deepcopy(layer)
    whole.merge()
    fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    layer.merge()
    x = torch.randn(4, K, dtype=torch.float64)
    torch.testing.assert_close(layer(x), whole(x))
    assert_same({name: tensor.full_tensor() for name, tensor in layer.state_dict().items()}, before)
    shards = dict(layer.state_dict())
    layer.load_state_dict(shards)
    assert not layer.merged
    assert_same({name: tensor.full_tensor() for name, tensor in layer.state_dict().items()}, before)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this Torch is built without torch.distributed")
def test_sharded_by_fsdp(tmp_path):
    _on_two_ranks(_sharded, tmp_path)
