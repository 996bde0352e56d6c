"""The machine-code gate: every Triton kernel of every plan, compiled for GPUs that are not here, and read.

On each part: no spills, registers and shared memory within limits (and within the estimate that configs.py plans with),
the part's matrix instruction, 128-bit loads of x and dy, copies that run ahead of the arithmetic.
"""

from dataclasses import dataclass

import pytest
import torch

pytest.importorskip("triton", reason="the Triton kernels need Triton, which is optional")

import aot
from aot_nf4_cases import test_nf4_dequantize, test_nf4_quantize  # noqa: F401 - collected here
from aot_nf4_linear_cases import test_nf4_linear  # noqa: F401 - collected here
from aot_norm_cases import test_norms  # noqa: F401 - collected here

from peft_kernels.kernels._shared import columns, sums
from peft_kernels.kernels.bias_grad import triton_act
from peft_kernels.kernels.bias_grad import triton_impl as bias_grad
from peft_kernels.kernels.bias_grad.activations import ACTIVATIONS
from peft_kernels.kernels.lora_linear import triton_impl, triton_launch
from peft_kernels.kernels.lora_linear.configs import force, pick_config
from peft_kernels.kernels.lora_linear.parts import PARTS, Part
from peft_kernels.kernels.lora_linear.tiles import GEMM_TILES, family, problem, shared_bytes

M, N, K = 8192, 4096, 4096
KERNEL_NAMES = {
    "_lora_gemm_kernel": "gemm",
    "_lora_down_kernel": "down",
    "_lora_bwd_dy_kernel": "bwd_dy",
    "_lora_bwd_da_kernel": "bwd_da",
}


@dataclass(frozen=True)
class Call:
    """One forward and backward; together the calls take every flag of every kernel, at least once per part."""

    name: str
    R: int
    dtype: torch.dtype = torch.bfloat16
    adapters: torch.dtype | None = None
    dropout: bool = False
    bias: bool = True
    transposed: bool = False  # the weight is a transposed view (GPT-2's Conv1D)
    plan: tuple = (("path", "k_extension"),)


CALLS = (
    Call("bf16-r16", 16),
    Call("bf16-r16-drop", 16, dropout=True, bias=False),
    Call("bf16-r64-drop-transposed", 64, dropout=True, transposed=True),
    Call("bf16-r128-drop", 128, dropout=True),
    Call("bf16-r64-one-pass", 64, plan=(("dy_passes", 1), ("path", "beta_one"))),
    Call("fp16-r64-fp32-adapters-beta-one-drop", 64, torch.float16, torch.float32, True, plan=(("path", "beta_one"),)),
    Call("fp16-r32", 32, torch.float16, transposed=True),
    Call("fp32-r16", 16, torch.float32),
    Call("fp32-r64-drop", 64, torch.float32, dropout=True),
    Call("fp32-r128-drop", 128, torch.float32, dropout=True),
)


