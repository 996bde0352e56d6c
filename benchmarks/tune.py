"""Sweeps a primitive's launch configurations on this GPU and writes the best as rows that PEFT_KERNELS_CONFIGS reads.

python -m benchmarks.tune lora_linear --out FILE
"""

import argparse
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from tqdm import tqdm

from peft_kernels.kernels.lora_linear import configs
from peft_kernels.kernels.lora_linear.configs import Config
from peft_kernels.kernels.lora_linear.parts import nearest_part
from peft_kernels.kernels.lora_linear.tiles import MAX_PASS_RANK, candidates

from . import cases, environment, measure
from .lora_linear import arch_here, ours
from .lora_linear_check import LoRACase, make_inputs, step, value_errors

TUNED = ("lora_linear",)
"""Primitives whose configurations are swept here; bias_grad's plan has nothing to choose that a GPU would decide."""

Clock = Callable[[Sequence[Config]], list[float | None]]
"""Median milliseconds of forward and backward under each config; None where it fails or computes wrong values."""


def _tiles(kernel: str, case: LoRACase, arch: int | str) -> tuple:
    return candidates(kernel, min(case.R, MAX_PASS_RANK), case.dtype.itemsize, nearest_part(arch)[0], case.dropout > 0)


def gemm_choices(base: Config, case: LoRACase, arch: int | str) -> list[Config]:
    """Every path with every GEMM tile that fits."""
    return [replace(base, path=path, gemm=tile) for path in configs.PATHS for tile in _tiles("gemm", case, arch)]


def pass_choices(kernel: str, base: Config, case: LoRACase, arch: int | str) -> list[Config]:
    """Every tile of a skinny pass that fits, with the present span, half and twice it; dy in one read and in two."""
    span, found = getattr(base, kernel).span, []
    for tile in _tiles(kernel, case, arch):
        unit = tile.block_n if kernel == "down" else tile.block_m
        for wanted in dict.fromkeys(max(unit, one // unit * unit) for one in (span, span // 2, 2 * span)):
            found.append(replace(base, **{kernel: replace(tile, span=wanted)}))
    if kernel == "bwd_dy" and case.R <= MAX_PASS_RANK:
        found += [replace(config, dy_passes=3 - base.dy_passes) for config in found]
    return found


def best_config(base: Config, case: LoRACase, arch: int | str, clock: Clock) -> tuple[Config, float | None]:
    """One kernel after the other: the best path and GEMM first, then each pass under it; ties keep the first."""
    best, best_ms = base, clock([base])[0]
    for choices in (gemm_choices, *(partial(pass_choices, name) for name in ("down", "bwd_dy", "bwd_da"))):
        tried = [config for config in choices(best, case, arch) if config != best]
        for config, ms in zip([best, *tried], clock([best, *tried]), strict=True):
            if config == best:
                best_ms = ms
            if ms is not None and (best_ms is None or ms < best_ms):
                best, best_ms = config, ms
    return best, best_ms


def row(config: Config, case: LoRACase, arch: int | str, measured: str) -> dict:
    """A row of the file that PEFT_KERNELS_CONFIGS names."""
    shape = {"M": case.M, "N": case.N, "K": case.K, "R": case.R, "dropout": case.dropout > 0}
    dtype = str(case.dtype).removeprefix("torch.")
    return {"arch": nearest_part(arch)[0].arch, "dtype": dtype, **shape, **asdict(replace(config, measured=measured))}


def _contenders(tried: Sequence[Config], case: LoRACase, sets: list) -> Iterator[measure.Contender | None]:
    for number, config in enumerate(tried):
        fields = {name: value for name, value in vars(config).items() if name != "measured"}
        layers = [ours(within=partial(configs.force, **fields))(case, inputs) for inputs in sets]
        try:
            errors = value_errors(case, sets[0], layers[0])
        except cases.FAILURES as error:
            tqdm.write(f"  fails: {config}: {' '.join(str(error).split())[:160]}")
            yield None
            continue
        if not all(error <= 1 for error in errors.values()):
            tqdm.write(f"  wrong values: {config}: {errors}")
            yield None
            continue
        yield measure.Contender(
            str(number),
            "ours",
            lambda i, layers=layers: step(layers[i % len(sets)], sets[i % len(sets)]),
            sets=len(sets),
        )


def cuda_clock(case: LoRACase, effort: measure.Effort) -> Clock:
    """Graph replays on rotating inputs, all configs of a call alternating."""
    sets = [make_inputs(case, "cuda", seed) for seed in range(measure.input_sets(case.set_bytes, "cuda"))]

    def clock(tried: Sequence[Config]) -> list[float | None]:
        found = list(_contenders(tried, case, sets))
        graphs = {one.name: measure.capture(one, "both") for one in found if one is not None}
        timings = measure.time_graphs(graphs, effort)
        return [timings[one.name].median if one is not None else None for one in found]

    return clock


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("primitive", choices=TUNED)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    arch = arch_here()
    chosen = list(cases.PRIMITIVES[options.primitive].suites["gpu"])
    chosen = cases.quick(chosen) if options.quick else chosen
    env = environment.environment("cuda")
    measured = f"{env['device']}, {env['date'][:10]}, triton {env['triton']}, commit {env['commit']}"
    found = []
    for case in tqdm(chosen, unit="case", dynamic_ncols=True):
        base = configs.pick_config(case.M, case.N, case.K, case.R, case.dtype, arch, case.dropout > 0)
        config, ms = best_config(base, case, arch, cuda_clock(case, measure.Effort(10, 0.5, 50)))
        tqdm.write(f"{case.label}: {ms} ms with {config}")
        found.append(row(config, case, arch, measured))
        # After every case, so that a sweep that is cut short keeps what it found.
        partial_file = options.out.with_suffix(".partial")
        partial_file.write_text(json.dumps(found, indent=1) + "\n")
        os.replace(partial_file, options.out)
    print(options.out.read_text())


if __name__ == "__main__":
    main()
