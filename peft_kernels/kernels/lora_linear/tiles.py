"""How a kernel is cut into tiles: which tiles fit a part, and the table they are chosen from."""

from dataclasses import dataclass, replace

from .parts import Part


@dataclass(frozen=True)
class Tile:
    """How one kernel is launched.

    The GEMM walks block_k; the skinny passes own block_m rows by block_n columns and walk `span` elements of the
    long axis (columns for "down", rows for "bwd_dy" and "bwd_da").
    """

    block_m: int
    block_n: int
    block_k: int = 0  # GEMM only
    num_warps: int = 4
    num_stages: int = 3
    span: int = 0  # passes only
    group_m: int = 8  # GEMM only
    subtiles: int = 1  # GEMM only: 2 stores the tile in halves


KERNELS = ("gemm", "down", "bwd_dy", "bwd_da")
MAX_PASS_RANK = 128  # wider ranks are cut into blocks; the one-pass dy kernel is not used beyond it


def pass_rank_block(R: int) -> int:
    """Columns of the rank axis that a skinny pass holds at once: a power of two in [16, 128]."""
    return min(MAX_PASS_RANK, max(16, 1 << (R - 1).bit_length()))


def gemm_rank_block(R: int, itemsize: int) -> int:
    """Rank columns per step of the K-extension: its tiles share memory, in exact fp32 registers, with the pipeline."""
    return min(64 if itemsize == 2 else 32, pass_rank_block(R))


def delta_tile(itemsize: int, part: Part) -> Tile:
    """The GEMM without a base product only writes: small tiles, several blocks per SM, no pipeline.

    With four warps Triton 3.7 spills where the unit is mma.sync, with eight Triton 3.6 does on Blackwell.
    """
    if itemsize == 4:
        return Tile(64, 64, 16, 4, 1)
    return Tile(64, 128, 32, 8 if family(part, itemsize) == "mma" else 4, 1)


def shared_bytes(kernel: str, tile: Tile, R: int, itemsize: int, part: Part) -> int:
    """Shared memory the compiled kernel may take: an upper estimate, which test_aot.py holds against the compiler."""
    stages = max(1, tile.num_stages - 1) if isinstance(part.arch, str) else tile.num_stages
    barriers = 6144 if part.arch == 100 and kernel != "gemm" else 1024  # and what staging tensor memory takes
    if kernel == "gemm":
        rank = gemm_rank_block(R, itemsize)
        loop = stages * (tile.block_m + tile.block_n) * tile.block_k * itemsize
        low_rank = (tile.block_m + tile.block_n) * rank * itemsize
        store = tile.block_m * tile.block_n * itemsize // tile.subtiles
        # Persistent, operands in shared memory: pipeline, rank tiles and the store's buffer live side by side.
        if part.arch in (90, 100):
            return loop + low_rank + store + barriers
        if part.descriptors:
            return loop + max(low_rank, store) + barriers
        return max(loop, low_rank, store) + barriers
    rank = pass_rank_block(R)
    big = tile.block_m * tile.block_n * itemsize
    if kernel == "down":
        # Adapters of a wider dtype than x are cast after the copy, which then runs one stage less ahead.
        cast = max(1, stages - 1) * 4 + (itemsize if part.arch in (90, 100) else 0)  # their operand is in shared memory
        return stages * big + tile.block_n * rank * max(stages * itemsize, cast) + barriers
    pipeline = stages * (big + tile.block_m * rank * itemsize)
    store = tile.block_n * rank * 4  # the accumulator changes its layout on the way out, when the pipeline is empty
    if isinstance(part.arch, str):  # AMD's stores leave in the layout of the matrix unit
        store = 0
    if kernel == "bwd_da":
        mask = tile.block_m * tile.block_n  # its bytes change their layout in shared memory (Triton 3.8)
        return max(pipeline, store) + mask + barriers
    resident = tile.block_n * rank * itemsize + tile.block_m * rank * 4  # lora_b, and g's change of layout
    return max(pipeline + resident, store) + barriers


def problem(kernel: str, tile: Tile, R: int, itemsize: int, part: Part) -> str | None:
    """Why `tile` cannot run `kernel` at rank R on `part`; None when it can. Shared by the heuristic and by tuning."""
    blocks = [tile.block_m, tile.block_n] + ([tile.block_k] if kernel == "gemm" else [])
    if any(block < 16 or block & (block - 1) for block in blocks):
        return f"blocks {blocks} must be powers of two, 16 or more"
    if tile.num_warps not in (1, 2, 4, 8, 16) or tile.num_stages < 1:
        return f"num_warps {tile.num_warps} must be 1, 2, 4, 8 or 16 and num_stages {tile.num_stages} at least 1"
    if kernel != "gemm":
        step = tile.block_n if kernel == "down" else tile.block_m
        if tile.span < step or tile.span % step:
            return f"span {tile.span} must be a multiple of its step {step}"
    if kernel == "bwd_dy" and R > MAX_PASS_RANK:
        return f"rank {R} is over {MAX_PASS_RANK}: dy takes two passes"
    need = shared_bytes(kernel, tile, R, itemsize, part)
    if need > part.shared_bytes:
        return f"needs about {need} bytes of shared memory, {part.name} has {part.shared_bytes}"
    rank = pass_rank_block(R)
    outer = {"gemm": tile.block_n, "down": rank, "bwd_dy": rank, "bwd_da": rank}[kernel]
    accumulators = (tile.block_n if kernel in ("bwd_dy", "bwd_da") else tile.block_m) * outer
    lanes = 64 if isinstance(part.arch, str) else 32
    if accumulators // (lanes * tile.num_warps) > 128:
        return f"{accumulators} accumulators over {tile.num_warps} warps leave no registers"
    return None


