"""BitFit's biases as an adapter: switched off, taken out and merged, each bit for bit."""

import copy
import pickle

import pytest
import torch
from bitfit_models import BUILD, batch, bits, build, gradients, kinds, mlp, output, trained
from torch import nn

import peft_kernels as pk
from peft_kernels.methods.bias_adapter import bias_adapter

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("name", BUILD)
def test_disabled_is_the_base_model_to_the_bit_and_back(name, dtype, device):
    base, x = build(name).to(device, dtype), batch(name)
    model = trained(base)
    adapted, values = output(model, x), bits(model)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    with pk.disable_adapter(model):
        assert torch.equal(output(model, x), output(base, x))
        assert bits(model) == bits(base) and kinds(model) == kinds(base)
        assert not any(p.requires_grad for p in model.parameters())
        with pk.disable_adapter(model):
            assert torch.equal(output(model, x), output(base, x))
        assert bits(model) == bits(base)
    assert torch.equal(output(model, x), adapted) and not torch.equal(output(base, x), adapted)
    assert bits(model) == values
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags


def test_disabled_after_an_error_in_the_block_too():
    model = trained(build("mlp"))
    values = bits(model)
    with pytest.raises(KeyError), pk.disable_adapter(model):
        raise KeyError
    assert bits(model) == values and type(model[0]) is pk.BiasLinear


@pytest.mark.parametrize("name", ["bert", "block", "own norm"])
def test_a_reference_pass_between_forward_and_backward(name):
    """As in DPO: the policy's graph is made first, the reference runs with the adapter off, then backward.

    Torch's LayerNorm, which a subclass of it stays, saves its bias for a backward that does not use it.
    """
    model, x = trained(build(name)), batch(name)
    expected = gradients(model, x)
    model.zero_grad()
    y = output(model, x)
    with torch.no_grad(), pk.disable_adapter(model):
        output(model, x)
    (y * torch.cos(torch.arange(float(y.numel()))).view(y.shape).to(y)).sum().backward()
    for n, parameter in model.named_parameters():
        assert parameter.grad is None if n not in expected else torch.equal(parameter.grad, expected[n]), n


