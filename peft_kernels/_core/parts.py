"""The GPUs that configurations are made for: what a plan needs to know of each."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """One GPU architecture. Rates are dense and attainable, not peak: see `source`."""

    arch: int | str
    name: str
    sms: int
    shared_bytes: int  # largest per block
    bandwidth: float  # bytes/s of device memory
    flops_16bit: float  # FLOP/s, bf16 and fp16 with fp32 accumulation
    flops_fp32: float  # FLOP/s outside the matrix units, what input_precision="ieee" runs at
    descriptors: bool  # TMA pays: 120 has it too, but Triton 3.6 and its ptxas call it through local memory there
    gemm_ratio: float  # assumed time of cuBLAS / time of our GEMM on one full wave of tiles
    source: str


_PEAK = "0.8 of the data sheet; gemm_ratio assumed"

PARTS: dict[int | str, Part] = {
    part.arch: part
    for part in (
        Part(80, "A100 SXM 80 GB", 108, 163840, 1.63e12, 2.50e14, 1.56e13, False, 0.92, _PEAK),
        Part(86, "RTX A6000", 84, 101376, 6.1e11, 1.24e14, 3.1e13, False, 0.92, _PEAK),
        Part(89, "RTX 4090", 128, 101376, 8.1e11, 1.32e14, 6.6e13, False, 0.92, _PEAK),
        Part(
            90, "H100 SXM", 132, 232448, 3.0e12, 7.9e14, 5.3e13, True, 0.96,
            "790 TFLOP/s and 3.0 TB/s measured; gemm_ratio from lorafusion #8 (+2.5 and +5.4 %)",
        ),
        Part(100, "B200", 148, 232448, 6.4e12, 1.8e15, 6.4e13, True, 0.85, _PEAK),
        Part(120, "RTX 5090", 170, 101376, 1.43e12, 1.68e14, 8.4e13, False, 0.92, _PEAK),
        Part("gfx942", "MI300X", 304, 65536, 4.2e12, 1.04e15, 1.3e14, False, 0.85, _PEAK),
    )
}  # fmt: skip


def nearest_part(arch: int | str) -> tuple[Part, str]:
    """The Part for `arch` and, where it is not in the table, a note that says which one stands in."""
    if arch in PARTS:
        return PARTS[arch], ""
    if isinstance(arch, str):
        return PARTS["gfx942"], f"no table for {arch!r}: that of gfx942 (MI300X)"
    known = sorted(key for key in PARTS if isinstance(key, int))
    below = [key for key in known if key <= arch] or known[:1]
    return PARTS[below[-1]], f"no table for compute capability {arch}: that of {below[-1]} ({PARTS[below[-1]].name})"
