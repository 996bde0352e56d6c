"""What `disable_adapter` and its like leave behind: flags, graphs, copies, and nothing at all after an error."""

import copy
import pickle

import pytest
import torch
from bitfit_models import batch, bits, build, kinds, output, trained
from torch import nn

import peft_kernels as pk


@pytest.mark.parametrize("how", ["disabled", "merged"])
def test_a_bias_frozen_by_hand_stays_frozen(how):
    model = trained(build("mlp"))
    model[0].bias.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    if how == "disabled":
        with pk.disable_adapter(model):
            assert not any(p.requires_grad for p in model.parameters())
    else:
        pk.merge(model)
        assert not any(p.requires_grad for p in model.parameters())
        pk.unmerge(model)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags


CALLS = {
    "disable": lambda model: pk.disable_adapter(model).__enter__(),
    "delete": lambda model: pk.delete_adapter(model, "default"),
    "merge": pk.merge,
}
REPLACED = {
    "0": (lambda: nn.Linear(8, 20), "0 is a Linear; expected BiasLinear"),
    "1": (nn.Tanh, "1 is a Tanh; expected Identity"),
    "3": (lambda: nn.LayerNorm(8), "3 is a LayerNorm; expected FusedLayerNorm"),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", REPLACED)
def test_a_layer_replaced_since_is_named_and_nothing_changes(name, call):
    make, message = REPLACED[name]
    model = trained(build("mlp"))
    setattr(model, name, make().double())
    before = bits(model), kinds(model), [p.requires_grad for p in model.parameters()], repr(model)
    with pytest.raises(RuntimeError, match=message):
        CALLS[call](model)
    assert before == (bits(model), kinds(model), [p.requires_grad for p in model.parameters()], repr(model))
    pk.set_adapter(model, "default")


def test_an_activation_that_a_linear_lost_is_named():
    model = trained(build("mlp"))
    model[0].activation = None
    with pytest.raises(RuntimeError, match="0 does not compute gelu any more"):
        pk.delete_adapter(model, "default")


def test_hooks_on_the_place_of_the_activation_go_with_it():
    base = build("mlp")
    model, seen = trained(base), []
    x = batch("mlp")
    handle = model[1].register_forward_hook(lambda module, _, out: seen.append((type(module), out)))
    model(x)
    with pk.disable_adapter(model):
        model(x)
    model(x)
    assert [kind for kind, _ in seen] == [nn.Identity, nn.GELU, nn.Identity]
    torch.testing.assert_close(seen[1][1], base[1](base[0](x)))
    assert torch.equal(seen[0][1], seen[2][1]) and not torch.equal(seen[0][1], seen[1][1])
    pk.delete_adapter(model, "default")
    handle.remove()
    model(x)
    assert len(seen) == 3


def test_hooks_stay_with_their_place_where_parents_share_an_activation():
    act = nn.GELU()
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 8), act), nn.Sequential(nn.Linear(8, 8), act)).double()
    pk.inject(model, pk.BitFitConfig())
    seen, x = [], batch("mlp")
    second = model[1][1]
    handle = second.register_forward_hook(lambda module, _, out: seen.append(module))
    with pk.disable_adapter(model):
        model(x)
    seen.clear()
    model(x)
    assert seen == [second] and model[1][1] is second
    handle.remove()
    act.register_forward_hook(lambda module, _, out: seen.append("own"))
    second.register_forward_hook(lambda module, _, out: seen.append(module))
    seen.clear()
    with pk.disable_adapter(model):
        model(x)
    model(x)
    assert seen == ["own", "own", second]


def test_a_layer_replaced_while_merged_is_not_made_one_of_ours():
    model = trained(build("mlp"))
    pk.merge(model)
    model[3] = nn.Tanh()
    model[3].bias = nn.Parameter(torch.zeros(8, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="3 is a Tanh; expected LayerNorm"):
        pk.unmerge(model)
    assert type(model[0]) is nn.Linear and not model[0].bias.requires_grad


def test_biases_made_in_inference_mode_are_refused_before_a_change():
    with torch.inference_mode():
        model = build("mlp")
    before = kinds(model), set(vars(model)), [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match="0.bias was made under torch.inference_mode"):
        pk.inject(model, pk.BitFitConfig())
    assert before == (kinds(model), set(vars(model)), [p.requires_grad for p in model.parameters()])


class Gain(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain_bias = nn.Parameter(torch.ones(8))

    def forward(self, x):
        return x * self.gain_bias


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_graph_made_inside_never_meets_trained_values(steps):
    model = pk.inject(nn.Sequential(Gain()), pk.BitFitConfig())
    with torch.no_grad():
        model[0].gain_bias.fill_(7)
    x = torch.ones(8, requires_grad=True)
    before = model(x)
    with pk.disable_adapter(model):
        inside, twice = model(x), model(x)
        (grad,) = torch.autograd.grad(inside.sum(), x)
        assert torch.equal(grad, torch.ones(8))
    (grad,) = torch.autograd.grad(before.sum(), x)
    assert torch.equal(grad, torch.full((8,), 7.0))
    for _ in range(steps):
        with torch.no_grad():
            model[0].gain_bias += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        twice.sum().backward()


def test_a_graph_made_before_the_adapter_was_deleted_never_meets_the_originals():
    model = pk.inject(nn.Sequential(Gain()), pk.BitFitConfig())
    y = model(torch.ones(8, requires_grad=True))
    pk.delete_adapter(model, "default")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("call", ["delete", "set", "merge"])
def test_a_copy_made_inside_the_block_can_be_used(how, call):
    base, x = build("bert"), batch("bert")
    model = trained(base, task_type="SEQ_CLS")
    adapted, flags = output(model, x), [p.requires_grad for p in model.parameters()]
    with pk.disable_adapter(model):
        twin = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
        with pytest.raises(RuntimeError, match="the adapter is disabled"):
            pk.delete_adapter(model, "default")
    assert torch.equal(output(twin, x), output(base, x))
    if call == "delete":
        pk.delete_adapter(twin, "default")
        assert bits(twin) == bits(base) and repr(twin) == repr(base)
    elif call == "set":
        pk.set_adapter(twin, "default")
        assert torch.equal(output(twin, x), adapted) and [p.requires_grad for p in twin.parameters()] == flags
    else:
        pk.merge(twin)
        torch.testing.assert_close(output(twin, x), adapted)
    assert torch.equal(output(model, x), adapted)


def test_loading_over_an_adapter_keeps_what_chose_its_biases(tmp_path):
    base = build("bert")
    model = trained(base, target_terms=["query"], modules_to_save=["classifier"])
    names = [f"bert.encoder.layer.{i}.attention.self.query.bias" for i in (0, 1)]
    other = trained(base, target_terms=names, task_type="SEQ_CLS")
    pk.save_adapter(other, tmp_path / "first")
    pk.load_adapter(model, tmp_path / "first")
    pk.save_adapter(model, tmp_path / "second")
    config = model.peft_kernels_configs["default"]
    assert (config.target_terms, config.modules_to_save, config.task_type) == (["query"], ["classifier"], None)
    assert bits(pk.load_adapter(copy.deepcopy(base), tmp_path / "second")) == bits(model)
