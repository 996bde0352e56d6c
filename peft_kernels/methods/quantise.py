"""A model's linear layers in 4 bits: which ones, one after another, and back."""

from collections.abc import Iterable

import torch
from torch import nn
from tqdm import tqdm

from .._core.checks import has_values
from ..formats.nf4 import check_asked
from ..nn.base_linear import is_linear, read_by_parents, refusal
from ..nn.bases import base_refusal
from ..nn.dispatch import give_dispatch, take_dispatch
from ..nn.hooks import move_hooks
from ..nn.lora_linear import FusedLoRALinear
from ..nn.nf4_base import NF4Base
from ..nn.nf4_linear import NF4Linear
from .hf_config import describe_four_bits, four_bit_layers, kept_wide
from .targets import output_head
from .walk import refuse_peft, replace_modules, uncompiled, walk

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def _cannot(module: nn.Module) -> str | None:
    """Why its weight cannot be quantised; None when it can."""
    reason = refusal(module)
    if reason is None and module.weight.dtype not in _DTYPES:
        return f"its weight is {module.weight.dtype}; expected float16, bfloat16 or float32"
    return reason


def check_weights(weights: dict[str, nn.Parameter]) -> None:
    """Raise ValueError for a weight that cannot be quantised, by the name of its layer."""
    for name, weight in weights.items():
        if weight.dtype not in _DTYPES:
            raise ValueError(f"{name}: its weight is {weight.dtype}; expected float16, bfloat16 or float32")
        # The extremes are NaN or infinite where any value is, and need no temporary of the weight's size.
        if weight.numel() and has_values(weight) and not torch.stack(weight.detach().aminmax()).isfinite().all():
            raise ValueError(f"{name}: its weight holds NaN or an infinity, which 4 bits cannot")


def quantisable(model: nn.Module, skipped: Iterable[nn.Module]) -> dict[str, nn.Module]:
    """The dense linears outside `skipped` that can go to 4 bits, by name: as bitsandbytes chooses them.

    Not the output layer, nor a layer whose weight another kind of module holds too (a tied embedding), nor one that
    cannot be replaced (see `coverage` for why), nor what a transformers model keeps in fp32 (T5's `wo`), which its
    from_pretrained leaves dense in a file in 4 bits too.
    """
    left = {id(inner) for module in skipped for inner in module.modules()}
    head, bypassed = output_head(model, None), read_by_parents(model)
    left.update(() if head is None else map(id, head.modules()))
    tied = {id(p) for m in model.modules() if not is_linear(m) for p in m.parameters(recurse=False)}
    wide = kept_wide(model)
    found: dict[str, nn.Module] = {}
    for name, module in walk(model):
        if not wide.isdisjoint(name.split(".")):
            continue
        if not is_linear(module) or id(module) in left or id(module) in bypassed or _cannot(module) is not None:
            continue
        left.add(id(module))
        if id(module.weight) not in tied:
            found[name] = module
    return found


def check_settings(name: str, layer: NF4Base, settings: tuple[str, int, bool]) -> None:
    """Raise ValueError where a layer is in 4 bits of another kind."""
    own = layer.quantised
    if (own.quant_type, own.blocksize, layer.nested_absmax is not None) != settings:
        raise ValueError(f"{name} is in 4 bits already, with {layer.nf4_repr()}")


def carry_out_quantising(
    model: nn.Module, layers: list[FusedLoRALinear], others: list[nn.Module], settings: tuple[str, int, bool]
) -> None:
    """Quantise the layers' own weights, and put an NF4Linear in the place of each other one.

    One by one, emptying both lists: a dense weight is free before the next one is quantised, unless someone outside
    the model holds it.
    """
    work = [layers] * len(layers) + [others] * len(others)
    for rest in tqdm(work, desc="quantising", unit="layer", delay=2, disable=None, dynamic_ncols=True):
        module = rest.pop(0)
        if rest is layers:
            module.quantize_base(*settings)
        else:
            replace_modules(model, {module: NF4Linear.from_linear(module, *settings)})
    describe_four_bits(model)


