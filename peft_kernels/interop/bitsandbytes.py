"""Live objects of bitsandbytes, known by what they have: a model's Linear4bit layers become NF4Linear, and back."""

import importlib
import json
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ..formats.nf4_state import STATE, Stored, from_state, to_state
from ..methods.hf_config import describe_four_bits
from ..methods.walk import replace_modules, uncompiled
from ..nn.bases import base_refusal
from ..nn.combine import RunsLoRALinear
from ..nn.dispatch import dispatch_refusal, give_dispatch, replaced_forward, take_dispatch
from ..nn.hooks import immovable, move_hooks
from ..nn.lora_linear import FusedLoRALinear
from ..nn.nf4_linear import NF4Linear

_MARKS = ("hf_quantizer", "is_quantized", "is_loaded_in_4bit", "quantization_method")
_KEPT = "peft_kernels_bitsandbytes"  # attribute of a model: what transformers had marked it with


def _class_of(module: nn.Module) -> type | None:
    """bitsandbytes' Linear4bit among the module's classes, without importing bitsandbytes."""
    for cls in type(module).__mro__:
        if cls.__name__ == "Linear4bit" and cls.__module__.startswith("bitsandbytes."):
            return cls
    return None


def _text(state: Any) -> Tensor:
    """The JSON text that bitsandbytes would write of a QuantState."""
    fields = {
        "quant_type": state.quant_type,
        "blocksize": state.blocksize,
        "dtype": str(state.dtype).removeprefix("torch."),
        "shape": None if state.shape is None else list(state.shape),
    }
    if state.state2 is not None:
        outer = str(state.state2.dtype).removeprefix("torch.")
        offset = float(state.offset)
        fields.update(nested_blocksize=state.state2.blocksize, nested_dtype=outer, nested_offset=offset)
    return torch.frombuffer(bytearray(json.dumps(fields).encode()), dtype=torch.uint8)


def _stored(name: str, packed: Tensor, state: Any, shape: tuple[int, ...] | None = None) -> Stored:
    """From packed bytes and a QuantState: checked as a state_dict is, the tensors not copied."""
    if state is None:
        raise ValueError(f"{name} is not quantised yet: bitsandbytes does that when it is moved to a device")
    if getattr(state, "packing_format_for_cpu", False):
        raise ValueError(
            f"{name} was packed anew for bitsandbytes' CPU kernel, by a call in eval mode, which rounds the scales to "
            "bfloat16: convert the model before it is called, or load it again"
        )
    tensors = {"": packed.detach().as_subclass(Tensor), ".absmax": state.absmax, ".quant_map": state.code}
    if state.state2 is not None:
        tensors[".nested_absmax"], tensors[".nested_quant_map"] = state.state2.absmax, state.state2.code
    return from_state(name, {**tensors, f"{STATE}{state.quant_type}": _text(state)}, shape)


def _refusal(module: nn.Module) -> str | None:
    """Why a Linear4bit cannot be replaced; None when it can."""
    if replaced_forward(module, _class_of(module)):
        return "has a forward of its own, which NF4Linear would replace"
    return dispatch_refusal(module) or immovable(module)


def _layer(name: str, module: nn.Module) -> nn.Module:
    """The NF4Linear for a Linear4bit; nn.Linear for a weight in the deprecated layout, which has its blocks along K."""
    shape = module.out_features, module.in_features
    state = getattr(module.weight, "quant_state", None) or getattr(module, "quant_state", None)
    stored = _stored(f"{name}.weight" if name else "weight", module.weight, state, shape)
    source = getattr(module, "source_cls", None)
    conv1d = source if isinstance(source, type) and source.__name__ == "Conv1D" else None
    return layer_of(name, stored, module.bias, shape, conv1d).train(module.training)


def check_shape(name: str, stored: Stored, shape: tuple[int, int]) -> None:
    """Raise ValueError unless it is a weight [N, K]."""
    found = stored.weight.shape
    if tuple(found[::-1] if stored.transposed else found) != shape:
        raise ValueError(f"{name}.weight is of shape {list(found)}; expected {list(shape)}")


def layer_of(
    name: str, stored: Stored, bias: nn.Parameter | None, shape: tuple[int, int], conv1d: type[nn.Module] | None
) -> nn.Module:
    """A layer [N, K] on what was stored for it."""
    check_shape(name, stored, shape)
    if not stored.transposed:
        layer = NF4Linear._of(stored, bias)
        layer.conv1d = conv1d
        return layer
    warnings.warn(
        f"{name} holds its weight transposed, the deprecated layout: it becomes a dense layer of the same values",
        stacklevel=5,
    )
    turned = NF4Linear._of(stored, None).dequantize().t().contiguous()
    layer = nn.Linear(shape[1], shape[0], bias=False, device="meta")
    layer.weight, layer.bias = nn.Parameter(turned, requires_grad=False), bias
    return layer


