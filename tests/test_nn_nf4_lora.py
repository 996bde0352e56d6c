"""FusedLoRALinear over a 4-bit base: against fp64 truth over the weight's values, adapters, merging, state, copies."""

import copy
import io

import bounds
import pytest
import torch
from lora_layers import check_within, conv1d
from nf4_states import assert_same_states
from torch import nn

import peft_kernels as pk

K, N, R = 71, 29, 5
SOURCES = ["linear", "no_bias", "conv1d", "nf4_linear"]


def dense(kind: str = "linear", dtype=torch.bfloat16) -> nn.Module:
    if kind == "conv1d":
        return type(conv1d())(N, K).to(dtype)
    return nn.Linear(K, N, bias=kind != "no_bias", dtype=dtype)


def randomise(layer: pk.FusedLoRALinear) -> pk.FusedLoRALinear:
    with torch.no_grad():
        for parameter in (*layer.lora_A.values(), *layer.lora_B.values(), *layer.lora_bias.values()):
            parameter.normal_()
    return layer


def make(kind: str = "linear", dtype=torch.bfloat16, double_quant: bool = True, **settings) -> pk.FusedLoRALinear:
    settings = {"r": R, "lora_alpha": 8, **settings}
    if kind == "nf4_linear":
        base = pk.NF4Linear.from_linear(dense(dtype=dtype), double_quant=double_quant)
        return randomise(pk.FusedLoRALinear.from_linear(base, **settings))
    base = {"base": "nf4", "double_quant": double_quant}
    return randomise(pk.FusedLoRALinear.from_linear(dense(kind, dtype), **base, **settings))


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("rows", [6, 130])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_forward_and_gradients_within_bounds(kind, rows, dtype):
    layer = make(kind)
    lora_a, lora_b = layer.lora_A["default"], layer.lora_B["default"]
    assert lora_a.dtype == lora_b.dtype == torch.float32
    x = torch.randn(2, rows // 2, K, dtype=dtype, requires_grad=True)
    y = layer(x)
    assert y.dtype == dtype
    dy = torch.randn_like(y)
    y.backward(dy)
    weight = pk.nf4_dequantize(layer.nf4_weight(), torch.float32)
    flat, upper = x.detach().view(-1, K), dy.view(-1, N)
    truth = bounds.forward(flat, weight, lora_a, lora_b, layer.bias, None, 8 / R)
    check_within({"y": y.detach().view(-1, N)}, truth)
    truth = bounds.backward(upper, flat, weight, lora_a, lora_b, None, None, 8 / R)
    check_within({"dx": x.grad.view(-1, K), "dlora_a": lora_a.grad, "dlora_b": lora_b.grad}, truth)
    assert all(p.grad is None for name, p in layer.named_parameters() if "lora_" not in name)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_quantises_as_nf4_linear_does_and_leaves_the_layer_it_was_made_from(kind):
    source = dense(kind)
    before = source.weight.detach().clone()
    layer = pk.FusedLoRALinear.from_linear(source, base="fp4", blocksize=128, double_quant=True)
    weight = before.t().contiguous() if kind == "conv1d" else before
    expected = pk.nf4_quantize(weight, "fp4", 128, True)
    for own, other in zip(layer.nf4_weight().tensors(), expected.tensors(), strict=True):
        assert torch.equal(own, other)
    assert torch.equal(source.weight, before)
    assert (layer.in_features, layer.out_features) == (K, N)
    assert "base=(quant_type='fp4', blocksize=128, double_quant=True)" in repr(layer)


def test_over_an_nf4_linear_it_holds_the_very_parameters():
    base = pk.NF4Linear(K, N, double_quant=True)
    seen = []
    base.register_forward_hook(lambda module, args, output: seen.append(module))
    layer = pk.FusedLoRALinear.from_linear(base)
    assert all(dict(layer.named_parameters())[name] is tensor for name, tensor in base.named_parameters())
    assert not layer.bias.requires_grad
    layer(torch.randn(2, K))
    assert seen == [layer]


def test_only_the_low_rank_factors_train_and_reach_the_optimizer():
    layer = make()
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"lora_A.default", "lora_B.default"}


def test_several_adapters_with_dropout_and_a_bias():
    """As in test_nn_branches, over 4 bits: a base of zeros, adapters of identities, sums that are exact."""
    size = 64
    source = nn.Linear(size, size)
    with torch.no_grad():
        source.weight.zero_()
        source.bias.fill_(5)
    layer = pk.FusedLoRALinear.from_linear(source, r=size, lora_alpha=size, base="nf4")
    layer.add_adapter("second", r=size, lora_alpha=2 * size, lora_dropout=0.5, lora_bias=True)
    layer.set_adapter(["default", "second"])
    with torch.no_grad():
        layer.lora_bias["second"].fill_(10)
        for parameter in (*layer.lora_A.values(), *layer.lora_B.values()):
            parameter.copy_(torch.eye(size))
    x = torch.ones(32, size)
    assert set(layer(x).unique().tolist()) == {26.0, 30.0}
    assert set(layer.eval()(x).unique().tolist()) == {28.0}
    layer.disable_adapters()
    assert set(layer(x).unique().tolist()) == {5.0}
    layer.disable_adapters(False)
    layer.delete_adapter("second")
    layer.set_adapter("default")
    assert set(layer(x).unique().tolist()) == {6.0}
    layer.set_scale("default", 3)
    assert set(layer(x).unique().tolist()) == {8.0}


