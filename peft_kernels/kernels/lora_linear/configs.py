"""Which tiles and which GEMM path the Triton LoRA linear runs: a pure function over a small table and a traffic model.

Nothing is searched at run time. `explain` shows a choice, `force` overrides it in tests and benchmarks, and the
environment variable PEFT_KERNELS_CONFIGS may name a JSON file of measured rows, read once at import.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from math import ceil, log

import torch

from .parts import PARTS, Part, floors, nearest_part
from .tiles import GEMM_TILES, KERNELS, MAX_PASS_RANK, Tile, candidates, delta_tile, family, pass_rank_block, problem

PATHS = ("k_extension", "beta_one")
_LAUNCH_SECONDS = 3e-6  # assumed, one more kernel in a stream
_ROWS_PER_PROGRAM = (2048, 1024, 512, 256, 128, 64, 32)


@dataclass(frozen=True)
class Config:
    """One launch plan. "k_extension" starts our GEMM's accumulator with the low-rank product; "beta_one" writes the
    low-rank product and lets cuBLAS add x @ weight.T to it."""

    path: str
    gemm: Tile
    down: Tile
    bwd_dy: Tile
    bwd_da: Tile
    delta: Tile  # the GEMM without a base product
    dy_passes: int  # 1: dlora_b, g and dbias from one read of dy; 2: ranks that do not fit in registers
    descriptors: bool  # tensor descriptors (TMA) in the GEMM where alignment allows
    measured: str | None = None  # the GPU and date of the measurement, None: chosen by the model


def _waves(programs: int, part: Part) -> float:
    """Time of `programs` equal pieces over the time they would take spread evenly."""
    return ceil(programs / part.sms) * part.sms / programs


def _gemm_seconds(tile: Tile, M: int, N: int, K: int, itemsize: int, part: Part, ratio: float) -> float:
    tiles = ceil(M / tile.block_m) * ceil(N / tile.block_n)
    rate = ratio * (part.flops_16bit if itemsize == 2 else part.flops_fp32)
    rate *= min(1.0, tile.block_m * tile.block_n / (tile.block_m + tile.block_n) / 64)  # operand reuse of the tile
    padded = ceil(M / tile.block_m) * tile.block_m * ceil(N / tile.block_n) * tile.block_n
    moved = itemsize * (M * K + N * K + M * N)
    return max(2 * padded * K / rate, moved / part.bandwidth) * _waves(tiles, part)


def _cublas_seconds(M: int, N: int, K: int, itemsize: int, part: Part) -> float:
    """Tiles as ours at the part's full rate, but never worse than 1.1 of the ideal: it has split-K too."""
    rate = part.flops_16bit if itemsize == 2 else part.flops_fp32
    ideal = max(2 * M * N * K / rate, itemsize * (M * K + N * K + M * N) / part.bandwidth)
    tiled = min(_gemm_seconds(tile, M, N, K, itemsize, part, 1.0) for tile in GEMM_TILES[family(part, itemsize)])
    return min(max(ideal, tiled), 1.1 * ideal)


def path_seconds(tile: Tile, M: int, N: int, K: int, R: int, itemsize: int, part: Part) -> dict[str, float]:
    """Model of the forward GEMM plus dx by either path."""
    ratio = part.gemm_ratio
    k_extension = _gemm_seconds(tile, M, N, K + R, itemsize, part, ratio)
    k_extension += _gemm_seconds(tile, M, K, N + R, itemsize, part, ratio)
    frozen = _cublas_seconds(M, N, K, itemsize, part) + _cublas_seconds(M, K, N, itemsize, part)
    delta = itemsize * M * (N + K) / part.bandwidth  # written once; reading it back hides under the GEMM
    return {"k_extension": k_extension, "beta_one": frozen + delta + 2 * _LAUNCH_SECONDS}


def _pick_gemm(M: int, N: int, K: int, R: int, itemsize: int, part: Part) -> Tile:
    fitting = candidates("gemm", R, itemsize, part)
    return min(fitting, key=lambda t: _gemm_seconds(t, M, N, K, itemsize, part, part.gemm_ratio))


