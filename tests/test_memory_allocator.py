"""The model of Torch's caching allocator: sizes, reuse, joining, and what it does when the card is full."""

import random

import pytest

from peft_kernels.memory.allocator import MIB, CachingAllocator, OutOfMemory


@pytest.mark.parametrize(
    ("nbytes", "block", "segment"),
    [
        (1, 512, 2 * MIB),
        (513, 1024, 2 * MIB),
        (MIB, MIB, 2 * MIB),
        (MIB + 1, MIB + 512, 20 * MIB),
        (10 * MIB - 512, 10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB, 10 * MIB),
        (11 * MIB, 12 * MIB, 12 * MIB),  # what is left is not over 1 MiB, and stays with the block
        (13 * MIB - 512, 13 * MIB - 512, 14 * MIB),
    ],
)
def test_sizes_of_blocks_and_segments(nbytes, block, segment):
    allocator = CachingAllocator()
    allocator.malloc(nbytes)
    assert (allocator.allocated, allocator.reserved) == (block, segment)


def test_freed_blocks_are_reused_and_join_their_neighbours():
    allocator = CachingAllocator()
    blocks = [allocator.malloc(4 * MIB) for _ in range(5)]  # one segment of 20 MiB
    assert allocator.reserved == 20 * MIB
    for i in (1, 3, 2):
        allocator.free(blocks[i])
    allocator.malloc(12 * MIB)
    assert allocator.reserved == allocator.allocated == 20 * MIB


def test_the_smallest_block_that_fits_is_taken():
    allocator = CachingAllocator()
    large, small = allocator.malloc(40 * MIB), allocator.malloc(12 * MIB)
    allocator.free(large)
    allocator.free(small)
    allocator.malloc(12 * MIB)
    allocator.malloc(40 * MIB)
    assert allocator.reserved == 52 * MIB


def test_a_full_card_gives_empty_segments_back_before_it_fails():
    allocator = CachingAllocator(capacity=60 * MIB)
    allocator.free(allocator.malloc(40 * MIB))
    held = allocator.malloc(2 * MIB)  # from the free segment
    allocator.malloc(20 * MIB)
    with pytest.raises(OutOfMemory, match="over 40 MiB|bytes over"):
        allocator.malloc(50 * MIB)
    allocator.free(held)
    assert allocator.reserved <= 60 * MIB


def test_everything_freed_is_whole_again():
    """Random traffic: nothing overlaps, nothing is lost, and at the end each segment is one free block."""
    rng, allocator, live = random.Random(0), CachingAllocator(), []
    for _ in range(3000):
        if live and rng.random() < 0.5:
            allocator.free(live.pop(rng.randrange(len(live))))
        else:
            live.append(allocator.malloc(int(2 ** rng.uniform(0, 25))))
        assert allocator.allocated == sum(block.size for block in live) <= allocator.reserved
    for block in live:
        allocator.free(block)
    whole = [block for pool in allocator._pools.values() for block in pool.blocks]
    assert all(block.before is None and block.after is None for block in whole)
    assert sum(block.size for block in whole) == allocator.reserved
