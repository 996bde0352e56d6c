"""FusedLayerNorm and FusedRMSNorm: Torch's layers, with the residual added and every gradient made in one pass each."""

import copy
from numbers import Real

import torch
from torch import Tensor, nn

from ..kernels.norm.autograd import layer_norm, rms_norm
from .base_linear import unfit
from .dispatch import dispatch_refusal, give_dispatch, replaced_forward, take_dispatch
from .hooks import immovable, move_hooks

Normed = Tensor | tuple[Tensor, Tensor]
"""y, or with a residual (y, input + residual)."""


def _rows(layer: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """[..., *normalized_shape] -> [..., K]."""
    count = len(layer.normalized_shape)
    if not isinstance(tensor, Tensor) or tuple(tensor.shape[-count:]) != tuple(layer.normalized_shape):
        shape = list(tensor.shape) if isinstance(tensor, Tensor) else repr(tensor)
        raise ValueError(
            f"{type(layer).__name__}: {name} is {shape}; expected [..., {', '.join(map(str, layer.normalized_shape))}]"
        )
    return tensor if count == 1 else tensor.flatten(-count)


def _norm(layer: nn.Module, input: Tensor, residual: Tensor | None, function, *parameters: Tensor | None) -> Normed:
    x = _rows(layer, "input", input)
    if residual is not None:
        residual = _rows(layer, "residual", residual)
    flat = [parameter if parameter is None or parameter.dim() == 1 else parameter.flatten() for parameter in parameters]
    found = function(x, *flat, eps=layer.eps, residual=residual)
    if len(layer.normalized_shape) == 1:
        return found
    return found.view(input.shape) if residual is None else tuple(part.view(input.shape) for part in found)


def _move(source: nn.Module, target: nn.Module) -> nn.Module:
    hook = take_dispatch(source)
    move_hooks(source, target)
    give_dispatch(target, hook)
    return target.train(source.training)


def _check_source(source: nn.Module, cls: type[nn.Module], target: str) -> None:
    reason = "it has a forward of its own" if replaced_forward(source, cls) else None
    reason = reason or unfit(source, matrix=False) or dispatch_refusal(source) or immovable(source)
    if reason is not None:
        raise ValueError(f"{target} cannot replace this {type(source).__name__}: {reason}")


class FusedLayerNorm(nn.LayerNorm):
    """nn.LayerNorm's constructor, Parameters and state_dict keys; the statistics and sums in fp32 (fp64 for fp64).

    For the backward it keeps the input with its mean and 1 / standard deviation, and nothing where the bias alone
    trains and the input needs no gradient.
    """

    @classmethod
    def from_layer_norm(cls, norm: nn.LayerNorm) -> "FusedLayerNorm":
        """A FusedLayerNorm on the very Parameters of an nn.LayerNorm, whose hooks move over with their handles.

        Raises:
            ValueError: not an nn.LayerNorm, or one that cannot be replaced, with the reason.
        """
        if not isinstance(norm, nn.LayerNorm):
            raise ValueError(f"FusedLayerNorm cannot replace a {type(norm).__name__}: it is not nn.LayerNorm")
        _check_source(norm, nn.LayerNorm, cls.__name__)
        layer = cls(norm.normalized_shape, norm.eps, elementwise_affine=False)
        layer.elementwise_affine = norm.elementwise_affine
        layer.weight, layer.bias = norm.weight, norm.bias
        return _move(norm, layer)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Normed:
        """input [..., *normalized_shape] -> the same; with a residual of input's shape (y, input + residual)."""
        return _norm(self, input, residual, layer_norm, self.weight, self.bias)


def _other_formula(norm: nn.Module, eps: float) -> str | None:
    """Why `norm` may not compute weight * x / rms(x): its source may have (1 + weight), as Gemma's, under these names.

    None where it does, as a try on a copy shows.
    """
    K = norm.weight.numel()
    ramp, x = torch.linspace(0.5, 2.0, K, device="cpu"), torch.arange(3.0 * K, device="cpu").cos().view(3, K)
    expected = ramp * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    try:
        twin = copy.deepcopy(norm).to_empty(device="cpu").to(torch.float32).requires_grad_(False)
        twin.weight.copy_(ramp)
        found = type(norm).forward(twin, x)  # not by calling it: its hooks have nothing to do with this
    except Exception as error:  # it is the model's own code, on an input it was not asked about: it may raise anything
        return f"a try of a copy on [3, {K}] raised {type(error).__name__}: {error}"
    if not isinstance(found, Tensor) or found.shape != x.shape:
        return "its output is not one tensor of its input's shape"
    # A 16-bit step inside rounds by 2**-8; another formula in `weight` is off by a quarter and more.
    same = bool(((found - expected).abs() <= 2**-6 * expected.abs()).all())
    return None if same else "its output is not weight * x / rms(x)"


def _not_like_llamas(norm: nn.Module, eps: object) -> str | None:
    """Why a layer that is not nn.RMSNorm has not what LlamaRMSNorm has."""
    weight, number = norm._parameters.get("weight"), isinstance(eps, Real) and not isinstance(eps, bool)
    if not number or list(norm._parameters) != ["weight"] or weight is None or weight.dim() != 1:
        return "it is not nn.RMSNorm, and not a layer with a weight [K] alone and variance_epsilon or eps"
    return None


class FusedRMSNorm(nn.RMSNorm):
    """nn.RMSNorm's constructor, Parameters and state_dict keys; the mean square and sums in fp32 (fp64 for fp64)."""

    @classmethod
    def from_rms_norm(cls, norm: nn.Module) -> "FusedRMSNorm":
        """A FusedRMSNorm on the very Parameter of nn.RMSNorm or of a layer like transformers' LlamaRMSNorm.

        "Like": a weight [K], `variance_epsilon` or `eps`, and weight * x / sqrt(mean(x^2) + eps) for an output, which
        is tried on a copy. Llama's rounds x / rms to 16 bits before it multiplies; this rounds once, at the end.

        Raises:
            ValueError: a layer that computes something else, or cannot be replaced, with the reason.
        """
        if not isinstance(norm, nn.Module):
            raise ValueError(f"FusedRMSNorm cannot replace a {type(norm).__name__}: it is no module")
        torchs = isinstance(norm, nn.RMSNorm)
        eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
        reason = None if torchs else _not_like_llamas(norm, eps)
        if reason is None:
            _check_source(norm, nn.RMSNorm if torchs else type(norm), cls.__name__)
            reason = None if torchs else _other_formula(norm, eps)
        if reason is not None:
            raise ValueError(f"FusedRMSNorm cannot replace a {type(norm).__name__}: {reason}")
        shape = norm.normalized_shape if torchs else norm.weight.shape
        layer = cls(shape, eps, elementwise_affine=False)
        layer.elementwise_affine, layer.weight = norm.weight is not None, norm.weight
        return _move(norm, layer)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Normed:
        """input [..., *normalized_shape] -> the same; with a residual of input's shape (y, input + residual)."""
        return _norm(self, input, residual, rms_norm, self.weight, None)