def record(call: Call, arch: int | str, monkeypatch, M: int = M) -> list[aot.Launch]:
    """The launches of a forward and backward on `arch`, from tensors that have no memory."""
    monkeypatch.setattr(triton_impl, "arch_of", lambda device: arch)

    def tensor(*shape: int, dtype: torch.dtype = call.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    adapters = call.adapters or call.dtype
    lora_a, lora_b = tensor(call.R, K, dtype=adapters), tensor(N, call.R, dtype=adapters)
    weight = tensor(K, N).t() if call.transposed else tensor(N, K)
    seed = tensor(1, dtype=torch.int64) if call.dropout else None
    x, bias = tensor(M, K), tensor(N) if call.bias else None
    with force(**dict(call.plan)), aot.recording(triton_launch, sums) as launches:
        _, s, mask = triton_impl.lora_linear_fwd(x, weight, lora_a, lora_b, bias, seed, 2.0, 6554)
        triton_impl.lora_linear_bwd(tensor(M, N), x, weight, lora_a, lora_b, s, mask, 2.0, True, True, True, True)
    return launches


def _check_limits(compiled: aot.Compiled, part: Part, what: str) -> None:
    assert compiled.spills == 0, f"{what}: {compiled.spills} spills"
    if isinstance(part.arch, int):
        assert compiled.registers <= 255, f"{what}: {compiled.registers} registers"
    assert compiled.shared <= part.shared_bytes, f"{what}: {compiled.shared} bytes of shared memory"


def _check_estimate(launch: aot.Launch, compiled: aot.Compiled, call: Call, part: Part, what: str) -> None:
    kernel, keys = KERNEL_NAMES[launch.kernel.__name__], launch.keywords
    config = pick_config(M, N, K, call.R, call.dtype, part.arch, call.dropout)
    tile = getattr(config, kernel)
    if kernel == "gemm" and not keys["HAS_BASE"]:
        return
    estimate = shared_bytes(kernel, tile, call.R, call.dtype.itemsize, part)
    assert compiled.shared <= estimate, f"{what}: {compiled.shared} bytes of shared memory, estimated {estimate}"


def _check_instructions(launch: aot.Launch, compiled: aot.Compiled, part: Part, what: str) -> None:
    keys = launch.keywords
    kernel = KERNEL_NAMES[launch.kernel.__name__]
    base = keys.get("HAS_BASE", True)
    exact = any(isinstance(arg, torch.Tensor) and arg.dtype == torch.float32 for arg in launch.args[:1])
    exact = exact or getattr(getattr(launch.args[0], "base", None), "dtype", None) == torch.float32
    if part.arch == "gfx942":
        only_sum = kernel == "bwd_dy" and not (keys["NEED_G"] or keys["NEED_DB"])
        assert only_sum or compiled.count("v_mfma"), f"{what}: no matrix instruction"
        wide = compiled.count("global_load_dwordx4", "buffer_load_dwordx4")
        assert only_sum or wide, f"{what}: no 128-bit load"
        return
    skinny_sum = kernel == "bwd_dy" and not (keys["NEED_G"] or keys["NEED_DB"])  # dbias alone: no product
    if not exact and not skinny_sum:
        # The base product takes the part's own unit; a skinny product may be too narrow for it and take mma.sync.
        own = {90: ("HGMMA",), 100: ("UTCHMMA",)}.get(part.arch, ("HMMA",))
        wanted = own if kernel == "gemm" and base else (*own, "HMMA")
        assert compiled.count(*wanted), f"{what}: none of {wanted}"
    if kernel == "gemm" and base and part.descriptors:
        assert compiled.count("UTMALDG") and compiled.count("UTMASTG"), f"{what}: no TMA"
    elif kernel == "gemm" and not base:
        return
    else:
        wide = compiled.count("LDG.E.128") + compiled.count_wide_copies()
        assert wide, f"{what}: no 128-bit load"
        assert skinny_sum or compiled.count("LDGSTS"), f"{what}: no asynchronous copy"


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)
@pytest.mark.parametrize("arch", PARTS)
def test_machine_code(arch, call, monkeypatch):
    part = PARTS[arch]
    faults = []
    for launch in record(call, arch, monkeypatch):
        name = launch.kernel.__name__
        compiled = aot.compile_launch(launch, arch)
        what = f"{name} { ({k: v for k, v in launch.keywords.items() if k.isupper() or k.startswith('num')}) }"
        checks = [lambda c=compiled, w=what: _check_limits(c, part, w)]
        if name in KERNEL_NAMES:
            checks.append(lambda x=launch, c=compiled, w=what: _check_estimate(x, c, call, part, w))
            checks.append(lambda x=launch, c=compiled, w=what: _check_instructions(x, c, part, w))
        for check in checks:
            try:
                check()
            except AssertionError as error:
                faults.append(str(error).splitlines()[0])
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("arch", PARTS)
def test_every_gemm_tile_of_the_table(arch, monkeypatch):
    """The tiles that smaller shapes take: forward and masked dx, with and without a base product."""
    part = PARTS[arch]
    for tile in GEMM_TILES[family(part, 2)]:
        fitting = [R for R in (64, 32, 16) if problem("gemm", tile, R, 2, part) is None]
        assert fitting, f"{tile} does not fit {part.name} at any rank"
        R = fitting[0]
        call = Call("tile", R, dropout=True, plan=(("path", "k_extension"), ("gemm", tile)))
        launches = [x for x in record(call, arch, monkeypatch) if x.kernel.__name__ == "_lora_gemm_kernel"]
        for launch in launches:
            compiled = aot.compile_launch(launch, arch)
            _check_limits(compiled, part, str(tile))
            assert compiled.shared <= shared_bytes("gemm", tile, R, 2, part), tile


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("arch", PARTS)
def test_column_sums(arch, dtype):
    """bias_grad's two kernels: wide, narrow, narrower than a 16-byte load, in fp32 and in dy's dtype."""
    part, out = PARTS[arch], torch.float32
    for shape, transposed in (
        ((M, N), False),
        ((M, 64), False),
        ((M, N), True),
        ((1_000_000, 3), False),
        ((16, N), False),
    ):
        dy = torch.empty(shape[::-1] if transposed else shape, dtype=dtype, device="meta")
        with aot.recording(bias_grad, columns) as launches:
            bias_grad.bias_grad(dy.t() if transposed else dy, out)
        assert len(launches) == (1 if shape[0] == 16 else 2)
        for launch in launches:
            compiled = aot.compile_launch(launch, arch)
            what = f"{launch.kernel.__name__} {list(shape)} {launch.keywords}"
            _check_limits(compiled, part, what)
            assert compiled.registers <= 128, f"{what}: {compiled.registers} registers leave fewer than four blocks"
            if shape[1] > 3:
                wide = ("global_load_dwordx4", "buffer_load_dwordx4") if arch == "gfx942" else ("LDG.E.128",)
                assert compiled.count(*wide), f"{what}: no 128-bit load"
        out = dtype