def family(part: Part, itemsize: int) -> str:
    """Parts whose matrix units want the same tiles: wgmma, tcgen05, mma.sync, MFMA, or none (fp32)."""
    if itemsize == 4:
        return "mfma fp32" if part.arch == "gfx942" else "fp32"
    return {90: "wide", 100: "tcgen05", "gfx942": "mfma"}.get(part.arch, "mma")


GEMM_TILES = {
    "wide": (
        Tile(128, 256, 64, 8, 3),
        Tile(128, 256, 64, 8, 3, subtiles=2),
        Tile(128, 128, 64, 4, 4, subtiles=2),
        Tile(64, 64, 64, 4, 3),
        Tile(16, 64, 64, 4, 3),
    ),
    "mma": (Tile(128, 128, 32, 8, 4), Tile(64, 64, 64, 4, 3), Tile(16, 64, 64, 4, 3)),
    "mfma": (Tile(128, 128, 32, 4, 2), Tile(64, 64, 64, 4, 2), Tile(16, 64, 64, 4, 2)),
    "fp32": (Tile(64, 64, 16, 4, 2), Tile(32, 32, 16, 4, 2)),
    "mfma fp32": (Tile(64, 64, 16, 4, 2), Tile(32, 32, 16, 4, 2)),
}
# Triton 3.7 spills at three stages of the smallest, which comes last.
GEMM_TILES["tcgen05"] = (*GEMM_TILES["wide"][:-1], Tile(16, 64, 64, 4, 4))

# Tiles of the skinny passes, best first: (largest padded rank, tile). The widest that test_aot.py compiles to no spills
# at that rank with and without dropout; the span is set per shape.
_PASS_TILES = {
    "wide": {
        "down": ((64, Tile(64, 128, 0, 4, 4)), (128, Tile(64, 128, 0, 8, 3))),
        "bwd_dy": ((64, Tile(64, 256, 0, 8, 3)), (128, Tile(32, 128, 0, 8, 3))),
        "bwd_da": ((64, Tile(64, 128, 0, 4, 4)), (128, Tile(64, 128, 0, 8, 3))),
        "down, dropout": ((16, Tile(16, 256, 0, 4, 4)), (64, Tile(32, 128, 0, 4, 4)), (128, Tile(64, 128, 0, 8, 3))),
        "bwd_da, dropout": ((32, Tile(64, 128, 0, 8, 3)), (64, Tile(64, 128, 0, 4, 4)), (128, Tile(64, 128, 0, 8, 3))),
    },
    "mma": {
        "down": ((64, Tile(64, 128, 0, 8, 3)), (128, Tile(64, 64, 0, 8, 3))),
        "bwd_dy": ((32, Tile(32, 256, 0, 8, 3)), (128, Tile(32, 128, 0, 8, 3))),
        "bwd_da": ((32, Tile(64, 128, 0, 8, 3)), (128, Tile(32, 128, 0, 8, 3))),
    },
    "mfma": {
        "down": ((64, Tile(64, 128, 0, 8, 2)), (128, Tile(64, 64, 0, 8, 2))),
        "bwd_dy": ((16, Tile(64, 256, 0, 8, 2)), (32, Tile(32, 128, 0, 4, 2)), (64, Tile(64, 128, 0, 8, 2)),
                   (128, Tile(32, 64, 0, 4, 2))),
        "bwd_da": ((128, Tile(64, 128, 0, 8, 2)),),
    },
    "fp32": {
        "down": ((32, Tile(32, 64, 0, 4, 2)), (64, Tile(16, 32, 0, 8, 2)), (128, Tile(32, 32, 0, 8, 2))),
        "bwd_dy": ((32, Tile(32, 64, 0, 4, 2)), (128, Tile(16, 32, 0, 4, 2))),
        "bwd_da": ((32, Tile(32, 64, 0, 4, 2)), (128, Tile(32, 32, 0, 8, 2))),
    },
    "mfma fp32": {
        "down": ((64, Tile(32, 64, 0, 4, 2)), (128, Tile(32, 32, 0, 4, 2))),
        "bwd_dy": ((32, Tile(32, 64, 0, 4, 2)), (128, Tile(16, 32, 0, 4, 2))),
        "bwd_da": ((128, Tile(32, 64, 0, 4, 2)),),
    },
}  # fmt: skip
# And here at three stages of the widest.
_PASS_TILES["tcgen05"] = _PASS_TILES["wide"] | {
    "down, dropout": ((16, Tile(16, 256, 0, 4, 4)), (64, Tile(32, 128, 0, 4, 4)), (128, Tile(64, 128, 0, 8, 2))),
}


def candidates(kernel: str, R: int, itemsize: int, part: Part, dropout: bool = False) -> tuple[Tile, ...]:
    """The tiles of the table that fit a kernel at rank R on a part, best first. Drawing a mask or applying it is work
    that other tiles spread better: where a part has such rows, `dropout` takes them."""
    if kernel == "gemm":
        tiles = GEMM_TILES[family(part, itemsize)]
    else:
        table = _PASS_TILES[family(part, itemsize)]
        rows = table.get(f"{kernel}, dropout", table[kernel]) if dropout else table[kernel]
        tiles = tuple(
            replace(tile, span=tile.block_n if kernel == "down" else tile.block_m)
            for widest, tile in rows
            if widest >= pass_rank_block(R)
        )
    return tuple(tile for tile in tiles if problem(kernel, tile, R, itemsize, part) is None)
