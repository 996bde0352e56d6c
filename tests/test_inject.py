"""inject, coverage, merge, and switching adapters, on whole models."""

import copy

import pytest
import torch
from lora_layers import randomise
from tiny_models import gpt2, ids, llama
from torch import nn

import peft_kernels as pk
from peft_kernels.methods.adapters import fused_layers
from peft_kernels.methods.lora_config import LoraConfig


@pytest.mark.parametrize("build", [llama, gpt2])
def test_fresh_adapters_change_nothing_and_all_of_them_get_gradients(build):
    model, tokens = build().eval(), ids()
    before = model(tokens).logits
    pk.inject(model, LoraConfig(target_modules="all-linear", r=3))
    assert not model.training
    assert not any(layer.training for _, layer in fused_layers(model))
    torch.testing.assert_close(model(tokens).logits, before)  # to rounding: another GEMM may make the base product
    randomise(nn.ModuleList(layer.lora_B for _, layer in fused_layers(model)))
    after = model(tokens, labels=tokens)
    assert not torch.allclose(after.logits, before)
    after.loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) == ("lora_" in name), name
    with pk.disable_adapter(model):
        assert torch.equal(model(tokens).logits, before)
    assert torch.equal(model(tokens).logits, after.logits)


def test_modules_to_save_train_a_copy_and_leave_the_original():
    model, tokens = llama(), ids()
    head = model.lm_head
    before = model(tokens).logits
    pk.inject(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    assert model.lm_head.original is head
    assert model.lm_head.weight is model.lm_head.copies["default"].weight
    assert model.lm_head.out_features == 40
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert not model(tokens).logits.any()
    with pk.disable_adapter(model):
        assert torch.equal(model(tokens).logits, before)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(tokens).logits, model(tokens).logits)
    model(tokens, labels=tokens).loss.backward()
    assert head.weight.grad is None
    assert model.lm_head.weight.grad is not None


def test_a_second_adapter_waits_until_it_is_chosen():
    model, tokens = llama().eval(), ids()
    pk.inject(model, LoraConfig(target_modules=["q_proj"], r=2))
    pk.inject(model, LoraConfig(target_modules=["q_proj", "up_proj"], r=3), "second")
    trained = {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"default"}
    randomise(nn.ModuleList(layer.lora_B for _, layer in fused_layers(model)))
    first = model(tokens).logits
    assert not any(p.requires_grad for n, p in model.named_parameters() if n.endswith("second"))
    pk.set_adapter(model, ["default", "second"])
    both = model(tokens).logits
    pk.set_adapter(model, "second")
    second = model(tokens).logits
    assert not torch.allclose(first, both)
    assert not torch.allclose(second, both)
    assert {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad} == {"second"}
    pk.delete_adapter(model, "second")
    pk.set_adapter(model, "default")
    assert torch.equal(model(tokens).logits, first)
    with pytest.raises(ValueError, match=r"no adapter \['second'\].*\['default'\]"):
        pk.set_adapter(model, "second")


def test_a_module_shared_at_two_places_is_replaced_at_both():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    pk.inject(model, LoraConfig(target_modules=["2"], r=2))
    assert isinstance(model[0], pk.FusedLoRALinear)
    assert model[0] is model[2]
    assert len(pk.coverage(model)) == 1


def attention() -> nn.Module:
    return nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2), "out": nn.Linear(8, 8)})


def encoder() -> nn.Module:
    return nn.ModuleDict({"layer": nn.TransformerEncoderLayer(8, 2, 8), "out": nn.Linear(8, 8)})


def test_layers_that_a_parent_bypasses_are_refused_or_left_out_with_the_reason():
    with pytest.raises(ValueError, match=r"attn\.out_proj: nn\.MultiheadAttention reads its weight"):
        pk.inject(attention(), LoraConfig(target_modules=["out_proj"]))
    with pytest.raises(ValueError, match=r"layer\.linear1: nn\.TransformerEncoderLayer reads its weight"):
        pk.inject(encoder(), LoraConfig(target_modules=["linear1"]))
    model = pk.inject(attention(), LoraConfig(target_modules="all-linear", r=2))
    assert [name for name, _ in fused_layers(model)] == ["out"]
    rows = {row.module: row for row in pk.coverage(model)}
    assert rows["attn.out_proj"].kernel == "torch"
    assert "MultiheadAttention" in rows["attn.out_proj"].reason
    assert rows["out"].kernel in ("native", "triton", "reference")


