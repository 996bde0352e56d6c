"""accelerate: HF PEFT's own LoRA linears run our op. Same modules, same Parameters, same state_dict."""

from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn

from ..nn.base_linear import conv1d_class
from ..nn.bases import base_refusal
from ..nn.combine import Branch, RunsLoRALinear, adapted_linear
from ..nn.dispatch import dispatch_refusal, give_dispatch, replaced_forward, take_dispatch, through_dispatch
from ..nn.hooks import has_hooks
from ..nn.merging import INTO_4_BITS
from ..nn.nf4_linear import NF4Linear


def _needs_its_call(part: nn.Module) -> str | None:
    """Why a part has to be called, which the fused forward does not do: it takes its tensors."""
    if has_hooks(part):
        return "has forward or backward hooks"
    if "forward" not in part.__dict__:
        return None
    if replaced_forward(part, type(part)):
        return "has a forward of its own"
    reason = dispatch_refusal(part)
    return None if reason is None else f"must be called: {reason}"


class FusedPeftLinear(RunsLoRALinear, PeftLinear):
    """HF PEFT's lora.Linear with another forward; an instance of it becomes one by a change of class.

    Everything else (merging, saving, switching, hot swapping) stays HF PEFT's own. What this forward does not do is
    passed to HF PEFT's, and `fallback` says why.
    """

    @property
    def disabled(self) -> bool:
        return self.disable_adapters

    def _own(self) -> list[str]:
        return [name for name in self.active_adapters if name in self.lora_A]

    def branches(self) -> list[Branch]:
        if self.disable_adapters or self.merged:
            return []
        found = []
        for name in self._own():
            lora_a, lora_b, dropout = self.lora_A[name], self.lora_B[name], self.lora_dropout[name]
            dropout_p = dropout.p if dropout.training and isinstance(dropout, nn.Dropout) else 0.0
            found.append(Branch(lora_a.weight, lora_b.weight, self.scaling[name], lora_b.bias, dropout_p))
        return found

    def fallback(self) -> str | None:
        for name in self._own():
            if name in self.lora_variant:
                return f"adapter {name} is a {type(self.lora_variant[name]).__name__}"
            if not isinstance(self.scaling[name], float | int):
                return f"adapter {name} has a tensor for a scaling, which would have to be read from the device"
            for part in ("lora_A", "lora_B", "lora_dropout"):
                reason = _needs_its_call(getattr(self, part)[name])
                if reason is not None:
                    return f"{part}.{name} {reason}"
        reason = _needs_its_call(self.base_layer)
        return None if reason is None else f"base_layer {reason}"

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        branches = self.branches()
        if args or kwargs or not branches or self.fallback() is not None:
            return super().forward(x, *args, **kwargs)
        base = self.base_layer
        if isinstance(base, NF4Linear):
            weight = base.nf4_weight()
        else:
            weight = base.weight if conv1d_class(base) is None else base.weight.t()
        return through_dispatch(base, lambda x: adapted_linear(x, weight, base.bias, branches), x)

    def merge(self, *args, **kwargs) -> None:
        """HF PEFT's.

        Raises:
            RuntimeError: over a 4-bit weight.
        """
        if isinstance(self.get_base_layer(), NF4Linear):
            raise RuntimeError(INTO_4_BITS)
        super().merge(*args, **kwargs)


def _over_bitsandbytes(layer: nn.Module) -> bool:
    """HF PEFT's wrapper around bitsandbytes' Linear4bit, which `from_bitsandbytes` has made an NF4Linear since."""
    cls = type(layer)
    return (cls.__module__, cls.__name__) == ("peft.tuners.lora.bnb", "Linear4bit") and isinstance(
        layer.base_layer, NF4Linear
    )


def _refusal(layer: nn.Module) -> str | None:
    if type(layer) is not PeftLinear and not _over_bitsandbytes(layer):
        return f"{type(layer).__module__}.{type(layer).__name__} is not peft's lora.Linear"
    if replaced_forward(layer, type(layer)):
        return "its forward was replaced"
    reason = dispatch_refusal(layer)
    if reason is not None:
        return reason
    parts = {"base_layer": layer.base_layer}
    for name in layer.lora_A:
        parts[f"lora_A.{name}"], parts[f"lora_B.{name}"] = layer.lora_A[name], layer.lora_B[name]
        if not isinstance(layer.lora_dropout[name], nn.Dropout | nn.Identity):
            return f"lora_dropout.{name} is a {type(layer.lora_dropout[name]).__name__}"
    for name, part in parts.items():
        reason = base_refusal(part, replaced=False)
        if reason is not None:
            return f"{name}: {reason}"
    return None


def accelerate(model: nn.Module) -> nn.Module:
    """Let the LoRA linears of a model wrapped by HF PEFT run peft_kernels, in place; returns the model.

    Layers that cannot (quantised or offloaded bases, embeddings, convolutions) keep HF PEFT's forward; those over
    bitsandbytes' 4 bits can after `from_bitsandbytes(model)`.
    `coverage(model)` lists them. Hooks on a layer run as before. While there are hooks on its parts (base_layer,
    lora_A, ...) it runs HF PEFT's forward, which calls them, and `coverage` says so; HF accelerate's hooks for a
    device_map do not count there, they run around the fused forward.

    Raises:
        ValueError: no layer could be taken, with the reason for each.
    """
    refused = {}
    taken = 0
    for name, module in model.named_modules():
        if isinstance(module, FusedPeftLinear):
            taken += 1
        elif "base_layer" in module._modules:
            reason = _refusal(module)
            if reason is None:
                hook = take_dispatch(module)
                if type(module) is not PeftLinear:  # what lora.Linear has beside
                    module.is_target_conv_1d_layer = False
                module.__class__ = FusedPeftLinear
                give_dispatch(module, hook)
                taken += 1
            else:
                refused[name] = reason
    if not taken:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items()) or "it has no HF PEFT layer"
        raise ValueError(f"accelerate found nothing to take in {type(model).__name__}: {reasons}")
    return model
