"""The LoRA linear's contenders: the frozen floor, ours, HF PEFT as its users call it, and the plain composition."""

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peft_kernels as pk
from peft_kernels._core import native
from peft_kernels._core.registry import OWNERS
from peft_kernels.kernels.lora_linear import configs
from peft_kernels.kernels.lora_linear.op import general_because

from .environment import version
from .failures import FAILURES, because
from .held import saved_bytes
from .lora_linear_check import SCALING, Build, Inputs, Layer, LoRACase, forward, make_inputs, step, value_errors
from .measure import Contender, input_sets

_OURS = "peft_kernels"
_OURS_FP32 = "peft_kernels, fp32 adapters"


def _adapters(inputs: Inputs, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    if dtype is None:
        return inputs.lora_a, inputs.lora_b
    return tuple(t.detach().to(dtype, copy=True).requires_grad_() for t in (inputs.lora_a, inputs.lora_b))


def frozen(case: LoRACase, inputs: Inputs) -> Layer:
    """The floor: what the frozen linear costs without an adapter, forward and dx, by the same library."""
    return Layer(lambda x: F.linear(x, inputs.weight))


def ours(
    adapter_dtype: torch.dtype | None = None,
    train_a: bool = True,
    within: Callable[[], AbstractContextManager] = nullcontext,
) -> Build:
    """`within()` is a context manager under which a step runs (a GEMM path by name)."""

    def build(case: LoRACase, inputs: Inputs) -> Layer:
        a, b = _adapters(inputs, adapter_dtype)
        a = a if train_a else a.detach()
        return Layer(
            lambda x: pk.lora_linear(x, inputs.weight, a, b, SCALING, None, case.dropout),
            (a, b) if train_a else (b,),
            within=within,
        )

    return build


def composition(case: LoRACase, inputs: Inputs) -> Layer:
    """What one writes by hand in PyTorch."""
    a, b, weight, dropout = inputs.lora_a, inputs.lora_b, inputs.weight, nn.Dropout(case.dropout)

    def forward(x: Tensor) -> Tensor:
        return F.linear(x, weight) + F.linear(F.linear(dropout(x), a), b) * SCALING

    return Layer(forward, (a, b), dropout)


def peft_layer(fp32_adapters: bool, compiled: bool = False) -> Build:
    """PEFT's `lora.Linear` as `get_peft_model` makes it, over the same weight and with the same adapter values.

    fp32_adapters: PEFT's default (`autocast_adapter_dtype=True`), which keeps 16-bit models' adapters in fp32.
    """

    def build(case: LoRACase, inputs: Inputs) -> Layer:
        from peft import LoraConfig, get_peft_model  # a peer: only here when it is installed

        linear = nn.utils.skip_init(nn.Linear, case.K, case.N, bias=False, dtype=case.dtype, device=inputs.x.device)
        linear.weight = nn.Parameter(inputs.weight, requires_grad=False)
        config = LoraConfig(
            r=case.R, lora_alpha=round(SCALING * case.R), lora_dropout=case.dropout, target_modules=["linear"]
        )
        model = nn.Sequential(OrderedDict(linear=linear))
        model = get_peft_model(model, config, autocast_adapter_dtype=fp32_adapters).train()
        layer = model.base_model.model.linear
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        a.data.copy_(inputs.lora_a.detach())
        b.data.copy_(inputs.lora_b.detach())
        dropout = layer.lora_dropout["default"]
        forward = torch.compile(layer, dynamic=False) if compiled else layer
        return Layer(forward, (a, b), dropout if isinstance(dropout, nn.Dropout) else None)

    return build


def layer_saved_bytes(case: LoRACase, inputs: Inputs, build: Build) -> int:
    """Bytes that one layer keeps for backward, x included, parameters not."""
    layer = build(case, inputs)
    parameters = (inputs.weight, inputs.lora_a, inputs.lora_b, *layer.trained)
    return saved_bytes(lambda: layer.forward(inputs.x), parameters)


def arch_here() -> int | str:
    """The key of this GPU in the config table: 90 for compute capability 9.0, "gfx942" on ROCm."""
    if torch.version.hip:
        return torch.cuda.get_device_properties(0).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


@contextlib.contextmanager
def general_kernels() -> Iterator[None]:
    """Inside, the CUDA extension hands every call on to the Triton kernels."""
    native.EXTENSIONS["_C_cuda"].enable_hopper(False)
    try:
        yield
    finally:
        native.EXTENSIONS["_C_cuda"].enable_hopper(True)


def _taken(case: LoRACase) -> bool:
    x, weight, lora_a, lora_b = (
        torch.empty(shape, dtype=case.dtype, device="cuda")
        for shape in ((1, case.K), (case.N, case.K), (case.R, case.K), (case.N, case.R))
    )
    return general_because(x, weight, lora_a, lora_b, case.dropout > 0) == ""


def _kernels(case: LoRACase, device: str) -> str:
    """What runs ours by its default choice; fp32 adapters go the same way."""
    owner = OWNERS["lora_linear_fwd", device.upper()]
    if device != "cuda" or owner != "native":
        return owner
    return "CUDA C++ (Hopper)" if _taken(case) else "general"


def _our_field(case: LoRACase, device: str) -> list[tuple[str, str, str, str, Build]]:
    """Ours by its default choice and, on a GPU with Triton, by its kernels alone and by each GEMM path by name."""
    owner = OWNERS["lora_linear_fwd", device.upper()]
    if device != "cuda" or not native.HAS_TRITON:
        return [(_OURS, "ours", owner, "", ours())]
    if owner == "native":
        return [
            (_OURS, "ours", _kernels(case, device), "", ours()),
            (f"{_OURS}, Triton", "ours", "triton", "", ours(within=general_kernels)),
        ]
    picked = configs.pick_config(case.M, case.N, case.K, case.R, case.dtype, arch_here(), case.dropout > 0)
    source = "measured" if picked.measured else "model"
    found = [(_OURS, "ours", f"triton {picked.path} (chosen: {source})", "", ours())]
    for path in configs.PATHS:
        found.append((f"{_OURS}, {path}", "ours", f"triton {path}", "", ours(within=partial(configs.force, path=path))))
    return found


def _field(case: LoRACase, device: str) -> list[tuple[str, str, str, str, Build]]:
    """(name, role, implementation, rival, build) of every contender, whether its peer is installed or not."""
    torch_version, peft = f"torch {torch.__version__}", f"peft {version('peft')}"
    found = [
        ("frozen linear", "floor", torch_version, "", frozen),
        *_our_field(case, device),
        ("PEFT", "peer", peft, _OURS, peft_layer(False)),
        ("PyTorch composition", "peer", torch_version, _OURS, composition),
    ]
    if case.dtype.itemsize == 2:
        found += [
            (_OURS_FP32, "ours", _kernels(case, device), "", ours(torch.float32)),
            ("PEFT, fp32 adapters (its default)", "peer", peft, _OURS_FP32, peft_layer(True)),
        ]
    if case.compiled:
        found.append(("PEFT, torch.compile", "peer", peft, _OURS, peft_layer(False, compiled=True)))
    return found


def work(sizes: dict[str, float], dtype: str, floor: bool) -> tuple[float, float]:
    """Bytes that the kernels must move, and their FLOPs, forward and backward; the floor's without adapters."""
    M, N, K, R = (sizes[name] for name in "MNKR")
    every = configs.floors(M, N, K, R, getattr(torch, dtype), configs.PARTS[90])
    parts = [one for name, one in every.items() if (name == "frozen") == floor]
    return sum(one["bytes"] for one in parts), sum(one["flops"] for one in parts)


def of_layers(
    layers: Collection[tuple[int, int]], M: int, R: int, dtype: torch.dtype, dropout: float
) -> list[LoRACase]:
    """The cases of a model's linear layers, each given as its (in, out) features.

    Raises:
        ValueError: R is over a layer's smaller side.
    """
    most = min(map(min, layers))
    if not 1 <= R <= most:
        raise ValueError(f"rank is {R}; expected 1 to {most}, the smaller side of the model's smallest linear layer")
    return [LoRACase(M, N, K, R, dtype, dropout) for K, N in layers]


def contenders(case: LoRACase, device: str, seed: int = 0) -> list[Contender]:
    """Every contender of the case, bound to rotating input sets that all of them share, drawn from `seed` on."""
    sets = [make_inputs(case, device, seed + i) for i in range(input_sets(case.set_bytes, device))]
    found = []
    for name, role, implementation, rival, build in _field(case, device):
        contender = Contender(name, role, sets=len(sets), implementation=implementation, rival=rival)
        found.append(contender)
        if name.startswith("PEFT") and version("peft") == "none":
            contender.missing = "not installed: pip install peft"
            continue
        try:
            layers = [build(case, inputs) for inputs in sets]
        except FAILURES as error:
            contender.missing = because(error)
            continue
        contender.step = lambda i, layers=layers: step(layers[i % len(sets)], sets[i % len(sets)])
        contender.check = lambda layers=layers: value_errors(case, sets[0], layers[0])
        if not name.endswith("compile"):  # its graph keeps tensors that no hook sees, and frees them in its backward
            contender.saved = lambda build=build: layer_saved_bytes(case, sets[0], build)
            contender.forward = lambda i, layers=layers: forward(layers[i % len(sets)], sets[i % len(sets)])
    return found
