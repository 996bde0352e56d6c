"""FusedLoRALinear as a module: what it shares and saves, merging, switching adapters, copies, and its errors."""

import copy
import pickle

import bounds
import pytest
import torch
from lora_layers import K, N, R, check_within, conv1d, make, randomise
from torch import nn

from peft_kernels import FusedLoRALinear


def saved_pointers(layer: nn.Module, x: torch.Tensor) -> set[int]:
    pointers = set()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: pointers.add(t.data_ptr()) or t, lambda t: t):
        layer(x)
    return pointers


@pytest.mark.parametrize("adapters", [1, 2])
def test_frozen_a_does_not_keep_x(adapters):
    layer = make()
    if adapters == 2:
        layer.add_adapter("second", r=3)
        layer.set_adapter(["default", "second"])
    x = torch.randn(8, K, dtype=torch.float64, requires_grad=True)
    assert x.data_ptr() in saved_pointers(layer, x)
    layer.lora_A.requires_grad_(False)
    assert x.data_ptr() not in saved_pointers(layer, x)
    layer(x).sum().backward()
    assert layer.lora_A["default"].grad is None
    assert layer.lora_B["default"].grad is not None


def test_shares_the_parameters_of_the_wrapped_layer():
    linear = nn.Linear(K, N)
    layer = FusedLoRALinear.from_linear(linear, r=100)
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert not linear.weight.requires_grad
    assert (layer.in_features, layer.out_features) == (K, N)
    assert set(layer.state_dict()) == {"weight", "bias", "lora_A.default", "lora_B.default"}
    x = torch.randn(2, K)
    assert torch.equal(layer(x), linear(x))  # B is zero at the start


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("base", ["linear", "conv1d"])
def test_merge_rounds_once_and_unmerge_restores_every_bit(base, dtype):
    layer = make(nn.Linear(K, N) if base == "linear" else conv1d(), dtype, lora_bias=True)
    layer.add_adapter("second", r=2, lora_bias=True)
    randomise(layer)
    layer.set_adapter(["default", "second"])
    before = {name: bits(parameter) for name, parameter in layer.named_parameters()}
    truth, terms = layer.weight.double(), layer.weight.double().abs()
    bias, bias_terms = layer.bias.double(), layer.bias.double().abs()
    for name, scaling in (("default", 8 / R), ("second", 4.0)):
        lora_a, lora_b = layer.lora_A[name].double(), layer.lora_B[name].double() * scaling
        delta, absolute = lora_b @ lora_a, lora_b.abs() @ lora_a.abs()
        truth = truth + (delta.t() if base == "conv1d" else delta)
        terms = terms + (absolute.t() if base == "conv1d" else absolute)
        bias = bias + layer.lora_bias[name].double() * scaling
        bias_terms = bias_terms + layer.lora_bias[name].double().abs() * scaling
    layer.merge()
    assert layer.merged_adapters == ["default", "second"]
    u, eps = bounds.unit_roundoff(dtype), torch.finfo(bounds.accumulator(dtype)).eps
    bounds.assert_within(layer.weight, truth, u * truth.abs() + 2 * (R + 8) * eps * terms, "weight")
    bounds.assert_within(layer.bias, bias, u * bias.abs() + 8 * eps * bias_terms, "bias")
    x = torch.randn(3, K, dtype=dtype)
    weight = layer.weight.t() if base == "conv1d" else layer.weight
    assert torch.equal(layer(x), nn.functional.linear(x, weight, layer.bias))
    layer.unmerge()
    for name, parameter in layer.named_parameters():
        assert torch.equal(bits(parameter), before[name]), name
    assert not layer.merged


def test_merged_computes_what_unmerged_does():
    layer = make()
    x = torch.randn(4, K, dtype=torch.float64)
    truth = bounds.forward(x, layer.weight, layer.lora_A["default"], layer.lora_B["default"], layer.bias, None, 8 / R)
    layer.merge(safe_merge=True)
    check_within({"y": layer(x)}, truth)


def test_merge_errors_leave_the_layer_as_it_was():
    layer = make(nn.Linear(K, N, bias=False), lora_bias=True)
    with pytest.raises(RuntimeError, match="no bias"):
        layer.merge()
    layer = make()
    weight = bits(layer.weight)
    with torch.no_grad():
        layer.lora_A["default"][0, 0] = torch.inf
    with pytest.raises(ValueError, match="not finite"):
        layer.merge(safe_merge=True)
    assert torch.equal(bits(layer.weight), weight)
    with pytest.raises(RuntimeError, match="no adapter is merged"):
        layer.unmerge()
    randomise(layer)
    layer.merge(restorable=False)
    for call in (layer.merge, lambda: layer.set_adapter([]), layer.disable_adapters):
        with pytest.raises(RuntimeError, match="unmerge first"):
            call()
    with pytest.raises(RuntimeError, match="was not kept"):
        layer.unmerge()


