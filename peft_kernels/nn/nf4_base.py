"""What a layer over a 4-bit weight holds, and how that is moved, cast, saved and loaded."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from ..formats.nf4 import NF4Weight
from ..formats.nf4_state import Stored, from_state, to_state
from .nf4_sharded import is_sharded, on_one_mesh

NAMES = ("weight", "absmax", "nested_absmax", "nested_code", "nested_offset")
"""Of the Parameters, in the order of NF4Weight's tensors; `weight` holds the packed bytes."""

_FIELDS = ("packed", *NAMES[1:])


@dataclass(frozen=True)
class Quantised:
    """What the Parameters of a 4-bit weight do not say. offset: nested_offset's value, None where it is not known."""

    shape: tuple[int, int]
    dtype: torch.dtype
    quant_type: str
    blocksize: int
    offset: float | None
    storage: torch.dtype = torch.uint8


class NF4Base(nn.Module):
    """A layer that can hold a 4-bit weight, as frozen Parameters of plain dtypes: `NAMES`.

    Parameters and not buffers, so that FSDP2 shards them. Casts (`half()`, `to(bfloat16)`) leave them as they are. In a
    state_dict they stand in bitsandbytes' layout (`formats.nf4_state`), whose keys are not the Parameters' names.
    Of what torch.distributed.checkpoint.state_dict offers, ignore_frozen_params and broadcast_from_rank0 ask for those,
    and raise; all else works, full_state_dict=True too. Sharded, the JSON text has spaces behind it (see `to_state`),
    so that torch.distributed.checkpoint, which reads in place, finds the size that it expects in another sharded model.
    """

    quantised: Quantised | None = None
    """None while the layer's weight is a plain one."""

    def hold(self, stored: Stored) -> None:
        """Take the tensors of `stored` for Parameters, without a copy."""
        for name, tensor in zip(NAMES, stored.weight.tensors(), strict=True):
            parameter = None if tensor is None else nn.Parameter(tensor.detach(), requires_grad=False)
            self.register_parameter(name, parameter)
        self._describe(stored)

    def _describe(self, stored: Stored) -> None:
        weight = stored.weight
        self.quantised = Quantised(
            weight.shape, weight.dtype, weight.quant_type, weight.blocksize, stored.offset, stored.storage
        )

    def adopt(self, other: "NF4Base") -> None:
        """Take the very Parameters of another layer's 4-bit weight."""
        for name in NAMES:
            self.register_parameter(name, other._parameters[name])
        self.quantised = other.quantised

    def nf4_weight(self, make: Callable[..., NF4Weight] = NF4Weight) -> NF4Weight:
        """[N, K]: the Parameters as they are now, not a copy. A forward has NF4Weight.unchecked make it: 3 us less."""
        own, parameters = self.quantised, self._parameters
        tensors = [parameters[name] for name in NAMES]
        return make(*tensors, own.shape, own.dtype, own.quant_type, own.blocksize)

    def nf4_repr(self) -> str:
        own = self.quantised
        double = ", double_quant=True" if self.nested_absmax is not None else ""
        return f"quant_type={own.quant_type!r}, blocksize={own.blocksize}{double}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        if self.quantised is None:
            return super()._apply(fn, recurse)
        held = {id(self._parameters[name]) for name in NAMES}

        def in_its_dtype(tensor: Tensor) -> Tensor:
            out = fn(tensor)
            # Cast back, scales would be rounded: what a cast is asked to do to them is to go to a device at most.
            return out if id(tensor) not in held or out.dtype == tensor.dtype else tensor.to(out.device)

        return super()._apply(in_its_dtype, recurse)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.quantised is None:
            return
        for name in NAMES:
            destination.pop(prefix + name, None)
        stored = Stored(self.nf4_weight(), self.quantised.offset, self.quantised.storage)
        for key, tensor in to_state(stored, padded=is_sharded(self.weight)).items():
            destination[f"{prefix}weight{key}"] = tensor if keep_vars else tensor.detach()

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        """The weight whole, or an error with the key, and then nothing of this layer. Other settings than the layer's
        (type, blocksize, double quantisation) become the layer's; another shape is an error."""
        args = local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        if self.quantised is None:
            return super()._load_from_state_dict(state_dict, prefix, *args)
        # What the dict holds is known when the hooks have run: they may rename keys. Each runs once.
        hooks, self._load_state_dict_pre_hooks = self._load_state_dict_pre_hooks, OrderedDict()
        parameters, assign = self._parameters, local_metadata.get("assign_to_params_buffers", False)
        try:
            for hook in hooks.values():
                hook(state_dict, prefix, *args)
            name = f"{prefix}weight"
            found = {key: value for key, value in state_dict.items() if key == name or key.startswith(f"{name}.")}
            # The layer's own Parameters under their own names: set_model_state_dict adds them, they say nothing.
            own = {prefix + key for key in NAMES[1:] if state_dict.get(prefix + key) is parameters[key]}
            rest = {key: value for key, value in state_dict.items() if key not in found and key not in own}
            state = {key.removeprefix(name): value for key, value in found.items()}
            try:
                stored = self._read(name, state, assign) if state else None
            except ValueError as error:
                error_msgs.append(str(error))
                return
            if strict and not state:
                missing_keys.append(name)
            self._parameters = {key: value for key, value in parameters.items() if key not in NAMES}
            before = len(error_msgs)
            super()._load_from_state_dict(rest, prefix, *args)
            loaded, self._parameters = self._parameters, parameters
            parameters.update(loaded)  # assign=True puts new ones
            if stored is not None and len(error_msgs) == before:
                self._put(stored, assign)
        finally:
            self._parameters = parameters
            self._load_state_dict_pre_hooks = hooks

    def _read(self, name: str, state: dict[str, Tensor], assign: bool) -> Stored:
        own, dense = self.quantised, state.get("")
        if len(state) == 1 and isinstance(dense, Tensor) and dense.is_floating_point() and dense.shape == own.shape:
            raise ValueError(f"{name} is a {dense.dtype} weight that is not quantised: NF4Linear.from_linear does that")
        stored = from_state(name, state, own.shape)
        if stored.transposed:
            raise ValueError(f"{name} is stored transposed, in a row {list(dense.shape)}: pack it anew as [N, K]")
        if stored.weight.shape != own.shape:
            raise ValueError(f"{name} is of shape {list(stored.weight.shape)}; expected {list(own.shape)}")
        if dense.is_meta and not assign and not self.weight.is_meta:
            raise ValueError(f"{name} is on the meta device and holds no values")
        if self.weight.is_meta and not assign and not dense.is_meta:
            raise ValueError(f"{name} of the layer is on the meta device, where nothing can be copied to: assign=True")
        return stored

    @torch.no_grad()
    def _put(self, stored: Stored, assign: bool) -> None:
        stored = on_one_mesh(stored)
        old, new = [self._parameters[name] for name in NAMES], stored.weight.tensors()
        if assign:
            return self.hold(stored)
        if not all(map(_alike, old, new)):
            own = [None if tensor is None else tensor.to(self.weight.device, copy=True) for tensor in new]
            weight = replace(stored.weight, **dict(zip(_FIELDS, own, strict=True)))
            return self.hold(replace(stored, weight=weight))
        for parameter, tensor in zip(old[:-1], new[:-1], strict=True):
            if parameter is not None:
                parameter.copy_(tensor)
        if stored.offset is not None:
            self.nested_offset.fill_(stored.offset)  # a number, wherever the Parameter is sharded
        self._describe(stored)

    def _fqn_modifiers(self) -> dict[str, str]:
        """For torch.distributed's get_model_state_dict, which asks the model for every key, attribute by attribute."""
        return {} if self.quantised is None else {"weight": "_by_key"}

    @property
    def _by_key(self) -> SimpleNamespace:
        small = self.quantised
        text = SimpleNamespace(**{f"bitsandbytes__{small.quant_type}": None})
        parts = {"absmax": self.absmax, "quant_map": None, "quant_state": text}
        parts |= {"nested_absmax": self.nested_absmax, "nested_quant_map": self.nested_code}
        return SimpleNamespace(weight=SimpleNamespace(**parts))


def _alike(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and a.dtype == b.dtype
