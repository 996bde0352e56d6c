"""NF4Linear as a module: what it computes, what casts and copies keep, whom it replaces."""

import copy
import io
import pickle

import pytest
import torch
from lora_layers import conv1d
from torch import nn

import peft_kernels as pk

N, K = 12, 37
SETTINGS = [("nf4", 64, False), ("nf4", 64, True), ("fp4", 32, False), ("fp4", 32, True)]
each_setting = pytest.mark.parametrize(("quant_type", "blocksize", "double_quant"), SETTINGS)


def make(double_quant: bool = True, bias: bool = True, dtype=torch.bfloat16) -> pk.NF4Linear:
    return pk.NF4Linear(K, N, bias=bias, dtype=dtype, double_quant=double_quant)


def scales(layer: nn.Module) -> dict[str, torch.Tensor]:
    names = ("weight", "absmax", "nested_absmax", "nested_code", "nested_offset")
    return {name: getattr(layer, name).detach().clone() for name in names if getattr(layer, name) is not None}


def assert_same_scales(layer: nn.Module, before: dict[str, torch.Tensor]) -> None:
    for name, tensor in before.items():
        now = getattr(layer, name)
        assert now.dtype == tensor.dtype and torch.equal(now, tensor), name
        assert isinstance(now, nn.Parameter) and not now.requires_grad, name


@each_setting
def test_computes_what_the_op_does_over_the_quantised_weight(quant_type, blocksize, double_quant):
    linear = nn.Linear(K, N, dtype=torch.bfloat16)
    layer = pk.NF4Linear.from_linear(linear, quant_type, blocksize, double_quant)
    weight = pk.nf4_quantize(linear.weight, quant_type, blocksize, double_quant)
    x = torch.randn(2, 3, K, dtype=torch.bfloat16, requires_grad=True)
    y = layer(x)
    assert torch.equal(y, pk.nf4_linear(x, weight, linear.bias))
    assert torch.equal(layer.dequantize(), pk.nf4_dequantize(weight))
    assert layer.bias is linear.bias
    dy = torch.randn_like(y)
    y.backward(dy)
    twin = x.detach().clone().requires_grad_(True)
    pk.nf4_linear(twin, weight).backward(dy)
    assert torch.equal(x.grad, twin.grad)
    assert layer.bias.grad is not None and all(getattr(layer, name).grad is None for name in scales(layer))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_computes_in_the_dtype_of_its_input(dtype):
    """One term of each sum is not 0: the weight's values come out to the bit, both ways."""
    layer = make(bias=False)
    x = torch.eye(K, dtype=dtype, requires_grad=True)
    y = layer(x)
    assert y.dtype == dtype and torch.equal(y.t(), layer.dequantize(dtype))
    y.backward(torch.ones(K, N, dtype=dtype))
    assert x.grad.dtype == dtype


def test_gives_x_the_weights_own_values_as_a_gradient():
    layer = make(bias=False)
    x = torch.zeros(N, K, requires_grad=True)
    layer(x).backward(torch.eye(N))
    assert torch.equal(x.grad, layer.dequantize(torch.float32))


@pytest.mark.parametrize("bias", [True, False])
def test_transformers_conv1d_is_turned_to_rows_of_outputs(bias):
    source = conv1d()
    if not bias:
        source.bias = None
    layer = pk.NF4Linear.from_linear(source, double_quant=True)
    K, N = source.weight.shape
    assert (layer.in_features, layer.out_features) == (K, N) and layer.bias is source.bias
    expected = pk.nf4_quantize(source.weight.t().contiguous(), double_quant=True)
    assert torch.equal(layer.weight, expected.packed) and torch.equal(layer.absmax, expected.absmax)


def test_from_weight_holds_the_very_tensors():
    weight = pk.nf4_quantize(torch.randn(N, K), double_quant=True)
    bias = nn.Parameter(torch.randn(N))
    layer = pk.NF4Linear.from_weight(weight, bias)
    assert layer.bias is bias and layer.weight.data_ptr() == weight.packed.data_ptr()
    for own, given in zip(layer.nf4_weight().tensors(), weight.tensors(), strict=True):
        assert own.data_ptr() == given.data_ptr()
    assert pk.NF4Linear.from_weight(weight, torch.randn(N)).bias.requires_grad
    with pytest.raises(ValueError, match=rf"bias is \[3\] on cpu; expected \[{N}\] on cpu"):
        pk.NF4Linear.from_weight(weight, torch.randn(3))
    with pytest.raises(ValueError, match="weight is Tensor; expected an NF4Weight of shape"):
        pk.NF4Linear.from_weight(torch.randn(N, K))
    with pytest.raises(ValueError, match=r"weight is of shape \[5\]"):
        pk.NF4Linear.from_weight(pk.nf4_quantize(torch.randn(5)))


def test_a_weight_prints_what_it_is_and_not_its_tensors():
    settings = "quant_type='nf4', blocksize=64, double_quant=True, device='cpu'"
    weight = pk.nf4_quantize(torch.randn(N, K), double_quant=True)
    assert repr(weight) == f"NF4Weight(shape=(12, 37), dtype=torch.float32, {settings})"