def _pick_pass(kernel: str, M: int, cols: int, R: int, itemsize: int, part: Part, dropout: bool = False) -> Tile:
    """A tile over [M, cols] and the span that gives about one program per SM without tiny pieces, with a mask two: an
    H100 took 36 us instead of 54 for dlora_a at M=8192, K=4096, R=16."""
    tile = candidates(kernel, min(R, MAX_PASS_RANK), itemsize, part, dropout)[0]
    if kernel == "down":
        split = max(1, min(part.sms // ceil(M / tile.block_m), cols // (2 * tile.block_n)))
        return replace(tile, span=ceil(cols / split / tile.block_n) * tile.block_n)
    blocks = ceil(cols / tile.block_n)
    programs = 0.9 * part.sms * (2 if dropout else 1)
    wide = [s for s in _ROWS_PER_PROGRAM if s >= tile.block_m and ceil(M / s) * blocks >= programs]
    return replace(tile, span=wide[0] if wide else tile.block_m)


def _dy_passes(tile: Tile, R: int, itemsize: int) -> int:
    """One read of dy writes and reads R fp32 partials of g per block_n columns; past a second read of dy, two."""
    return 1 if R <= MAX_PASS_RANK and 8 * pass_rank_block(R) <= itemsize * tile.block_n else 2


@lru_cache(maxsize=4096)
def _model_config(M: int, N: int, K: int, R: int, dtype: torch.dtype, arch: int | str, dropout: bool) -> Config:
    part, _ = nearest_part(arch)
    b = dtype.itemsize
    M = max(M, 1)
    gemm = _pick_gemm(M, N, K, R, b, part)
    bwd_dy = _pick_pass("bwd_dy", M, N, R, b, part)
    seconds = path_seconds(gemm, M, N, K, R, b, part)
    # fp32: cuBLAS's exact SGEMM is far ahead of a Triton dot without matrix units.
    path = "beta_one" if b == 4 else min(PATHS, key=seconds.__getitem__)
    return Config(
        path=path,
        gemm=gemm,
        down=_pick_pass("down", M, K, R, b, part, dropout),
        bwd_dy=bwd_dy,
        bwd_da=_pick_pass("bwd_da", M, K, R, b, part, dropout),
        delta=delta_tile(b, part),
        dy_passes=_dy_passes(bwd_dy, R, b),
        descriptors=part.descriptors,
    )


_forced: list[dict] = []


@contextmanager
def force(**fields_: object) -> Iterator[None]:
    """Override fields of every Config picked inside the `with` (path="beta_one", gemm=Tile(...)); not thread-safe."""
    unknown = set(fields_) - {f.name for f in fields(Config)}
    if unknown:
        raise ValueError(f"force: no such field of Config: {sorted(unknown)}")
    if fields_.get("path", PATHS[0]) not in PATHS:
        raise ValueError(f"force: path is {fields_['path']!r}; expected one of {PATHS}")
    _forced.append(fields_)
    try:
        yield
    finally:
        _forced.pop()


def pick_config(M: int, N: int, K: int, R: int, dtype: torch.dtype, arch: int | str, dropout: bool = False) -> Config:
    """The launch plan for x [M, K], weight [N, K], rank R on `arch` (90 for compute capability 9.0, or "gfx942").

    A measured row of the same arch, dtype, N, K, R and dropout (used or not) with the nearest M comes before the model.
    """
    rows = TUNED and TUNED.get((nearest_part(arch)[0].arch, str(dtype).removeprefix("torch."), N, K, R, dropout))
    nearest = rows and min(rows, key=lambda row: abs(log(row[0] / max(M, 1))))
    config = nearest[1] if nearest else _model_config(M, N, K, R, dtype, arch, dropout)
    for fields_ in _forced:
        config = replace(config, **fields_)
    return config


def explain(M: int, N: int, K: int, R: int, dtype: torch.dtype, arch: int | str, dropout: bool = False) -> dict:
    """The choice for a shape and what it rests on: config, modelled seconds of both paths, floors per kernel, notes."""
    part, note = nearest_part(arch)
    config = pick_config(M, N, K, R, dtype, arch, dropout)
    source = f"measured: {config.measured}" if config.measured else f"model, not measured ({part.source})"
    return {
        "part": part.name,
        "note": note,
        "source": "forced" if _forced else source,
        "config": asdict(config),
        "rank_block": pass_rank_block(R),
        "path_seconds": path_seconds(config.gemm, M, N, K, R, dtype.itemsize, part),
        "floors": floors(M, N, K, R, dtype, part),
    }


def _tuned_row(row: dict, where: str) -> tuple[tuple, tuple[int, Config]]:
    shape_keys = ("arch", "dtype", "M", "N", "K", "R", "dropout")
    config_keys = {f.name for f in fields(Config)}
    if not isinstance(row, dict) or set(row) != config_keys | set(shape_keys):
        wanted = sorted(config_keys | set(shape_keys))
        raise ValueError(f"{where}: keys are {sorted(row) if isinstance(row, dict) else row}; expected {wanted}")
    if row["arch"] not in PARTS or row["dtype"] not in ("float32", "bfloat16", "float16") or row["path"] not in PATHS:
        raise ValueError(f"{where}: unknown arch {row['arch']!r}, dtype {row['dtype']!r} or path {row['path']!r}")
    if not row["measured"]:
        raise ValueError(f"{where}: measured is {row['measured']!r}; expected the GPU and the date")
    itemsize = getattr(torch, row["dtype"]).itemsize
    values = {key: row[key] for key in config_keys}
    for name in (*KERNELS, "delta"):
        kernel = "gemm" if name == "delta" else name
        try:
            values[name] = Tile(**row[name])
        except TypeError as error:
            raise ValueError(f"{where}: {name}: {error}") from None
        if not (name == "bwd_dy" and row["dy_passes"] == 2):
            reason = problem(kernel, values[name], row["R"], itemsize, PARTS[row["arch"]])
            if reason:
                raise ValueError(f"{where}: {name}: {reason}")
    key = (row["arch"], row["dtype"], row["N"], row["K"], row["R"], bool(row["dropout"]))
    return key, (row["M"], Config(**values))


def read_tuned(path: str) -> dict[tuple, list[tuple[int, Config]]]:
    """Measured rows from a JSON list. Raises ValueError naming the file, the row and what is wrong with it."""
    try:
        with open(path, encoding="utf-8") as file:
            rows = json.load(file)
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"PEFT_KERNELS_CONFIGS={path}: {error}") from error
    if not isinstance(rows, list):
        raise ValueError(f"PEFT_KERNELS_CONFIGS={path}: expected a list of rows, got {type(rows).__name__}")
    table: dict[tuple, list[tuple[int, Config]]] = {}
    for number, row in enumerate(rows):
        key, value = _tuned_row(row, f"PEFT_KERNELS_CONFIGS={path}, row {number}")
        table.setdefault(key, []).append(value)
    return table


TUNED = read_tuned(os.environ["PEFT_KERNELS_CONFIGS"]) if os.environ.get("PEFT_KERNELS_CONFIGS") else {}