def test_coverage_names_the_kernel_or_the_reason():
    model = llama()
    assert {row.reason for row in pk.coverage(model)} == {"no adapter injected"}
    config = LoraConfig(target_modules="all-linear", r=2, exclude_modules=["down_proj"])
    pk.inject(model, config)
    reasons = {row.module: row.reason for row in pk.coverage(model) if row.kernel == "torch"}
    assert reasons.pop("lm_head") == "output head, which all-linear leaves out"
    assert set(reasons.values()) == {"excluded by exclude_modules"}
    assert len(reasons) == 3
    text = str(pk.coverage(model))
    assert "model.layers.*.self_attn.q_proj" in text
    assert "18 of 22 linear layers run lora_linear" in text
    with pk.disable_adapter(model):
        assert "0 of 22" in str(pk.coverage(model))
    pk.inject(model, LoraConfig(target_modules=["q_proj"], r=2, lora_dropout=0.5), "second")
    pk.set_adapter(model, ["default", "second"])
    assert "2 calls: each adapter with dropout draws its own mask" in str(pk.coverage(model.train()))
    assert "2 calls" not in str(pk.coverage(model.eval()))


def test_merge_and_unmerge_a_model():
    model, tokens = gpt2().double().eval(), ids()
    pk.inject(model, LoraConfig(target_modules="all-linear", r=2))
    randomise(nn.ModuleList(layer.lora_B for _, layer in fused_layers(model)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    logits = model(tokens).logits
    single = copy.deepcopy(model).float()(tokens).logits
    pk.merge(model, safe_merge=True)
    assert "0 of 9" in str(pk.coverage(model))
    # Another order of the same sums in fp64: nearer than the same order in fp32.
    assert (model(tokens).logits - logits).abs().max() < (single - logits).abs().max()
    with pytest.raises(RuntimeError, match="unmerge first"):
        pk.merge(model)
    with pytest.raises(RuntimeError, match="unmerge first"), pk.disable_adapter(model):
        pass
    pk.unmerge(model)
    assert torch.equal(model(tokens).logits, logits)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_merge_is_all_layers_or_none():
    model = gpt2()
    pk.inject(model, LoraConfig(target_modules="all-linear", r=2))
    with torch.no_grad():
        fused_layers(model)[-1][1].lora_B["default"].fill_(torch.nan)
    before = {name: value.clone() for name, value in model.state_dict().items() if "lora_" not in name}
    with pytest.raises(ValueError, match=r"transformer\.h\.1\.mlp\.c_proj: the weight merged .* is not finite"):
        pk.merge(model, safe_merge=True, restorable=False)
    for name, value in before.items():
        assert torch.equal(model.state_dict()[name], value), name
    assert not any(layer.merged for _, layer in fused_layers(model))


def test_merge_refuses_a_tied_weight():
    model = pk.inject(llama(tie_word_embeddings=True), LoraConfig(target_modules=["lm_head"], r=2))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with pytest.raises(ValueError, match=r"of lm_head is shared with model\.embed_tokens"):
        pk.merge(model)


def test_merge_names_the_layers_that_share_a_weight():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[2].weight = model[1].weight
    pk.inject(model, LoraConfig(target_modules="all-linear", r=2))
    with pytest.raises(ValueError, match="of 1 is shared with 2,"):
        pk.merge(model)


def test_merge_on_the_meta_device_sees_no_ties_where_there_are_none():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4)).to("meta")
    pk.inject(model, LoraConfig(target_modules=["0", "1"], r=2))
    pk.merge(model, restorable=False)
    assert model[0].merged
    assert model[1].merged
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).to("meta")
    model[1].bias = model[0].bias
    pk.inject(model, LoraConfig(target_modules="all-linear", r=2))
    with pytest.raises(ValueError, match="of 0 is shared with 1,"):
        pk.merge(model, restorable=False)


def test_a_name_may_come_alone_but_not_twice():
    model = pk.inject(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"], r=2))
    for owner in (model, model[0]):
        merge, choose = (
            (owner.merge, owner.set_adapter)
            if owner is model[0]
            else (lambda names: pk.merge(model, names), lambda names: pk.set_adapter(model, names))
        )
        for call in (merge, choose):
            with pytest.raises(ValueError, match=r"\['default'\] are named more than once"):
                call(["default", "default"])
        merge("default")
        assert model[0].merged_adapters == ["default"]
        model[0].unmerge()


def test_inject_refuses_a_taken_name_merged_layers_and_a_second_bias():
    model = pk.inject(gpt2(), LoraConfig(target_modules=["c_attn"]))
    with pytest.raises(ValueError, match="'default' is already in this model"):
        pk.inject(model, LoraConfig(target_modules=["c_fc"]))
    with pytest.raises(ValueError, match="must be the only adapter"):
        pk.inject(model, LoraConfig(target_modules=["c_fc"], bias="all"), "second")
    pk.merge(model)
    with pytest.raises(RuntimeError, match="unmerge first"):
        pk.inject(model, LoraConfig(target_modules=["c_fc"]), "second")
    assert len(fused_layers(model)) == 2


def test_inject_refuses_a_model_that_peft_wrapped():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"is HF PEFT's LoraModel|is HF PEFT's Linear"):
        pk.inject(model, LoraConfig(target_modules=["q_proj"]))