CASTS = {
    "half": lambda layer: layer.half(),
    "bfloat16": lambda layer: layer.bfloat16(),
    "float": lambda layer: layer.float(),
    "double": lambda layer: layer.double(),
    "to": lambda layer: layer.to(torch.float16),
    "to_device": lambda layer: layer.to("cpu", torch.bfloat16),
    "type": lambda layer: layer.type(torch.float16),
    "inside": lambda layer: nn.Sequential(layer).half()[0],
    "to_other": lambda layer: layer.to(torch.zeros(1, dtype=torch.float16)),
}


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("double_quant", [False, True])
def test_casts_reach_the_bias_and_not_the_scales(cast, double_quant):
    layer = make(double_quant, dtype=torch.float32)
    before, values = scales(layer), layer.dequantize()
    CASTS[cast](layer)
    assert_same_scales(layer, before)
    assert layer.bias.dtype == {"float": torch.float32, "double": torch.float64}.get(cast, layer.bias.dtype)
    assert (layer.bias.dtype == torch.float32) == (cast == "float")
    assert torch.equal(layer.dequantize(), values)


def test_goes_to_a_device_and_back_whole(device):
    layer = make()
    before, values = scales(layer), layer.dequantize()
    assert layer.to(device).dequantize().device.type == device
    assert_same_scales(layer.to("cpu"), before)
    assert torch.equal(layer.dequantize(), values)


def clone(layer: nn.Module, how: str) -> nn.Module:
    if how == "deepcopy":
        return copy.deepcopy(layer)
    if how == "pickle":
        return pickle.loads(pickle.dumps(layer))
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_have_memory_of_their_own(how):
    layer = make().eval()
    other = clone(layer, how)
    assert_same_scales(other, scales(layer))
    assert repr(other) == repr(layer) and not other.training
    other.weight.zero_()
    assert not torch.equal(other.dequantize(), layer.dequantize())


def test_on_meta_it_has_shapes_and_can_be_made_real():
    layer = pk.NF4Linear(K, N, device="meta", dtype=torch.bfloat16, double_quant=True)
    real = make()
    assert {n: (p.shape, p.dtype) for n, p in layer.named_parameters()} == {
        n: (p.shape, p.dtype) for n, p in real.named_parameters()
    }
    assert layer(torch.empty(2, K, device="meta")).shape == (2, N)
    assert {k: v.shape for k, v in layer.state_dict().items() if "quant_state" not in k} == {
        k: v.shape for k, v in real.state_dict().items() if "quant_state" not in k
    }
    layer.to_empty(device="cpu").load_state_dict(real.state_dict())
    assert torch.equal(layer.dequantize(), real.dequantize())
    linear = nn.Linear(K, N, device="meta")
    assert pk.NF4Linear.from_linear(linear).weight.is_meta


def test_every_parameter_can_be_sharded_by_its_first_dimension():
    for parameter in make().parameters():
        assert type(parameter) is nn.Parameter and parameter.dim() == 1
    assert not list(make().buffers())


def test_compiles_whole():
    layer, x = make(), torch.randn(3, K, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    y = compiled(x)
    assert torch.equal(y, layer(x))
    y.sum().backward()
    assert x.grad is not None


def test_to_linear_is_dense_again():
    layer = make().eval()
    linear = layer.to_linear()
    assert linear.weight.dtype == torch.bfloat16 and not linear.weight.requires_grad and not linear.training
    assert torch.equal(linear.weight, layer.dequantize()) and linear.bias is layer.bias
    assert layer.to_linear(torch.float32).weight.dtype == torch.float32


def test_hooks_move_with_their_handles():
    linear = nn.Linear(K, N)
    seen = []
    handle = linear.register_forward_hook(lambda module, args, output: seen.append(module))
    layer = pk.NF4Linear.from_linear(linear)
    layer(torch.randn(1, K))
    assert seen == [layer]
    handle.remove()
    layer(torch.randn(1, K))
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (lambda: nn.Conv2d(1, 1, 1), "neither nn.Linear nor transformers' Conv1D"),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(K, N)), "its weight is computed at each call"),
        (lambda: nn.Linear(K, N, dtype=torch.float64), "weight is torch.float64; expected float16, bfloat16 or"),
        (lambda: nn.LazyLinear(3), "no shape yet"),
    ],
    ids=["conv2d", "weight_norm", "float64", "lazy"],
)
def test_what_cannot_be_quantised_is_refused_with_the_reason(source, message):
    with pytest.raises(ValueError, match=message):
        pk.NF4Linear.from_linear(source())


def test_settings_and_values_that_do_not_fit_are_refused():
    linear = nn.Linear(K, N)
    with pytest.raises(ValueError, match="quant_type is 'int4'; expected 'nf4' or 'fp4'"):
        pk.NF4Linear.from_linear(linear, quant_type="int4")
    with pytest.raises(ValueError, match="blocksize is 48"):
        pk.NF4Linear(K, N, blocksize=48)
    linear.weight.data[0, 0] = torch.inf
    with pytest.raises(ValueError, match="NaN or an infinity"):
        pk.NF4Linear.from_linear(linear)


def test_its_line_in_a_printed_model_says_how_it_is_stored():
    assert repr(make()) == (
        f"NF4Linear(in_features={K}, out_features={N}, bias=True, quant_type='nf4', blocksize=64, double_quant=True)"
    )
    assert "double_quant" not in repr(make(double_quant=False))