def _record_activation(activation: str, shape: tuple, transposed: bool, needs: tuple, dtype: torch.dtype) -> list:
    """The launches of act_bwd, and for ReLU of relu_fwd, from tensors that have no memory; dbias as dy."""

    def tensor() -> torch.Tensor:
        return torch.empty(shape[::-1] if transposed else shape, dtype=dtype, device="meta")

    dy, z = (tensor().t() if transposed else tensor() for _ in range(2))
    with aot.recording(triton_act, columns) as launches:
        kept = triton_act.relu_fwd(z)[1] if activation == "relu" else z
        triton_act.act_bwd(dy, kept, activation, *needs, dtype)
    assert len(launches) == (activation == "relu") + 1 + (needs[1] and shape[0] > 128)
    return [launch for launch in launches if launch.kernel.__name__ != "_add_parts_kernel"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("arch", PARTS)
def test_activation_pass(arch, dtype):
    """Every activation in wide tiles, in bf16 other tiles and what is not needed too: wide loads and stores."""
    part, both = PARTS[arch], (True, True)
    calls = [(activation, (M, N), False, both) for activation in ACTIVATIONS]
    if dtype == torch.bfloat16:
        calls += [(activation, (M, N), True, both) for activation in ("gelu", "relu")]
        calls += [("silu", (M, 64), False, both), ("silu", (1_000_000, 3), False, both), ("relu", (M, 1), False, both)]
        calls += [("gelu_tanh", (M, N), False, (False, True)), ("relu", (1, N), False, (True, False))]
    loads, stores = ("LDG.E.128",), ("STG.E.128",)
    if arch == "gfx942":
        loads, stores = (tuple(f"{way}_{what}_dwordx4" for way in ("global", "buffer")) for what in ("load", "store"))
    for call in calls:
        for launch in _record_activation(*call, dtype):
            compiled, what = aot.compile_launch(launch, arch), f"{launch.kernel.__name__} {call} {dtype}"
            _check_limits(compiled, part, what)
            assert compiled.registers <= 128, f"{what}: {compiled.registers} registers leave fewer than four blocks"
            narrow = call[1][1] < 16 or call[1][0] < 16
            narrow |= arch == "gfx942" and launch.keywords["num_warps"] == 8  # 512 threads for 4096 bytes
            assert narrow or compiled.count(*loads), f"{what}: no 128-bit load"
            assert narrow or not call[3][0] or compiled.count(*stores), f"{what}: no 128-bit store"


def test_the_tile_that_research_found_too_large_is_rejected():
    """128x256x64 with 3 stages and an unsplit store at r = 64 takes 245,784 bytes, over Hopper's 232,448."""
    part = PARTS[90]
    whole, halves = GEMM_TILES["wide"][:2]
    assert (whole.subtiles, halves.subtiles) == (1, 2)
    assert problem("gemm", whole, 16, 2, part) is None
    assert "shared memory" in problem("gemm", whole, 64, 2, part)
    assert problem("gemm", halves, 64, 2, part) is None