@pytest.mark.parametrize("name", BUILD)
def test_deleted_is_the_base_model(name):
    base, x = build(name), batch(name)
    model = trained(base, modules_to_save=["classifier"] if name == "bert" else None)
    pk.delete_adapter(model, "default")
    assert bits(model) == bits(base) and repr(model) == repr(base) and kinds(model) == kinds(base)
    assert torch.equal(output(model, x), output(base, x))
    assert not any(p.requires_grad for p in model.parameters())
    assert vars(model).keys() - vars(base).keys() == {"peft_kernels_configs"}
    again = pk.inject(model, pk.BitFitConfig())
    assert torch.equal(output(again, x), output(pk.inject(copy.deepcopy(base), pk.BitFitConfig()), x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merged_biases_are_the_models_own_and_unmerge_makes_them_an_adapter_again(dtype):
    base, x = build("gpt2").to(dtype), batch("gpt2")
    model = trained(base)
    values, adapted = bits(model), output(model, x)
    pk.merge(model, safe_merge=True)
    assert bits(model) == values and kinds(model) == kinds(base)
    assert not any(p.requires_grad for p in model.parameters())
    plain = copy.deepcopy(base)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(output(model, x), output(plain, x))
    for call in (pk.merge, lambda m: pk.set_adapter(m, "default"), lambda m: pk.delete_adapter(m, "default")):
        with pytest.raises(RuntimeError, match="merged, unmerge first"):
            call(model)
    with pytest.raises(RuntimeError, match="unmerge first"), pk.disable_adapter(model):
        pass
    pk.unmerge(model)
    assert bits(model) == values and torch.equal(output(model, x), adapted)
    assert pk.trainable_parameters(model) == pk.trainable_parameters(trained(base))
    pk.delete_adapter(model, "default")
    assert bits(model) == bits(base)
    with pytest.raises(ValueError, match="has no FusedLoRALinear: inject adapters first"):
        pk.unmerge(model)


def test_merged_for_good():
    base = build("bert")
    model = trained(base)
    values = bits(model)
    pk.merge(model, "default", restorable=False)
    with pytest.raises(RuntimeError, match="merged with restorable=False"):
        pk.unmerge(model)
    pk.delete_adapter(model, "default")
    assert bits(model) == values and kinds(model) == kinds(base) and bias_adapter(model) is None
    pk.inject(model, pk.LoraConfig(target_modules=["query"]))


def test_merge_refuses_what_is_not_finite_and_does_nothing_for_no_adapter():
    model = trained(build("mlp"))
    pk.merge(model, [])
    with pytest.raises(RuntimeError, match="no adapter is merged"):
        pk.unmerge(model)
    with torch.no_grad():
        model[2].bias[3] = torch.inf
    with pytest.raises(ValueError, match=r"biases \['2.bias'\] are not finite"):
        pk.merge(model, safe_merge=True)
    assert type(model[2]) is pk.BiasLinear and model[2].bias.requires_grad


def test_set_adapter_and_its_errors():
    model = pk.inject(build("mlp"), pk.BitFitConfig(inference_mode=True))
    assert pk.trainable_parameters(model).trainable == 0
    pk.set_adapter(model, "default")
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {"0.bias", "2.bias", "3.bias"}
    pk.set_adapter(model, ["default"], inference_mode=True)
    assert pk.trainable_parameters(model).trainable == 0
    with pytest.raises(ValueError, match=r"no adapter \['other'\] in this model; there are \['default'\]"):
        pk.set_adapter(model, "other")
    with pytest.raises(ValueError, match="names is empty"):
        pk.set_adapter(model, [])
    with pk.disable_adapter(model):
        for call in (pk.set_adapter, pk.delete_adapter, pk.merge):
            with pytest.raises(RuntimeError, match="the adapter is disabled"):
                call(model, "default")


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_of_the_model_has_an_adapter_of_its_own(how):
    base, x = build("bert"), batch("bert")
    model = trained(base, task_type="SEQ_CLS")
    twin = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    adapted = output(model, x)
    pk.delete_adapter(twin, "default")
    assert bits(twin) == bits(base) and torch.equal(output(model, x), adapted)


def test_state_dicts_have_the_base_models_names_and_round_trip():
    base, x = build("gpt2"), batch("gpt2")
    model = trained(base)
    assert model.state_dict().keys() == base.state_dict().keys()
    other = pk.inject(copy.deepcopy(base), pk.BitFitConfig())
    other.load_state_dict(model.state_dict())
    assert torch.equal(output(other, x), output(model, x))
    base.load_state_dict(model.state_dict())
    assert bits(base) == bits(model)


def test_a_bias_replaced_since_is_named_before_anything_changes():
    model = trained(build("mlp"))
    values = bits(model)
    model[2].bias = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    values["2.bias"] = bits(model)["2.bias"]
    for call in (lambda: pk.disable_adapter(model).__enter__(), lambda: pk.delete_adapter(model, "default")):
        with pytest.raises(RuntimeError, match=r"2.bias has shape \[3\]; it was \[8\]"):
            call()
        assert bits(model) == values
    del model[2]
    with pytest.raises(RuntimeError, match="is not in the model any more"):
        pk.merge(model)


def test_on_the_meta_device():
    model = pk.inject(mlp().to("meta"), pk.BitFitConfig())
    assert model(torch.ones(3, 8, device="meta")).shape == (3, 8)
    with pk.disable_adapter(model):
        assert type(model[0]) is nn.Linear
    model.to_empty(device="cpu")
    with pytest.raises(RuntimeError, match="BitFit was injected while they had no values"):
        pk.delete_adapter(model, "default")
    pk.merge(model)
    pk.unmerge(model)
    assert all(bias.requires_grad for name, bias in model.named_parameters() if "bias" in name)
    pk.merge(model, restorable=False)
    pk.delete_adapter(model, "default")
