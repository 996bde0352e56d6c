"""FusedLoRALinear's maths: against fp64 truth, HF PEFT's own layer, dropout, autocast, checkpointing, compiling."""

import copy

import bounds
import pytest
import torch
from lora_layers import K, N, R, check_within, conv1d, make, randomise
from torch import nn
from torch.utils.checkpoint import checkpoint

from peft_kernels import FusedLoRALinear


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("base", ["linear", "no_bias", "conv1d"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_forward_and_gradients_within_bounds(dtype, base, use_rslora):
    linear = {"linear": lambda: nn.Linear(K, N), "no_bias": lambda: nn.Linear(K, N, bias=False), "conv1d": conv1d}
    layer = make(linear[base](), dtype, use_rslora=use_rslora)
    lora_a, lora_b = layer.lora_A["default"], layer.lora_B["default"]
    assert lora_a.dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)
    x = torch.randn(3, 7, K, dtype=dtype, requires_grad=True)
    y = layer(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    weight = layer.weight.t() if base == "conv1d" else layer.weight
    scaling = 8 / (R**0.5 if use_rslora else R)
    flat = x.detach().reshape(-1, K)
    check_within({"y": y.reshape(-1, N)}, bounds.forward(flat, weight, lora_a, lora_b, layer.bias, None, scaling))
    truth = bounds.backward(dy.reshape(-1, N), flat, weight, lora_a, lora_b, None, None, scaling)
    check_within({"dx": x.grad.reshape(-1, K), "dlora_a": lora_a.grad, "dlora_b": lora_b.grad}, truth)
    assert layer.weight.grad is None
    assert layer.bias is None or layer.bias.grad is None


def test_base_bias_trains_when_it_requires_grad():
    layer = make()
    layer.bias.requires_grad_(True)
    x, dy = torch.randn(6, K, dtype=torch.float64), torch.randn(6, N, dtype=torch.float64)
    layer(x).backward(dy)
    truth = bounds.backward(dy, x, layer.weight, layer.lora_A["default"], layer.lora_B["default"], None, None, 8 / R)
    check_within({"dbias": layer.bias.grad}, truth)


def test_the_input_may_be_named_as_nn_linear_names_it():
    layer = make()
    x = torch.randn(6, K, dtype=torch.float64)
    assert torch.equal(layer(input=x), layer(x))


def peft_twin(linear: nn.Module, adapters: dict[str, dict], active: list[str]) -> nn.Module:
    """HF PEFT's own layer around a copy of `linear`, built as its model class does."""
    peft = pytest.importorskip("peft")
    box = nn.Sequential(copy.deepcopy(linear))
    names = iter(adapters.items())
    name, settings = next(names)
    model = peft.get_peft_model(box, peft.LoraConfig(target_modules=["0"], **settings), adapter_name=name)
    for name, settings in names:
        model.add_adapter(name, peft.LoraConfig(target_modules=["0"], **settings))
    layer = model.base_model.model[0]
    layer.set_adapter(active)
    return layer


def copy_adapters(source: FusedLoRALinear, target: nn.Module) -> None:
    with torch.no_grad():
        for name in source.specs:
            target.lora_A[name].weight.copy_(source.lora_A[name])
            target.lora_B[name].weight.copy_(source.lora_B[name])
            if name in source.lora_bias:
                target.lora_B[name].bias.copy_(source.lora_bias[name])


def gradients(layer: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> dict[str, torch.Tensor]:
    """y, dx and the gradient of every adapter parameter, under our names for them."""
    x = x.clone().requires_grad_(True)
    layer.zero_grad()
    y = layer(x)
    y.backward(dy)
    found = {"y": y.detach(), "dx": x.grad}
    for name, parameter in layer.named_parameters():
        if parameter.grad is not None:
            name = name.replace(".weight", "").replace("base_layer.", "")
            if name.startswith("lora_B") and name.endswith(".bias"):
                name = name.replace("lora_B", "lora_bias").removesuffix(".bias")
            found[name] = parameter.grad.clone()
    return found


def magnitudes(layer: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> dict[str, torch.Tensor]:
    """Sum of the absolute terms behind every value of `gradients`: the same layer on absolute values."""
    absolute = copy.deepcopy(layer)
    with torch.no_grad():
        for parameter in absolute.parameters():
            parameter.abs_()
    return gradients(absolute, x.abs(), dy.abs())


CASES = {
    "plain": ["default"],
    "rslora": ["default"],
    "lora_bias": ["default"],
    "two": ["default", "second"],
    "two_of_three": ["third", "default"],
}


@pytest.mark.parametrize("base", ["linear", "no_bias", "conv1d"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out", "ignore:`lora_bias")
def test_equals_the_peft_layer(case, base):
    linear = {"linear": lambda: nn.Linear(K, N), "no_bias": lambda: nn.Linear(K, N, bias=False), "conv1d": conv1d}
    linear = linear[base]().double()
    first = {"r": R, "lora_alpha": 7, "use_rslora": case == "rslora", "lora_bias": case == "lora_bias"}
    adapters = {
        "default": first,
        "second": {"r": 2, "lora_alpha": 3, "lora_bias": True},
        "third": {"r": 1, "lora_alpha": 2},
    }
    twin = peft_twin(linear, adapters, CASES[case])
    layer = FusedLoRALinear.from_linear(linear, **first)
    for name in ("second", "third"):
        layer.add_adapter(name, **adapters[name])
    layer.set_adapter(CASES[case])
    randomise(layer)
    copy_adapters(layer, twin)
    with torch.no_grad():
        for name in ("weight", "bias"):
            if getattr(linear, name) is not None:
                getattr(twin.base_layer, name).copy_(getattr(layer, name))
    x, dy = torch.randn(2, 3, K, dtype=torch.float64), torch.randn(2, 3, N, dtype=torch.float64)
    ours, theirs, scale = gradients(layer, x, dy), gradients(twin, x, dy), magnitudes(twin, x, dy)
    assert ours.keys() == theirs.keys()
    assert len(ours) == 2 + sum(3 if layer.specs[name].lora_bias else 2 for name in CASES[case])
    # Each side is a sum of products of sums: at most these many roundings on the way to any value, on both sides.
    roundings = 2 * (x.shape[0] * x.shape[1] + K + N + sum(spec.r for spec in layer.specs.values()) + 8)
    for name in theirs:
        bounds.assert_within(ours[name], theirs[name], roundings * torch.finfo(torch.float64).eps * scale[name], name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "settings",
    [{}, {"init_lora_weights": "gaussian"}, {"init_lora_weights": False, "lora_bias": True}, {"lora_bias": True}],
    ids=str,
)
def test_one_seed_gives_the_adapters_that_peft_draws(settings, dtype):
    linear = nn.Linear(K, N, dtype=dtype)
    torch.manual_seed(3)
    twin = peft_twin(linear, {"default": {"r": R, **settings}}, ["default"])
    torch.manual_seed(3)
    layer = FusedLoRALinear.from_linear(linear, r=R, **settings)
    pairs = [(layer.lora_A["default"], twin.lora_A["default"].weight)]
    pairs += [(layer.lora_B["default"], twin.lora_B["default"].weight)]
    if "default" in layer.lora_bias:
        pairs += [(layer.lora_bias["default"], twin.lora_B["default"].bias)]
    for ours, theirs in pairs:
        assert ours.dtype == theirs.dtype == torch.float32
        assert torch.equal(ours, theirs)


def dropping(p: float, **settings) -> FusedLoRALinear:
    """Base 0, A = B = 1: the output is dropout(x) times the scaling."""
    layer = FusedLoRALinear.from_linear(nn.Linear(64, 64, dtype=torch.float64), r=64, lora_alpha=64, lora_dropout=p)
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.zero_()
        for name in layer.specs:
            layer.lora_A[name].copy_(torch.eye(64))
            layer.lora_B[name].copy_(torch.eye(64))
    return layer


def test_dropout_is_on_the_low_rank_branch_and_in_its_gradient():
    layer = dropping(0.25)
    x = torch.ones(32, 64, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    kept = y != 0
    assert torch.equal(kept, x.grad != 0)
    assert torch.equal(y[kept], torch.full_like(y[kept], 4 / 3))
    # 2048 draws: the share kept is within 6 standard deviations of 3/4.
    assert abs(kept.double().mean() - 0.75) < 6 * (0.25 * 0.75 / 2048) ** 0.5
    assert not torch.equal(kept, layer(x) != 0)
    assert torch.equal(layer.eval()(x), x)


def test_each_adapter_with_dropout_draws_its_own_mask():
    layer = dropping(0.5)
    layer.add_adapter("second", r=64, lora_alpha=128, lora_dropout=0.5)
    layer.set_adapter(["default", "second"])
    with torch.no_grad():
        for store in (layer.lora_A, layer.lora_B):
            store["second"].copy_(torch.eye(64))
    x = torch.ones(32, 64, dtype=torch.float64)
    assert set(layer(x).unique().tolist()) == {0.0, 2.0, 4.0, 6.0}
    assert torch.equal(layer.eval()(x), 3 * x)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_repeats_the_dropout_mask(use_reentrant):
    layer = make(lora_dropout=0.3)
    x, dy = torch.randn(9, K, dtype=torch.float64), torch.randn(9, N, dtype=torch.float64)
    torch.manual_seed(5)
    plain = gradients(layer, x, dy)
    x = x.clone().requires_grad_(True)
    layer.zero_grad()
    torch.manual_seed(5)
    checkpoint(layer, x, use_reentrant=use_reentrant).backward(dy)
    assert torch.equal(x.grad, plain["dx"])
    for name, parameter in layer.named_parameters():
        assert parameter.grad is None or torch.equal(parameter.grad, plain[name])


def test_autocast_computes_as_the_16_bit_layer_and_keeps_fp32_gradients():
    layer = make(dtype=torch.float32)
    x = torch.randn(6, K)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    lora_a, lora_b = layer.lora_A["default"], layer.lora_B["default"]
    truth = bounds.forward(x.bfloat16(), layer.weight, lora_a, lora_b, layer.bias, None, 8 / R)
    check_within({"y": y}, truth)
    y.sum().backward()
    assert lora_a.grad.dtype == lora_b.grad.dtype == torch.float32


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_compiles_as_one_graph(dropout):
    layer = make(lora_dropout=dropout)
    layer.add_adapter("second", r=3, lora_bias=True, init_lora_weights=False)
    layer.set_adapter(["default", "second"])
    x, dy = torch.randn(4, 6, K, dtype=torch.float64), torch.randn(4, 6, N, dtype=torch.float64)
    torch.manual_seed(1)
    eager = gradients(layer, x, dy)
    torch.manual_seed(1)
    compiled = gradients(torch.compile(layer, fullgraph=True, backend="aot_eager"), x, dy)
    for name, value in eager.items():
        assert torch.equal(value, compiled[name if name in compiled else f"_orig_mod.{name}"]), name
