"""The QLoRA linear's contenders: the frozen 16-bit floor, ours, PEFT over bitsandbytes, and PyTorch by hand."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peft_kernels as pk
from peft_kernels._core.registry import OWNERS

from .bitsandbytes_layers import linear4bit
from .environment import version
from .failures import FAILURES, because
from .held import saved_bytes
from .lora_linear_check import SCALING, Inputs, Layer, LoRACase, forward, make_inputs, step, value_errors
from .measure import Contender, input_sets

_OURS = "peft_kernels"


@dataclass(frozen=True)
class QLoRAInputs(Inputs):
    """weight holds the 4-bit weight's values in fp32, for the truth; `dense` the same in the case's dtype."""

    quantised: pk.NF4Weight
    dense: Tensor


def make(case: LoRACase, device: str, seed: int) -> QLoRAInputs:
    """The LoRA linear's inputs over a weight in NF4 with double quantisation, QLoRA's setting."""
    drawn = make_inputs(case, device, seed)
    quantised = pk.nf4_quantize(drawn.weight, double_quant=True)
    shared = {f.name: getattr(drawn, f.name) for f in fields(drawn)}
    shared["weight"] = pk.nf4_dequantize(quantised, torch.float32)
    return QLoRAInputs(**shared, quantised=quantised, dense=pk.nf4_dequantize(quantised, case.dtype))


def frozen(case: LoRACase, inputs: QLoRAInputs) -> Layer:
    """The floor: what the frozen linear costs in 16 bits, without an adapter, forward and dx."""
    return Layer(lambda x: F.linear(x, inputs.dense))


def ours(case: LoRACase, inputs: QLoRAInputs) -> Layer:
    a, b, weight = inputs.lora_a, inputs.lora_b, inputs.quantised
    return Layer(lambda x: pk.qlora_linear(x, weight, a, b, SCALING, None, case.dropout), (a, b))


def ours_16_bit(case: LoRACase, inputs: QLoRAInputs) -> Layer:
    """The LoRA linear over a 16-bit base: what 4 bits cost is the ratio to it."""
    a, b = inputs.lora_a, inputs.lora_b
    return Layer(lambda x: pk.lora_linear(x, inputs.dense, a, b, SCALING, None, case.dropout), (a, b))


def dequantised(case: LoRACase, inputs: QLoRAInputs) -> Layer:
    """What one writes by hand: our dequantise, then PyTorch, which keeps the dequantised weight for its backward."""
    a, b, dropout = inputs.lora_a, inputs.lora_b, nn.Dropout(case.dropout)

    def forward(x: Tensor) -> Tensor:
        weight = pk.nf4_dequantize(inputs.quantised, case.dtype)
        return F.linear(x, weight) + F.linear(F.linear(dropout(x), a), b) * SCALING

    return Layer(forward, (a, b), dropout)


def peft_layer(case: LoRACase, inputs: QLoRAInputs) -> Layer:
    """PEFT's LoRA layer over Linear4bit, with the same adapter values in the base's compute dtype."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=case.R, lora_alpha=round(SCALING * case.R), lora_dropout=case.dropout, target_modules=["linear"]
    )
    base = nn.Sequential(OrderedDict(linear=linear4bit(inputs.quantised, case.dtype)))
    layer = get_peft_model(base, config, autocast_adapter_dtype=False).train().base_model.model.linear
    a, b = layer.lora_A["default"].to(case.dtype).weight, layer.lora_B["default"].to(case.dtype).weight
    a.data.copy_(inputs.lora_a.detach())
    b.data.copy_(inputs.lora_b.detach())
    dropout = layer.lora_dropout["default"]
    return Layer(layer, (a, b), dropout if isinstance(dropout, nn.Dropout) else None)


def _saved(case: LoRACase, inputs: QLoRAInputs, build) -> int:
    layer = build(case, inputs)
    weights = [tensor for tensor in (*inputs.quantised.tensors(), inputs.dense) if tensor is not None]
    owned = (*weights, inputs.lora_a, inputs.lora_b, *layer.trained)
    return saved_bytes(lambda: layer.forward(inputs.x), owned)


def of_layers(layers, M: int, R: int, dtype: torch.dtype, dropout: float) -> list[LoRACase]:
    """The cases of a model's linear layers, each given as its (in, out) features."""
    return [LoRACase(M, N, K, R, dtype, dropout) for K, N in layers]


def _field(device: str) -> list[tuple]:
    owner, torch_version = OWNERS["lora_linear_fwd", device.upper()], f"torch {torch.__version__}"
    peft = f"peft {version('peft')}, bitsandbytes {version('bitsandbytes')}"
    return [
        ("frozen linear, 16 bits", "floor", torch_version, "", frozen),
        (_OURS, "ours", owner, "", ours),
        (f"{_OURS}, 16-bit base", "ours", owner, "", ours_16_bit),
        ("PEFT over bitsandbytes", "peer", peft, _OURS, peft_layer),
        ("dequantise, then PyTorch", "peer", torch_version, _OURS, dequantised),
    ]


def contenders(case: LoRACase, device: str, seed: int = 0, field: Sequence[tuple] | None = None) -> list[Contender]:
    """Every contender of the case, or of another `field`, bound to rotating input sets that all of them share, drawn
    from `seed` on."""
    sets = [make(case, device, seed + i) for i in range(input_sets(case.set_bytes, device))]
    found = []
    for name, role, implementation, rival, build in field or _field(device):
        contender = Contender(name, role, sets=len(sets), implementation=implementation, rival=rival)
        found.append(contender)
        absent = [one for one in ("peft", "bitsandbytes") if version(one) == "none"]
        if build is peft_layer and absent:
            contender.missing = f"not installed: pip install {' '.join(absent)}"
            continue
        try:
            layers = [build(case, inputs) for inputs in sets]
        except FAILURES as error:
            contender.missing = because(error)
            continue
        contender.step = lambda i, layers=layers: step(layers[i % len(sets)], sets[i % len(sets)])
        contender.check = lambda layers=layers: value_errors(case, sets[0], layers[0])
        contender.saved = lambda build=build: _saved(case, sets[0], build)
        contender.forward = lambda i, layers=layers: forward(layers[i % len(sets)], sets[i % len(sets)])
    return found
