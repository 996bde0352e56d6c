"""A model of Torch's CUDA caching allocator: what a sequence of allocations reserves on the card, and whether it fits.

Default settings, one stream. Sizes and rules are those of c10/core/AllocatorConfig.h and
c10/cuda/CUDACachingAllocator.cpp of Torch 2.13.
"""

import bisect
import itertools
from dataclasses import dataclass, field

MIB = 1 << 20
ROUND = 512  # bytes of every block
SMALL = MIB  # up to here a block comes from the pool of small segments
SMALL_SEGMENT = 2 * MIB
LARGE_SEGMENT = 20 * MIB
LARGE_FROM = 10 * MIB  # from here on a segment is as large as its first block
SEGMENT_ROUND = 2 * MIB
LARGE_REMAINDER = MIB  # what is left of a large block is a block of its own when it is more than this


class OutOfMemory(Exception):
    """A segment did not fit into the capacity, even after every empty one was given back."""


@dataclass(eq=False)
class Block:
    """A part of a segment; `before` and `after` are its neighbours there."""

    size: int
    small: bool
    serial: int  # stands for the address, which decides between free blocks of one size
    free: bool = False
    before: "Block | None" = None
    after: "Block | None" = None


@dataclass
class _Pool:
    """Free blocks by size, then address."""

    keys: list[tuple[int, int]] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)

    def add(self, block: Block) -> None:
        at = bisect.bisect_left(self.keys, (block.size, block.serial))
        self.keys.insert(at, (block.size, block.serial))
        self.blocks.insert(at, block)

    def remove(self, block: Block) -> None:
        at = bisect.bisect_left(self.keys, (block.size, block.serial))
        del self.keys[at], self.blocks[at]

    def best_fit(self, size: int) -> Block | None:
        at = bisect.bisect_left(self.keys, (size, -1))
        return self.blocks[at] if at < len(self.blocks) else None


def rounded(nbytes: int) -> int:
    """Bytes of the block that a request gets, before what is too small to be split off is added."""
    return max(ROUND, -(-nbytes // ROUND) * ROUND)


def _segment_bytes(size: int) -> int:
    if size <= SMALL:
        return SMALL_SEGMENT
    return LARGE_SEGMENT if size < LARGE_FROM else -(-size // SEGMENT_ROUND) * SEGMENT_ROUND


class CachingAllocator:
    """`reserved` is what cudaMalloc gave, `allocated` what blocks in use hold; both in bytes, with their peaks.

    Args:
        capacity: bytes of the card that it may reserve; None for no limit.
    """

    def __init__(self, capacity: int | None = None):
        self.capacity = capacity
        self.reserved = self.allocated = self.peak_reserved = self.peak_allocated = 0
        self._pools = {True: _Pool(), False: _Pool()}
        self._serials = itertools.count()

    def malloc(self, nbytes: int) -> Block:
        """A block for `nbytes`, at least 1.

        Raises:
            OutOfMemory: over the capacity.
        """
        size = rounded(nbytes)
        pool = self._pools[size <= SMALL]
        block = pool.best_fit(size)
        if block is None:
            block = self._new_segment(size)
        else:
            pool.remove(block)
        rest = block.size - size
        if rest >= ROUND if block.small else rest > LARGE_REMAINDER:
            self._split(block, size)
        block.free = False
        self.allocated += block.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        return block

    def free(self, block: Block) -> None:
        """Give a block back; it joins its free neighbours."""
        self.allocated -= block.size
        block.free = True
        pool = self._pools[block.small]
        for one in (block.before, block.after):
            if one is not None and one.free:
                pool.remove(one)
                first, second = (one, block) if one is block.before else (block, one)
                first.size += second.size
                first.after = second.after
                if second.after is not None:
                    second.after.before = first
                block = first
        pool.add(block)

    def _new_segment(self, size: int) -> Block:
        need = _segment_bytes(size)
        if self.capacity is not None and self.reserved + need > self.capacity:
            self._give_back_empty()
            if self.reserved + need > self.capacity:
                raise OutOfMemory(f"{need} bytes over {self.reserved} reserved of {self.capacity}")
        self.reserved += need
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        return Block(need, size <= SMALL, next(self._serials))

    def _give_back_empty(self) -> None:
        for pool in self._pools.values():
            for block in [one for one in pool.blocks if one.before is None and one.after is None]:
                pool.remove(block)
                self.reserved -= block.size

    def _split(self, block: Block, size: int) -> None:
        rest = Block(block.size - size, block.small, next(self._serials), True, block, block.after)
        if block.after is not None:
            block.after.before = rest
        block.after, block.size = rest, size
        self._pools[block.small].add(rest)
