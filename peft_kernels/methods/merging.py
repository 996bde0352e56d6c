"""Merging a whole model's adapters into its weights and back: every layer or none."""

from torch import nn

from ..nn.adapter import name_list
from ..nn.lora_linear import FusedLoRALinear
from ..nn.merging import INTO_4_BITS
from .adapters import biases_to, check_known, fused_layers, layers_or_error, refuse_merged
from .bias_adapter import bias_adapter
from .walk import uncompiled


def _refuse_tied(model: nn.Module, layers: list[tuple[str, FusedLoRALinear]]) -> None:
    """Merging writes a weight in place: another module that holds it would change with it."""

    def memory(parameter: nn.Parameter) -> int:
        return parameter.data_ptr() or id(parameter)  # no address on the meta device

    own: dict[int, str] = {}
    for name, layer in layers:
        for parameter in (layer.weight, layer.bias):
            if parameter is not None:
                own.setdefault(memory(parameter), name)
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            holder = own.get(memory(parameter), name)
            if holder != name:
                raise ValueError(
                    f"cannot merge: the weight or bias of {holder} is shared with {name}, which would change too; "
                    "untie them first"
                )


def _refuse_quantised(work: list[tuple[str, FusedLoRALinear, list[str]]]) -> None:
    for name, layer, _ in work:
        if layer.quantised is not None:
            raise RuntimeError(f"{name}: {INTO_4_BITS}")


def merge(
    model: nn.Module, adapter_names: str | list[str] | None = None, safe_merge: bool = False, restorable: bool = True
) -> None:
    """Merge adapters (default: the active ones) into the base weights of every layer; all layers or none.

    restorable=True keeps each original weight in host memory (the merged layers' weight bytes) for `unmerge`, and for
    `model.state_dict()`, which holds the base weights also while they are merged. With restorable=False it raises
    until the merged adapters are deleted: after `delete_adapter` it holds the merged weights alone, under the base
    model's names. Loading a state_dict unmerges first.

    BitFit's biases stand in the model already: merged, they are frozen there, as they are to the bit and in every
    `state_dict()`, and the layers and activations are the ones that were there before. `unmerge` makes them an adapter
    again, which `disable_adapter` and `delete_adapter` take out bit for bit (buffers are not kept: see there).

    Raises:
        ValueError: an adapter unknown or named twice, a weight that another module shares, a value that is not finite.
        RuntimeError: adapters are merged already, a base weight is in 4 bits (see `dequantize`), or a lora_bias has no
            base bias.
    """
    adapter_names, model = None if adapter_names is None else name_list(adapter_names), uncompiled(model)
    check_known(model, adapter_names or [])
    refuse_merged(model, "merge")
    biases = biases_to(model, "merge")
    if biases is not None:
        if adapter_names != []:
            biases.merge(model, safe_merge, restorable)
        return
    work = []
    for name, layer in fused_layers(model):
        names = layer.active_adapters if adapter_names is None else [n for n in adapter_names if n in layer.specs]
        if names:
            work.append((name, layer, names))
    _refuse_quantised(work)
    _refuse_tied(model, [(name, layer) for name, layer, _ in work])
    for name, layer, names in work:
        if layer.bias is None and any(adapter in layer.lora_bias for adapter in names):
            raise RuntimeError(f"{name}: cannot merge a lora_bias, the base layer has no bias")
    done = []
    for name, layer, names in work:
        try:
            layer.merge(names, safe_merge, restorable or safe_merge)
        except ValueError as error:
            for earlier in done:
                earlier.unmerge()
            raise ValueError(f"{name}: {error}") from error
        done.append(layer)
    if not restorable:
        for layer in done:
            layer.forget_base()


def unmerge(model: nn.Module) -> None:
    """Give every merged layer its base weight back, bit for bit; the adapters that were active run again.

    Raises:
        RuntimeError: nothing is merged, or it was merged with restorable=False.
    """
    model = uncompiled(model)
    biases = bias_adapter(model)
    if biases is not None and biases.merged:
        return biases.unmerge(model)
    merged = [layer for _, layer in ([] if biases is not None else layers_or_error(model)) if layer.merged]
    if not merged:
        raise RuntimeError("cannot unmerge: no adapter is merged")
    for layer in merged:
        layer.unmerge()
