"""bitsandbytes' layers over this package's 4-bit weights: the peer on the very same bytes."""

import torch
from torch import nn

import peft_kernels as pk


def quant_state(weight: pk.NF4Weight):
    """The QuantState of `weight`, over its own tensors."""
    from bitsandbytes.functional import QuantState, get_4bit_type  # a peer: only here when it is installed

    second = None
    if weight.double_quant:
        second = QuantState(absmax=weight.nested_absmax, code=weight.nested_code, blocksize=256, dtype=torch.float32)
    return QuantState(
        absmax=weight.absmax,
        shape=torch.Size(weight.shape),
        code=get_4bit_type(weight.quant_type, device=weight.device),
        blocksize=weight.blocksize,
        quant_type=weight.quant_type,
        dtype=weight.dtype,
        offset=weight.nested_offset.squeeze() if weight.double_quant else None,
        state2=second,
    )


def linear4bit(weight: pk.NF4Weight, compute_dtype: torch.dtype, bias: nn.Parameter | None = None) -> nn.Module:
    """bnb.nn.Linear4bit that holds `weight` [N, K] itself, no copy; double quantisation is expected."""
    import bitsandbytes as bnb  # a peer: only here when it is installed

    (N, K), settings = weight.shape, {"compress_statistics": True, "quant_type": weight.quant_type}
    linear = bnb.nn.Linear4bit(K, N, bias=False, compute_dtype=compute_dtype, device="meta", **settings)
    packed = weight.packed.view(-1, 1)
    linear.weight = bnb.nn.Params4bit(
        packed, False, quant_state=quant_state(weight), bnb_quantized=True, quant_type=weight.quant_type
    )
    linear.bias = bias
    return linear


def state_tensors(parameter: torch.Tensor) -> list[torch.Tensor]:
    """What bitsandbytes keeps of a 4-bit parameter beside its bytes; no module lists it. Of any other tensor []."""
    state = getattr(parameter, "quant_state", None)
    if state is None:
        return []
    second = () if state.state2 is None else (state.state2.absmax, state.state2.code, state.offset)
    return [state.absmax, state.code, *second]


def with_linear4bit(model: nn.Module, compute_dtype: torch.dtype) -> nn.Module:
    """`model` with Linear4bit in the place of each NF4Linear."""
    for name, layer in [(name, layer) for name, layer in model.named_modules() if isinstance(layer, pk.NF4Linear)]:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, linear4bit(layer.nf4_weight(), compute_dtype, layer.bias))
    return model