def skipped(model: nn.Module, skip_modules: Iterable[str] | None) -> list[nn.Module]:
    """The modules of these names, whole or from a dot on; ValueError where there is none."""
    names = None if isinstance(skip_modules, str) else list(skip_modules or ())
    if names is None or not all(isinstance(wanted, str) for wanted in names):
        raise ValueError(f"skip_modules is {skip_modules!r}; expected a list of names")
    modules, chosen = dict(walk(model)), []
    for wanted in names:
        named = [module for name, module in modules.items() if name == wanted or name.endswith(f".{wanted}")]
        if not named:
            raise ValueError(f"skip_modules: no module of this model is named {wanted!r}")
        chosen += named
    return chosen


def _why_none(model: nn.Module) -> str:
    """What a model without a layer to quantise is, where that is a usual mistake."""
    if is_linear(model):
        return " inside: it is one itself, for NF4Linear.from_linear"
    count = len(four_bit_layers(model))
    return f": {count} are in 4 bits already" if count else ""


def quantize(
    model: nn.Module,
    quant_type: str = "nf4",
    blocksize: int = 64,
    double_quant: bool = False,
    skip_modules: Iterable[str] | None = None,
) -> nn.Module:
    """Put the model's linear layers into 4 bits, in place and one by one: each becomes an NF4Linear. Returns the model.

    As bitsandbytes does, it leaves the output layer as it is; a layer whose weight is tied to another module's, one
    that cannot be replaced and one with adapters stay too (`inject` with base="nf4" does it for those). The config of a
    Hugging Face model gets the quantization_config with which from_pretrained loads what its save_pretrained writes.

    Args:
        quant_type, blocksize, double_quant: as NF4Linear's.
        skip_modules: names of modules to leave, whole or from a dot on; all inside them too.

    Raises:
        ValueError: a setting or a name not known, a weight that holds NaN or an infinity, nothing to quantise, or HF
            PEFT's wrappers.
    """
    inner = uncompiled(model)
    if not isinstance(inner, nn.Module):
        raise ValueError(
            f"quantize: model is {type(inner).__name__}; expected a torch.nn.Module (a tensor: nf4_quantize)"
        )
    check_asked("quantize", quant_type, blocksize, double_quant)
    refuse_peft(inner)
    chosen = quantisable(inner, skipped(inner, skip_modules))
    if not chosen:
        raise ValueError(f"quantize: {type(inner).__name__} has no linear layer to quantise{_why_none(inner)}")
    check_weights({name: module.weight for name, module in chosen.items()})
    others = list(chosen.values())
    chosen.clear()
    carry_out_quantising(inner, [], others, (quant_type, blocksize, double_quant))
    return model


def _to_linear(layer: NF4Linear, dtype: torch.dtype | None) -> nn.Module:
    linear = layer.to_linear(dtype)
    hook = take_dispatch(layer)
    move_hooks(layer, linear)
    for name in ("quantised", "conv1d"):  # attributes go along with hooks
        vars(linear).pop(name, None)
    give_dispatch(linear, hook)
    return linear


def dequantize(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Give every 4-bit layer of the model a dense weight of the very values it stands for. Returns the model.

    In place and one by one: NF4Linear becomes nn.Linear (Conv1D, where it stood for one), FusedLoRALinear keeps its
    adapters, which can be merged then.

    Args:
        dtype: of the weights; by default each has that which it had before it was quantised.

    Raises:
        ValueError: nothing is in 4 bits, or a layer cannot be replaced, with the reason.
    """
    inner = uncompiled(model)
    small = list(four_bit_layers(inner).items())
    if not small:
        raise ValueError(f"dequantize: {type(inner).__name__} has no layer in 4 bits")
    for name, layer in small:
        reason = None if isinstance(layer, FusedLoRALinear) else base_refusal(layer)
        if reason is not None:
            raise ValueError(f"dequantize: {name}: {reason}")
    while small:
        _, layer = small.pop(0)
        if isinstance(layer, FusedLoRALinear):
            layer.dequantize_base(dtype)
        else:
            replace_modules(inner, {layer: _to_linear(layer, dtype)})
    describe_four_bits(inner)
    return model