def test_switching_disabling_scaling_and_deleting_adapters():
    layer = make()
    layer.add_adapter("second", r=2, init_lora_weights=False)
    x = torch.randn(3, K, dtype=torch.float64)
    base, first = nn.functional.linear(x, layer.weight, layer.bias), layer(x)
    assert layer.active_adapters == ["default"]
    assert not layer.lora_A["second"].requires_grad
    layer.set_adapter("second")
    second = layer(x)
    assert not torch.equal(first, second)
    assert layer.lora_A["second"].requires_grad
    assert not layer.lora_A["default"].requires_grad
    layer.set_scale("second", 0.0)
    assert torch.equal(layer(x), base)
    layer.set_scale("second", 1.0)
    assert torch.equal(layer(x), second)
    layer.disable_adapters()
    assert torch.equal(layer(x), base)
    layer.disable_adapters(False)
    layer.delete_adapter("second")
    assert torch.equal(layer(x), base)
    layer.set_adapter("default", inference_mode=True)
    assert torch.equal(layer(x), first)
    assert not layer.lora_B["default"].requires_grad


def test_copies_and_pickles_are_independent_and_equal():
    layer = make(lora_dropout=0.1).eval()
    layer.merge()
    layer.unmerge()
    x = torch.randn(3, K, dtype=torch.float64)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))
        randomise(twin)
        assert not torch.equal(twin(x), layer(x))
    assert "default(r=5, lora_alpha=8, dropout=0.1, active)" in repr(layer)


def test_moves_to_another_dtype_and_resets():
    layer = make(init_lora_weights=True).to(torch.float32)
    assert layer(torch.randn(2, K)).dtype == torch.float32
    weight, old = bits(layer.weight), layer.lora_A["default"].clone()
    layer.reset_parameters()
    assert torch.equal(bits(layer.weight), weight)
    assert not layer.lora_B["default"].any()
    assert not torch.equal(layer.lora_A["default"], old)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "r is 0"),
        ({"r": 2.0}, "r is 2.0"),
        ({"lora_dropout": 1.0}, "lora_dropout is 1.0"),
        ({"lora_dropout": -0.1}, "lora_dropout is -0.1"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"init_lora_weights": "pissa"}, "'pissa'; supported: True"),
        ({"adapter_dtype": torch.int8}, "adapter_dtype is torch.int8"),
        ({"adapter_name": "a.b"}, "without '.'"),
        ({"adapter_name": "keys"}, "is taken"),
    ],
    ids=str,
)
def test_bad_settings_name_the_argument(settings, message):
    linear = nn.Linear(K, N)
    with pytest.raises(ValueError, match=message):
        FusedLoRALinear.from_linear(linear, **settings)
    assert linear.weight.requires_grad


def test_bad_calls_name_the_argument():
    layer = make()
    with pytest.raises(ValueError, match="x is torch.int64"):
        layer(torch.ones(2, K, dtype=torch.int64))
    with pytest.raises(ValueError, match="already on this layer"):
        layer.add_adapter("default")
    for call in (layer.set_adapter, layer.delete_adapter, lambda name: layer.set_scale(name, 2.0)):
        with pytest.raises(ValueError, match="no adapter .*other.*there are"):
            call("other")


def one_rank() -> nn.Module:
    linear = nn.Linear(K, N)
    linear.weight = nn.Parameter(linear.weight.detach().flatten()[: K * N // 2])
    return linear


class Own(nn.Linear):
    def forward(self, x):
        return super().forward(x)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: nn.Conv2d(2, 2, 1), "neither nn.Linear"),
        (lambda: Own(K, N), "Own has a forward of its own"),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(K, N)), "computed at each call"),
        (lambda: nn.LazyLinear(N), "no shape yet"),
        (lambda: nn.Linear(K, N).to(torch.float8_e4m3fn), "float8_e4m3fn"),
        (one_rank, "is one rank's part"),
    ],
    ids=["conv", "own forward", "weight_norm", "lazy", "fp8", "part"],
)
def test_layers_that_cannot_be_wrapped_say_why(build, message):
    with pytest.raises(ValueError, match=message):
        FusedLoRALinear.from_linear(build())


@pytest.mark.parametrize("restorable", [True, False])
def test_loads_keys_that_a_hook_renames(restorable):
    layer, ran = make(), []

    def rename(state, prefix, *_):
        ran.append(prefix)
        for key in [key for key in state if key.startswith("base.")]:
            state[key.removeprefix("base.")] = state.pop(key)

    layer._register_load_state_dict_pre_hook(rename)
    state = {
        key if key.startswith("lora") else f"base.{key}": value.clone() for key, value in layer.state_dict().items()
    }
    layer.merge(restorable=restorable)
    layer.load_state_dict(dict(state))
    assert not layer.merged and ran == [""], "once"
    assert torch.equal(layer.state_dict()["weight"], state["base.weight"])
    layer.load_state_dict(state)
    assert ran == ["", ""], "the hook is still there"
