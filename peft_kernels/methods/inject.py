"""inject: put an adapter into a model, by the method that its config is of."""

from typing import Any

import torch
from torch import nn

from .bitfit import carry_out_biases, plan_biases
from .bitfit_config import BitFitConfig
from .lora import carry_out, plan_injection
from .walk import uncompiled


def inject(
    model: nn.Module, config: Any, adapter_name: str = "default", adapter_dtype: torch.dtype | None = None
) -> nn.Module:
    """Put an adapter into `model` in place and return it. If anything is wrong, the model is not touched.

    LoRA: the targeted nn.Linear and Conv1D layers become FusedLoRALinear on the same Parameters; everything but the
    adapters, modules_to_save and the biases that config.bias names is frozen. Hooks on the layers, HF accelerate's for
    a device_map among them, move to the new ones (see FusedLoRALinear.take_over). Call it again with another
    adapter_name to add a further adapter, which stays inactive until `set_adapter`.

    BitFit: everything but the targeted biases and modules_to_save is frozen. nn.Linear, Conv1D and nn.LayerNorm layers
    that own such a bias become BiasLinear, its like and FusedLayerNorm in place: same objects, Parameters and hooks.
    Where its parent, by a forward without branches or side effects whose source can be read, feeds such a linear's
    output to one activation module and to nothing else, the linear computes the activation too, for whoever calls it,
    and nn.Identity stands in the activation's place. `coverage` says what runs where, and why. The biases train in
    place, so BitFit must be the only adapter; what they were is kept in host memory.

    Args:
        config: peft_kernels.LoraConfig, peft.LoraConfig or peft_kernels.BitFitConfig.
        adapter_dtype: of LoRA's adapters; default fp32 over a 16-bit base layer, else the base layer's dtype.

    Raises:
        ValueError: a target that does not exist or cannot be adapted, a setting not supported, a name that is taken.
        RuntimeError: adapters are merged.
    """
    inner = uncompiled(model)
    if isinstance(config, BitFitConfig):
        carry_out_biases(inner, plan_biases(inner, config, adapter_name, adapter_dtype))
    else:
        carry_out(inner, plan_injection(inner, config, adapter_name, adapter_dtype))
    return model