def replace_layer(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` in the place of `old`, with the hooks of that."""
    hook = take_dispatch(old)
    own = dict(vars(new))
    move_hooks(old, new)
    for name in vars(new).keys() - own.keys():  # what bitsandbytes sets on its layers
        if not name.startswith("_"):
            del vars(new)[name]
    give_dispatch(new, hook)
    replace_modules(model, {old: new})


def from_bitsandbytes(source: Any, quant_state: Any = None) -> Any:
    """What bitsandbytes holds in 4 bits, for our kernels: the same tensors, which are not copied.

    Args:
        source: a model, changed in place: each Linear4bit becomes an NF4Linear (inside HF PEFT's wrappers too, which
            `accelerate` then takes), computing in its input's dtype whatever compute_dtype was. Or one Linear4bit, for
            an NF4Linear. Or a Params4bit, or packed bytes with their `quant_state`, for an NF4Weight.
        quant_state: bitsandbytes' QuantState for packed bytes.

    Hugging Face's marks of a bitsandbytes model are taken off (its Trainer would ask for HF PEFT's wrapper), and put
    back by `to_bitsandbytes`.

    Raises:
        ValueError: nothing in 4 bits; a layer that is not quantised yet, was packed anew for bitsandbytes' CPU kernel,
            or cannot be replaced. Nothing is changed then.
    """
    if isinstance(source, Tensor):
        return _stored("weight", source, quant_state or getattr(source, "quant_state", None)).weight
    if not isinstance(source, nn.Module):
        raise ValueError(f"from_bitsandbytes: source is {type(source).__name__}; expected a model, a layer or a weight")
    if _class_of(source) is not None:
        return _layer("", source)
    model = uncompiled(source)
    found = {name: module for name, module in model.named_modules() if _class_of(module) is not None}
    if not found:
        raise ValueError(f"from_bitsandbytes: {type(model).__name__} has no layer of bitsandbytes' Linear4bit")
    for name, module in found.items():
        reason = _refusal(module)
        if reason is not None:
            raise ValueError(f"from_bitsandbytes: {name}: {reason}")
    made = {module: _layer(name, module) for name, module in found.items()}
    for old, new in made.items():
        replace_layer(model, old, new)
    _take_marks(model)
    describe_four_bits(model)
    return source


def _marked(model: nn.Module) -> list[nn.Module]:
    """transformers' models inside, HF PEFT's wrapper aside: those whose config says how they were quantised."""
    return [m for m in model.modules() if "hf_quantizer" in vars(m) or "is_loaded_in_4bit" in vars(m)]


def _take_marks(model: nn.Module) -> None:
    for inner in _marked(model):
        marks = {name: vars(inner).pop(name) for name in _MARKS if name in vars(inner)}
        config = getattr(inner, "config", None)
        settings = vars(config).pop("quantization_config", None) if config is not None else None
        setattr(inner, _KEPT, (marks, settings))


def _give_marks(model: nn.Module) -> None:
    for inner in model.modules():
        if _KEPT in vars(inner):
            marks, settings = vars(inner).pop(_KEPT)
            vars(inner).update(marks)
            if settings is not None:
                inner.config.quantization_config = settings


def _linear4bit(layer: NF4Linear, bnb: Any, compute_dtype: torch.dtype | None) -> nn.Module:
    weight, own = layer.nf4_weight(), layer.quantised
    new = bnb.nn.Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=False,
        compute_dtype=compute_dtype,
        compress_statistics=weight.double_quant,
        quant_type=own.quant_type,
        quant_storage=own.storage,
        device="meta",
    )
    state = to_state(Stored(weight, own.offset, own.storage))
    packed = state.pop("").detach()
    stats = {f"weight{key}": tensor.detach() for key, tensor in state.items()}
    new.weight = bnb.nn.Params4bit.from_prequantized(packed, stats, device=packed.device, module=new)
    new.bias = layer.bias
    new.source_cls = layer.conv1d or nn.Linear
    return new.train(layer.training)


def to_bitsandbytes(model: nn.Module, compute_dtype: torch.dtype | None = None) -> nn.Module:
    """The way back: every NF4Linear becomes bitsandbytes' Linear4bit on the same tensors, in place. Returns the model.

    Args:
        compute_dtype: bitsandbytes' own; None takes that of the first input.

    Raises:
        ImportError: bitsandbytes is not installed.
        ValueError: nothing in 4 bits, a layer that cannot be replaced, or one that holds adapters of ours.
    """
    bnb = importlib.import_module("bitsandbytes")
    inner = uncompiled(model)
    adapted = [n for n, m in inner.named_modules() if isinstance(m, FusedLoRALinear) and m.quantised is not None]
    if adapted:
        raise ValueError(f"to_bitsandbytes: {adapted[0]} holds adapters of ours: save them, and quantise the base anew")
    found = {name: module for name, module in inner.named_modules() if isinstance(module, NF4Linear)}
    if not found:
        raise ValueError(f"to_bitsandbytes: {type(inner).__name__} has no NF4Linear")
    inside = [name for name, m in inner.named_modules() if isinstance(m, RunsLoRALinear)]
    accelerated = [name for name in inside if f"{name}.base_layer" in found]
    if accelerated:
        raise ValueError(
            f"to_bitsandbytes: {accelerated[0]} is HF PEFT's, accelerated, which needs an NF4Linear inside"
        )
    for name, layer in found.items():
        reason = base_refusal(layer)
        if reason is not None:
            raise ValueError(f"to_bitsandbytes: {name}: {reason}")
    made = {layer: _linear4bit(layer, bnb, compute_dtype) for layer in found.values()}
    for old, new in made.items():
        replace_layer(inner, old, new)
    _give_marks(inner)
    return model