@pytest.mark.parametrize("active", [[], ["default"]])
def test_without_adapters_it_is_nf4_linear(active):
    layer, x = make(), torch.randn(3, K, dtype=torch.bfloat16)
    expected = pk.nf4_linear(x, layer.nf4_weight(), layer.bias)
    assert not torch.equal(layer(x), expected)
    layer.set_adapter(active)
    layer.disable_adapters(bool(active))
    assert torch.equal(layer(x), expected)


def test_merging_into_four_bits_is_refused_and_dequantising_is_the_way():
    layer = make()
    before = layer.state_dict()
    with pytest.raises(RuntimeError, match="cannot merge into a 4-bit weight.*dequantize_base"):
        layer.merge()
    assert_same_states(layer.state_dict(), before)
    x = torch.randn(4, K)
    values = pk.nf4_dequantize(layer.nf4_weight(), torch.float32)
    layer.dequantize_base(torch.float32)
    assert layer.quantised is None and not layer.weight.requires_grad
    assert torch.equal(layer.weight, values) and "absmax" not in dict(layer.named_parameters())
    layer.merge()
    assert torch.equal(layer.weight, values + layer.lora_B["default"] @ layer.lora_A["default"] * (8 / R))
    layer.unmerge()
    assert torch.equal(layer.weight, values)
    bias = layer.bias.float()
    assert torch.equal(
        layer(x), pk.lora_linear(x, values, layer.lora_A["default"], layer.lora_B["default"], 8 / R, bias)
    )
    with pytest.raises(ValueError, match="not in 4 bits"):
        layer.dequantize_base()


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_dequantised_it_is_as_the_layer_was(kind):
    layer = make(kind)
    values = pk.nf4_dequantize(layer.nf4_weight())
    layer.dequantize_base()
    assert layer.weight.dtype == torch.bfloat16 and layer.weight.is_contiguous()
    assert torch.equal(layer.weight.t() if kind == "conv1d" else layer.weight, values)
    layer.quantize_base(double_quant=True)
    with pytest.raises(ValueError, match="in 4 bits already"):
        layer.quantize_base()


def test_a_merged_layer_is_not_quantised():
    layer = randomise(pk.FusedLoRALinear.from_linear(dense(), r=R))
    layer.merge()
    with pytest.raises(RuntimeError, match="cannot quantise the base: adapters"):
        layer.quantize_base()


def test_state_dict_is_bitsandbytes_beside_the_adapters():
    layer, twin = make(), make(double_quant=False)
    state = layer.state_dict()
    base = pk.NF4Linear.from_weight(layer.nf4_weight(), layer.bias)
    assert_same_states({k: v for k, v in state.items() if "lora" not in k}, base.state_dict())
    assert {k for k in state if "lora" in k} == {"lora_A.default", "lora_B.default"}
    twin.load_state_dict(state)
    x = torch.randn(3, K)
    assert torch.equal(twin(x), layer(x))
    assert_same_states(twin.state_dict(), state)


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_casts_reach_the_adapters_and_not_the_base(cast):
    layer = make()
    values = pk.nf4_dequantize(layer.nf4_weight(), torch.float32)
    getattr(layer, cast)()
    assert torch.equal(pk.nf4_dequantize(layer.nf4_weight(), torch.float32), values)
    assert layer.lora_A["default"].dtype == layer.bias.dtype == getattr(torch.zeros(0), cast)().dtype
    assert layer.absmax.dtype == torch.uint8 and layer.nested_absmax.dtype == torch.float32


@pytest.mark.parametrize("how", ["deepcopy", "torch.save"])
def test_copies_compute_the_same(how):
    layer = make().eval()
    if how == "deepcopy":
        other = copy.deepcopy(layer)
    else:
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    x = torch.randn(3, K)
    assert torch.equal(other(x), layer(x)) and repr(other) == repr(layer)


def test_autocast_and_compile_run_it_whole():
    layer, x = make(dtype=torch.float32), torch.randn(3, K, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))
    compiled(x).sum().backward()
    assert layer.lora_A["default"].grad is not None


def test_errors_come_before_anything_changes():
    source = dense()
    source.register_forward_hook(lambda *args: None)
    for settings, message in (
        ({"base": "int4"}, "quant_type is 'int4'"),
        ({"base": "nf4", "blocksize": 48}, "blocksize is 48"),
        ({"base": "nf4", "r": 0}, "r is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            pk.FusedLoRALinear.from_linear(source, **settings)
    source.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN or an infinity"):
        pk.FusedLoRALinear.from_linear(source, base="nf4")
    assert source.weight.requires_grad and source.bias.requires_grad and source._forward_hooks
    with pytest.raises(ValueError, match="in 4 bits already"):
        pk.FusedLoRALinear.from_linear(pk.NF4Linear(K, N), base="nf4")


def test_a_class_with_a_forward_of_its_own_is_refused():
    class Other(pk.NF4Linear):
        def forward(self, input):
            return super().forward(input) * 2

    with pytest.raises(ValueError, match="Other has a forward of its own"):
        pk.FusedLoRALinear.from_linear(Other(K, N))
