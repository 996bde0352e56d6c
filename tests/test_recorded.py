"""Where nothing is differentiated, no autograd.Function stands between a public function and its op."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import peft_kernels as pk
from peft_kernels.kernels.bias_grad import autograd as bias
from peft_kernels.kernels.lora_linear import autograd as lora
from peft_kernels.kernels.nf4_linear import autograd as nf4
from peft_kernels.kernels.norm import autograd as norm
from peft_kernels.kernels.qlora_linear import autograd as qlora

M, N, K, R = 5, 32, 64, 4


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


W, ROW, SCALE, LORA_A, LORA_B = draw(N, K), draw(N), draw(K), draw(R, K), draw(N, R)
WEIGHT = pk.nf4_quantize(W, double_quant=True)


@dataclass(frozen=True)
class Public:
    """A function of x and of one more tensor, and the autograd.Function behind it."""

    call: Callable[[Tensor, Tensor], Tensor | tuple[Tensor, Tensor]]
    other: Tensor
    function: type[torch.autograd.Function]


PUBLIC = {
    "bias_linear": Public(lambda x, b: pk.bias_linear(x, W, b), ROW, bias._BiasLinear),
    "bias_linear relu": Public(lambda x, b: pk.bias_linear(x, W, b, "relu"), ROW, bias._BiasLinear),
    "bias_linear gelu": Public(lambda x, b: pk.bias_linear(x, W, b, "gelu"), ROW, bias._BiasLinear),
    "layer_norm": Public(lambda x, w: pk.layer_norm(x, w), SCALE, norm._Norm),
    "rms_norm": Public(lambda x, w: pk.rms_norm(x, w), SCALE, norm._Norm),
    "rms_norm residual": Public(lambda x, r: pk.rms_norm(x, SCALE, residual=r), draw(2, M, K), norm._Norm),
    "lora_linear": Public(lambda x, a: pk.lora_linear(x, W, a, LORA_B, 2.0, ROW), LORA_A, lora._LoRALinear),
    "lora_linear dropout": Public(
        lambda x, a: pk.lora_linear(x, W, a, LORA_B, 2.0, ROW, 0.5), LORA_A, lora._LoRALinear
    ),
    "lora_linear branch": Public(lambda x, b: pk.lora_linear(x, None, LORA_A, b, 2.0), LORA_B, lora._LoRALinear),
    "nf4_linear": Public(lambda x, b: pk.nf4_linear(x, WEIGHT, b), ROW, nf4._NF4Linear),
    "qlora_linear": Public(lambda x, a: pk.qlora_linear(x, WEIGHT, a, LORA_B, 2.0, ROW), LORA_A, qlora._QLoRALinear),
    "qlora_linear dropout": Public(
        lambda x, a: pk.qlora_linear(x, WEIGHT, a, LORA_B, 2.0, ROW, 0.5), LORA_A, qlora._QLoRALinear
    ),
}
NO_DRAWS = [name for name in PUBLIC if "dropout" not in name]
"""Transforms refuse random numbers first, and a compiled function draws others."""


@pytest.fixture(params=PUBLIC, ids=str)
def public(request) -> Public:
    return PUBLIC[request.param]


def results(public: Public, x: Tensor, other: Tensor) -> tuple[Tensor, ...]:
    """Under one seed: masks of dropout are the same."""
    torch.manual_seed(0)
    found = public.call(x, other)
    return found if isinstance(found, tuple) else (found,)


def compiled(function: Callable) -> Callable:
    return torch.compile(function, backend="aot_eager")


@contextmanager
def refused(function: type[torch.autograd.Function], monkeypatch) -> Iterator[None]:
    """Whoever calls it fails."""

    def apply(*args):
        raise AssertionError(f"{function.__name__} ran")

    with monkeypatch.context() as patch:
        patch.setattr(function, "apply", apply)
        yield


def test_nothing_to_differentiate_is_the_op_alone(public, monkeypatch):
    x, other = draw(2, M, K), public.other
    leaves = x.clone().requires_grad_(), other.clone().requires_grad_()
    expected = results(public, *leaves)
    assert any(one.requires_grad for one in expected)
    with refused(public.function, monkeypatch):
        for no_gradients, tensors in (
            (torch.no_grad, leaves),
            (torch.inference_mode, leaves),
            (nullcontext, (x, other)),
        ):
            with no_gradients():
                found = results(public, *tensors)
            assert not any(one.requires_grad for one in found)
            assert len(found) == len(expected)
            assert all(torch.equal(a, b) and a.shape == b.shape for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("which", [0, 1], ids=["x", "other"])
def test_one_tensor_that_trains_is_enough(public, monkeypatch, which):
    args = [draw(2, M, K), public.other.clone()]
    args[which].requires_grad_()
    with refused(public.function, monkeypatch), pytest.raises(AssertionError, match="ran"):
        results(public, *args)
    assert results(public, *args)[0].requires_grad


@pytest.mark.parametrize("gradients", [torch.enable_grad, torch.no_grad], ids=lambda mode: mode.__name__)
@pytest.mark.parametrize("which", [0, 1], ids=["x", "other"])
def test_forward_mode_is_refused_not_dropped(public, which, gradients):
    """An op alone would give a result without a tangent, which reads as a derivative of zero."""
    args = [draw(2, M, K), public.other]
    with gradients(), forward_ad.dual_level(), pytest.raises(RuntimeError, match="jvp"):
        args[which] = forward_ad.make_dual(args[which], torch.ones_like(args[which]))
        results(public, *args)


@pytest.mark.parametrize("name", NO_DRAWS)
def test_forward_mode_is_refused_compiled(name):
    """Before the level and within it: what was compiled without one must not serve there."""
    call, x, other = compiled(PUBLIC[name].call), draw(2, M, K), PUBLIC[name].other
    call(x, other)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="jvp"):
        call(forward_ad.make_dual(x, torch.ones_like(x)), other)


def gradient_of_vmap(call: Callable, x: Tensor) -> Tensor:
    return torch.func.grad(lambda x: torch.func.vmap(call)(x).sum())(x)


TRANSFORMS = {
    "vmap": lambda call, x: torch.func.vmap(call)(x),
    "vmap of a leaf": lambda call, x: torch.func.vmap(call)(x.requires_grad_()),
    "grad of vmap": gradient_of_vmap,
    "functionalize": lambda call, x: torch.func.functionalize(call)(x.requires_grad_()),
    "jvp": lambda call, x: torch.func.jvp(call, (x,), (x,)),
}


WAYS = {
    "": lambda transform, call, x: transform(call, x),
    "compiled ": lambda transform, call, x: compiled(lambda x: transform(call, x))(x),
    "of compiled ": lambda transform, call, x: transform(compiled(call), x),
}
REFUSED = [(way, name) for way in WAYS for name in TRANSFORMS if not way or name != "functionalize"]
"""What is functional already Torch does not compile at all."""


@pytest.mark.parametrize("way, transform", REFUSED, ids=[way + name for way, name in REFUSED])
@pytest.mark.parametrize("name", NO_DRAWS)
def test_transforms_are_refused(name, way, transform):
    """Their tensors hide that they require grad: an op alone would give a result that nothing is derived from. Nor does
    the autograd.Function refuse them always: the compiler leaves it out where nothing seems to require grad."""
    public = PUBLIC[name]

    def first(x: Tensor) -> Tensor:
        found = public.call(x, x + 1 if public.other.dim() == 3 else public.other)
        return found[0] if isinstance(found, tuple) else found

    with pytest.raises(RuntimeError, match=f"{name.split()[0]}: functorch transforms"):
        WAYS[way](TRANSFORMS[transform], first, draw(2, M, K))


@pytest.mark.parametrize("name", NO_DRAWS)
def test_compiled_without_gradients(name):
    call, x, other = PUBLIC[name].call, draw(2, M, K), PUBLIC[name].other
    with torch.no_grad():
        expected, found = call(x, other), torch.compile(call, backend="aot_eager", fullgraph=True)(x, other)
    pairs = zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]
    assert all(torch.equal(a, b) for a, b in pairs)
