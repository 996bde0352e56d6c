"""accelerate: HF PEFT's own LoRA linears run our op. Same modules, same Parameters, same state_dict."""

from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn

from ..nn.base_linear import conv1d_class, has_hooks, refusal
from ..nn.combine import Branch, RunsLoRALinear, adapted_linear


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
                if has_hooks(getattr(self, part)[name]):
                    return f"{part}.{name} has forward or backward hooks"
        if has_hooks(self.base_layer):
            return "base_layer has forward or backward hooks"
        return None

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        branches = self.branches()
        if args or kwargs or not branches or self.fallback() is not None:
            return super().forward(x, *args, **kwargs)
        base = self.base_layer
        weight = base.weight if conv1d_class(base) is None else base.weight.t()
        return adapted_linear(x, weight, base.bias, branches)


def _refusal(layer: nn.Module) -> str | None:
    if type(layer) is not PeftLinear:
        return f"{type(layer).__module__}.{type(layer).__name__} is not peft's lora.Linear"
    parts = {"base_layer": layer.base_layer}
    for name in layer.lora_A:
        parts[f"lora_A.{name}"], parts[f"lora_B.{name}"] = layer.lora_A[name], layer.lora_B[name]
        if not isinstance(layer.lora_dropout[name], nn.Dropout | nn.Identity):
            return f"lora_dropout.{name} is a {type(layer.lora_dropout[name]).__name__}"
    for name, part in parts.items():
        reason = refusal(part)
        if reason is not None:
            return f"{name}: {reason}"
    return None


def accelerate(model: nn.Module) -> nn.Module:
    """Let the LoRA linears of a model wrapped by HF PEFT run peft_kernels, in place; returns the model.

    Layers that cannot (quantised bases, embeddings, convolutions) keep HF PEFT's forward; `coverage(model)` lists them.

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
                module.__class__ = FusedPeftLinear
                taken += 1
            else:
                refused[name] = reason
    if not taken:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items()) or "it has no HF PEFT layer"
        raise ValueError(f"accelerate found nothing to take in {type(model).__name__}: {reasons}")
    return model
