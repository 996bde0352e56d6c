"""FusedLoRALinear: a linear layer with low-rank adapters that runs base and adapters in one kernel call."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..formats.nf4 import NF4Weight
from ..kernels.nf4_linear.autograd import nf4_linear
from .adapter import Adapter, AdapterSpec, check_name, name_list, new_adapter
from .base_linear import conv1d_class
from .bases import base_refusal
from .combine import Branch, RunsLoRALinear, adapted_linear
from .dispatch import give_dispatch, take_dispatch
from .hooks import move_hooks
from .nf4_base import NF4Base
from .nf4_linear import NF4Linear
from .quantisable import Quantisable


class FusedLoRALinear(RunsLoRALinear, Quantisable):
    """y = x W^T + bias + sum over active adapters of scaling_i (dropout_i(x) A_i^T B_i^T + lora_bias_i).

    Built by `from_linear`; holds the wrapped layer's very own `weight` and `bias` Parameters under the same names, so
    checkpoints of the base model still fit, and the adapters as `lora_A.<name>` [R, K], `lora_B.<name>` [N, R] and
    `lora_bias.<name>` [N]. fan_in_fan_out says that weight is [K, N] (transformers' Conv1D).

    Over a 4-bit base it holds NF4Linear's Parameters, and computes in the input's dtype (QLoRA).

    `state_dict()` describes the layer without merging, also while adapters are merged (see `merge`); loading one into
    a merged layer unmerges it first. Hooks see the layer's input and its output with the adapters in it.
    """

    def __init__(self, weight: nn.Parameter | NF4Base, bias: nn.Parameter | None = None, fan_in_fan_out: bool = False):
        super().__init__()
        if isinstance(weight, NF4Base):
            self.adopt(weight)
            self.out_features, self.in_features = weight.quantised.shape
        else:
            self.weight = weight
            self.in_features, self.out_features = weight.shape if fan_in_fan_out else reversed(weight.shape)
        self.register_parameter("bias", bias)
        self.fan_in_fan_out = fan_in_fan_out
        self.lora_A = nn.ParameterDict()
        self.lora_B = nn.ParameterDict()
        self.lora_bias = nn.ParameterDict()
        self.specs: dict[str, AdapterSpec] = {}
        self.scaling: dict[str, float] = {}
        self.disabled = False
        self._active: list[str] = []

    @classmethod
    def wrap(cls, linear: nn.Module) -> "FusedLoRALinear":
        """The layer without adapters yet, on the same Parameters; `linear` keeps its hooks until `take_over`.

        Raises:
            ValueError: `linear` is not an nn.Linear, Conv1D or NF4Linear that can be wrapped, with the reason.
        """
        reason = base_refusal(linear)
        if reason is not None:
            raise ValueError(f"FusedLoRALinear cannot wrap this layer: {reason}")
        small = isinstance(linear, NF4Linear)
        conv1d = linear.conv1d if small else conv1d_class(linear)
        layer = cls(linear if small else linear.weight, linear.bias, fan_in_fan_out=conv1d is not None)
        return layer.train(linear.training)

    def take_over(self, linear: nn.Module) -> None:
        """Move the hooks of the layer that `wrap` was given here: Torch's, and HF accelerate's (device_map).

        The handles that `register_forward_hook` and its like returned go on removing them. `linear` is left without.
        A hook is given the new layer; one that holds `linear` besides, in a closure, goes on seeing that.
        """
        hook = take_dispatch(linear)
        move_hooks(linear, self)
        give_dispatch(self, hook)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        lora_bias: bool = False,
        init_lora_weights: bool | str = True,
        adapter_name: str = "default",
        adapter_dtype: torch.dtype | None = None,
        base: str | None = None,
        blocksize: int = 64,
        double_quant: bool = False,
    ) -> "FusedLoRALinear":
        """Wrap an nn.Linear, transformers Conv1D or NF4Linear, whose Parameters are shared (no copy) and frozen here.

        Its hooks move to the new layer, with their handles, and get that layer as their `module`; HF accelerate's for
        a device_map too.

        Args:
            linear: the layer; weight [N, K] (Conv1D: [K, N]) of dtype fp64, fp32, bf16 or fp16.
            r: rank, at least 1.
            lora_alpha: the low-rank product is scaled by lora_alpha / r (use_rslora: lora_alpha / sqrt(r)).
            lora_dropout: probability in [0, 1) of dropping an element of x on the low-rank branch while training.
            lora_bias: give B a trainable bias [N], scaled with the product.
            init_lora_weights: True, "gaussian" or False, as HF PEFT draws them.
            adapter_dtype: default fp32 over a 16-bit base, else the base's dtype; over a 4-bit one that which it had.
            base: "nf4" or "fp4" quantises the weight (see NF4Linear), with this blocksize and double_quant; `linear`
                keeps its own. None leaves it as it is.

        Raises:
            ValueError: an argument out of range, or a layer that cannot be wrapped.
        """
        spec = AdapterSpec(r, lora_alpha, lora_dropout, use_rslora, lora_bias, init_lora_weights)
        layer = cls.wrap(linear)
        layer.attach(adapter_name, layer.new_adapter(spec, adapter_dtype))
        if base is not None:
            layer.quantize_base(base, blocksize, double_quant)
        layer.weight.requires_grad_(False)
        if layer.bias is not None:
            layer.bias.requires_grad_(False)
        layer.set_adapter(adapter_name)
        layer.take_over(linear)
        return layer

    def new_adapter(self, spec: AdapterSpec, adapter_dtype: torch.dtype | None = None) -> Adapter:
        """Parameters for one more adapter of this layer, not yet attached."""
        dtype = self.weight.dtype if self.quantised is None else self.quantised.dtype
        return new_adapter(spec, self.weight.device, dtype, self.in_features, self.out_features, adapter_dtype)

    def attach(self, name: str, adapter: Adapter) -> None:
        """Add an adapter under `name`: frozen and inactive until `set_adapter`.

        Raises:
            ValueError: the name is taken or not usable.
        """
        check_name(name)
        if name in self.specs:
            raise ValueError(f"adapter_name {name!r} is already on this layer, beside {list(self.specs)}")
        self.specs[name], self.scaling[name] = adapter.spec, adapter.spec.scaling
        self.lora_A[name] = adapter.lora_a.requires_grad_(False)
        self.lora_B[name] = adapter.lora_b.requires_grad_(False)
        if adapter.bias is not None:
            self.lora_bias[name] = adapter.bias.requires_grad_(False)

    def add_adapter(self, name: str, adapter_dtype: torch.dtype | None = None, **settings) -> None:
        """Add a freshly initialised adapter (`settings`: AdapterSpec's fields), inactive until `set_adapter`."""
        check_name(name)
        self.attach(name, self.new_adapter(AdapterSpec(**settings), adapter_dtype))

    def _require(self, names: list[str]) -> None:
        unknown = [name for name in names if name not in self.specs]
        if unknown:
            raise ValueError(f"no adapter {unknown} on this layer; there are {list(self.specs)}")

    @property
    def active_adapters(self) -> list[str]:
        return list(self._active)

    def set_adapter(self, names: str | list[str], inference_mode: bool = False) -> None:
        """Make these adapters the active ones, trainable unless inference_mode; all others are frozen."""
        names = name_list(names)
        self._require(names)
        self._refuse_merged("set the active adapters")
        self._active = names
        for parameters in (self.lora_A, self.lora_B, self.lora_bias):
            for name, parameter in parameters.items():
                parameter.requires_grad_(name in names and not inference_mode)

    def disable_adapters(self, disabled: bool = True) -> None:
        """Run the base layer alone (True), or with its active adapters again (False)."""
        if disabled:
            self._refuse_merged("disable adapters")
        self.disabled = disabled

    def delete_adapter(self, name: str) -> None:
        """Remove an adapter. One merged with restorable=False stays in the weight, which is the base weight then.

        Raises:
            ValueError: there is no such adapter.
            RuntimeError: adapters are merged, and `unmerge` could take them out.
        """
        self._require([name])
        if self.restorable:
            self._refuse_merged("delete an adapter")
        self.merged_adapters = [merged for merged in self.merged_adapters if merged != name]
        for store in (self.lora_A, self.lora_B, self.lora_bias, self.specs, self.scaling):
            if name in store:
                del store[name]
        self._active = [active for active in self._active if active != name]

    def set_scale(self, name: str, scale: float) -> None:
        """Multiply the adapter's own scaling (from its alpha and rank) by `scale`, replacing an earlier factor."""
        self._require([name])
        self.scaling[name] = scale * self.specs[name].scaling

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise every adapter anew; the base weight and bias are not touched."""
        for name, spec in self.specs.items():
            fresh = self.new_adapter(spec, self.lora_A[name].dtype)
            self.lora_A[name].copy_(fresh.lora_a)
            self.lora_B[name].copy_(fresh.lora_b)
            if fresh.bias is not None:
                self.lora_bias[name].copy_(fresh.bias)

    def branches(self) -> list[Branch]:
        if self.disabled or self.merged:
            return []
        return [
            Branch(
                self.lora_A[name],
                self.lora_B[name],
                self.scaling[name],
                self.lora_bias.get(name),
                self.specs[name].lora_dropout if self.training else 0.0,
            )
            for name in self._active
        ]

    def forward(self, input: Tensor) -> Tensor:
        """input [..., K] in weight's dtype (over 4 bits or under autocast any floating dtype) -> [..., N].

        Named as nn.Linear's, for callers that pass it by name.
        """
        branches = self.branches()
        if self.quantised is not None:
            small = self.nf4_weight(NF4Weight.unchecked)
            return (
                adapted_linear(input, small, self.bias, branches) if branches else nf4_linear(input, small, self.bias)
            )
        weight = self.weight.t() if self.fan_in_fan_out else self.weight
        return adapted_linear(input, weight, self.bias, branches) if branches else F.linear(input, weight, self.bias)

    def extra_repr(self) -> str:
        text = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        text += "" if self.quantised is None else f", base=({self.nf4_repr()})"
        for name, spec in self.specs.items():
            active = ", active" if name in self._active else ""
            text += f", {name}(r={spec.r}, lora_alpha={spec.lora_alpha}, dropout={spec.lora_dropout}{active})"
        return text + (f", merged={self.merged_adapters}" if self.merged else "")
