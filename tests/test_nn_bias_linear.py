"""BiasLinear as a module: nn.Linear's face over pk.bias_linear, its copies, its state, and the same over Conv1D."""

import copy
import importlib
import io
import pickle

import pytest
import torch
from lora_layers import K, N, conv1d, randomise
from torch import nn

import peft_kernels as pk
from peft_kernels.kernels.bias_grad.activations import ACTIVATIONS

TORCH = {None: nn.Identity(), "relu": nn.ReLU(), "gelu": nn.GELU(), "gelu_tanh": nn.GELU("tanh"), "silu": nn.SiLU()}


def bias_only(layer: nn.Module) -> nn.Module:
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    return layer


def step(layer, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """y, dx and the bias gradient for a fixed dy."""
    x = x.clone().requires_grad_(True)
    layer.zero_grad()
    y = layer(x)
    y.backward(torch.cos(torch.arange(float(y.numel()))).view(y.shape).to(y.dtype))
    bias = next(p for name, p in layer.named_parameters() if name.endswith("bias"))
    return {"y": y.detach(), "dx": x.grad, "dbias": bias.grad.clone()}


def assert_same_function(ours: nn.Module, theirs: nn.Module, x: torch.Tensor) -> None:
    """In fp64: other orders of the same sums are nearer than the same order in fp32."""
    single = step(copy.deepcopy(theirs).float(), x.float())
    found, expected = step(ours.double(), x.double()), step(theirs.double(), x.double())
    for name, value in expected.items():
        rounding = (single[name] - value).abs().max()
        assert (found[name] - value).abs().max() < rounding < 1e-3 * value.abs().max(), name


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_is_nn_linear_with_an_activation_behind(activation):
    layer = pk.BiasLinear(K, N, activation=activation)
    linear = nn.Linear(K, N)
    assert isinstance(layer, nn.Linear)
    assert layer.state_dict().keys() == linear.state_dict().keys()
    linear.load_state_dict(layer.state_dict())
    assert_same_function(bias_only(layer), bias_only(nn.Sequential(linear, TORCH[activation])), torch.randn(2, 5, K))


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_without_a_bias_it_is_torchs(activation):
    layer, x = pk.BiasLinear(K, N, bias=False, activation=activation), torch.randn(3, K)
    assert list(layer.state_dict()) == ["weight"]
    assert torch.equal(layer(x), TORCH[activation](nn.functional.linear(x, layer.weight)))


def test_the_constructor_is_nn_linears():
    torch.manual_seed(3)
    layer = pk.BiasLinear(K, N, True, "cpu", torch.bfloat16)
    torch.manual_seed(3)
    linear = nn.Linear(K, N, True, "cpu", torch.bfloat16)
    assert torch.equal(layer.weight, linear.weight) and torch.equal(layer.bias, linear.bias)
    assert repr(layer) == repr(linear).replace("Linear", "BiasLinear")
    assert "activation='gelu'" in repr(pk.BiasLinear(K, N, activation="gelu"))
    with pytest.raises(ValueError, match="BiasLinear: activation is 'mish'; expected one of relu, gelu"):
        pk.BiasLinear(K, N, activation="mish")


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
@pytest.mark.parametrize("base", ["linear", "conv1d"])
def test_copies_stand_alone(base, how):
    layer = bias_only(pk.BiasLinear(K, N, activation="silu") if base == "linear" else fused_conv1d())
    twin, x = clone(layer, how), torch.randn(4, K)
    assert type(twin) is type(layer) and twin.activation == "silu"
    assert twin.bias is not layer.bias
    found, expected = step(twin, x), step(layer, x)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert not twin.weight.requires_grad and twin.weight.grad is None


def fused_conv1d() -> nn.Module:
    layer = conv1d()
    layer.__class__ = importlib.import_module("peft_kernels.nn.bias_conv1d").BiasConv1D
    layer.activation = "silu"
    randomise(layer)
    return layer


def test_conv1d_computes_the_same_and_its_weight_is_never_copied():
    layer, theirs = bias_only(fused_conv1d()), bias_only(nn.Sequential(conv1d(), nn.SiLU()))
    theirs[0].load_state_dict(layer.state_dict())
    assert_same_function(layer, theirs, torch.randn(2, 5, K))
    layer = layer.float()
    pointers = set()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.numel() and pointers.add(t.data_ptr()) or t, lambda t: t):
        y = layer(torch.randn(4, K, requires_grad=True))
    assert layer.weight.data_ptr() in pointers
    assert len(pointers) == 2  # the weight in place, and z
    y.sum().backward()
    assert "activation='silu'" in repr(layer)


def test_from_linear_shares_parameters_and_takes_the_hooks():
    linear, seen = nn.Linear(K, N).eval(), []
    handle = linear.register_forward_hook(lambda module, args, y: seen.append(module))
    layer = pk.BiasLinear.from_linear(linear, activation="relu")
    assert layer.weight is linear.weight and layer.bias is linear.bias
    assert not layer.training and layer.activation == "relu"
    x = torch.randn(3, K)
    assert torch.equal(layer(x), torch.relu(linear(x)))
    assert seen == [layer]
    handle.remove()
    layer(x)
    assert len(seen) == 1
    bare = pk.BiasLinear.from_linear(nn.Linear(K, N, bias=False))
    assert bare.bias is None and bare(x).shape == (3, N)


class Own(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: nn.ReLU(), "ReLU is not nn.Linear"),
        (conv1d, "Conv1D is not nn.Linear"),
        (lambda: Own(K, N), "has a forward of its own"),
        (lambda: nn.utils.spectral_norm(nn.Linear(K, N)), "its weight is computed at each call"),
        (lambda: nn.Linear(K, N).to(torch.float8_e4m3fn), "its weight is torch.float8_e4m3fn"),
    ],
    ids=["relu", "conv1d", "forward", "spectral_norm", "float8"],
)
def test_from_linear_refuses_with_the_reason(build, message):
    with pytest.raises(ValueError, match=f"BiasLinear cannot replace this layer: .*{message}"):
        pk.BiasLinear.from_linear(build())


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_compiles_as_one_graph(activation):
    layer, x = bias_only(pk.BiasLinear(K, N, activation=activation)).double(), torch.randn(3, K, dtype=torch.float64)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    found, expected = step(compiled, x), step(layer, x)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_autocast_is_nn_linears(activation):
    layer, x = pk.BiasLinear(K, N, activation=activation), torch.randn(3, K)
    with torch.autocast("cpu", torch.bfloat16):
        expected = TORCH[activation](nn.functional.linear(x, layer.weight, layer.bias))
        assert torch.equal(layer(x), expected) and expected.dtype == torch.bfloat16
    assert layer.half().weight.dtype == torch.float16
