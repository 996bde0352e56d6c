"""What a Hugging Face config says of 4-bit layers, so that from_pretrained loads what save_pretrained wrote."""

import copy
from typing import Any

from torch import nn

from ..nn.base_linear import is_linear
from ..nn.lora_linear import FusedLoRALinear
from ..nn.nf4_base import NF4Base
from ..nn.trainable_copy import TrainableCopy
from .walk import walk


def four_bit_layers(model: nn.Module) -> dict[str, NF4Base]:
    """By name, each once."""
    return {n: m for n, m in model.named_modules() if isinstance(m, NF4Base) and m.quantised is not None}


def _dense(model: nn.Module) -> list[str]:
    """Names of what bitsandbytes would take for its own, were it not told to leave it."""
    names = []
    for name, module in walk(model):
        adapted = isinstance(module, FusedLoRALinear) and module.quantised is None
        if adapted or is_linear(module) or isinstance(module, TrainableCopy):
            names.append(name)
    return names


def quantization_config(model: nn.Module) -> dict[str, Any]:
    """What transformers writes of a BitsAndBytesConfig, for a model that has 4-bit layers."""
    first = next(iter(four_bit_layers(model).values()))
    return {
        "quant_method": "bitsandbytes",
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_compute_dtype": str(first.quantised.dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": str(first.quantised.storage).removeprefix("torch."),
        "bnb_4bit_quant_type": first.quantised.quant_type,
        "bnb_4bit_use_double_quant": first.nested_absmax is not None,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": _dense(model),  # [] too: of None, transformers adds the last layer as an output head
        "llm_int8_threshold": 6.0,
    }


def _is_pretrained(module: nn.Module) -> bool:
    """A model of transformers, known without importing it."""
    return any(
        c.__name__ == "PreTrainedModel" and c.__module__ == "transformers.modeling_utils" for c in type(module).__mro__
    )


def _outermost(module: nn.Module) -> list[nn.Module]:
    if _is_pretrained(module):
        return [module]
    return [model for child in module.children() for model in _outermost(child)]


def kept_wide(model: nn.Module) -> set[str]:
    """Names of modules that the transformers models in here keep in fp32, whatever the rest is in."""
    return {name for one in _outermost(model) for name in getattr(one, "_keep_in_fp32_modules", None) or ()}


def _own_config(model: nn.Module) -> Any:
    """A config that no other model holds: those built from one object share it, and one alone has 4-bit layers."""
    shared, own = model.config, copy.copy(model.config)
    for module in model.modules():
        if vars(module).get("config") is shared:
            module.config = own
    return own


def describe_four_bits(model: nn.Module) -> None:
    """Bring config.quantization_config of every transformers model in here up to date; others have none.

    A setting that transformers itself made is left as it is. Where it changes, the model has a config of its own from
    then on: what is written to `model.config` reaches its modules as before, and no other model.
    """
    for pretrained in _outermost(model):
        settings = getattr(pretrained.config, "quantization_config", None)
        if settings is not None and not isinstance(settings, dict):
            continue
        if four_bit_layers(pretrained):
            if settings != (found := quantization_config(pretrained)):
                _own_config(pretrained).quantization_config = found
        elif settings is not None and settings.get("load_in_4bit"):
            del _own_config(pretrained).quantization_config
