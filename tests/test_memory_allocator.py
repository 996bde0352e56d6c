"""The model of Torch's caching allocator: sizes, reuse, joining, and what it does when the card is full."""

import random

import pytest

from peft_kernels.memory.allocator import MIB, CachingAllocator, OutOfMemory
from peft_kernels.memory.replay import library_bytes, replay
from peft_kernels.memory.trace import Event, Piece, Trace


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


def test_the_small_pool_ends_with_1_mib():
    """A block of 1 MiB shares a small segment; one byte more, and it is another pool's."""
    allocator = CachingAllocator()
    for _ in range(2):
        allocator.malloc(MIB)
    assert allocator.reserved == 2 * MIB
    allocator.malloc(MIB + 1)
    assert allocator.reserved == 22 * MIB
    allocator.malloc(MIB)
    assert allocator.reserved == 24 * MIB


def test_what_is_left_of_a_large_block_is_one_above_1_mib():
    """A rest of exactly 1 MiB stays with the block, 512 bytes more are a block of their own."""
    allocator = CachingAllocator()
    allocator.free(allocator.malloc(12 * MIB))
    block = allocator.malloc(11 * MIB)
    assert (block.size, block.after) == (12 * MIB, None)
    allocator.free(block)
    block = allocator.malloc(11 * MIB - 512)
    assert (block.size, block.after.size) == (11 * MIB - 512, MIB + 512)
    assert allocator.reserved == 12 * MIB


def test_what_is_left_of_a_small_block_is_one_from_512_bytes():
    allocator = CachingAllocator()
    block, _ = allocator.malloc(1024), allocator.malloc(512)
    allocator.free(block)
    block = allocator.malloc(512)
    assert (block.size, block.after.size, block.after.free) == (512, 512, True)


@pytest.mark.parametrize("nbytes", [512, 40 * MIB])
def test_a_full_card_gives_empty_segments_of_both_pools_back(nbytes):
    allocator = CachingAllocator(capacity=50 * MIB)
    allocator.free(allocator.malloc(nbytes))
    allocator.malloc(50 * MIB)
    assert allocator.reserved == allocator.allocated == 50 * MIB


def test_a_full_card_keeps_segments_that_are_in_use():
    """Of a segment that was split, no free part is given back; a whole one beside it is."""
    allocator = CachingAllocator(capacity=60 * MIB)
    blocks = [allocator.malloc(4 * MIB) for _ in range(5)]
    for i in (0, 2, 4):  # first, middle and last of the segment
        allocator.free(blocks[i])
    allocator.free(allocator.malloc(30 * MIB))
    assert allocator.reserved == 50 * MIB
    allocator.malloc(40 * MIB)
    assert (allocator.reserved, allocator.allocated) == (60 * MIB, 48 * MIB)
    with pytest.raises(OutOfMemory, match=f"{20 * MIB} bytes over {60 * MIB} reserved of {60 * MIB}"):
        allocator.malloc(5 * MIB)
    allocator.malloc(4 * MIB)  # the free parts are still there


def test_a_card_may_be_filled_to_its_last_byte():
    allocator = CachingAllocator(capacity=40 * MIB)
    allocator.malloc(40 * MIB)
    assert allocator.reserved == 40 * MIB
    with pytest.raises(OutOfMemory):
        CachingAllocator(capacity=40 * MIB - 1).malloc(40 * MIB)
    kept = CachingAllocator(capacity=60 * MIB)
    kept.free(kept.malloc(20 * MIB))
    kept.malloc(40 * MIB)
    assert kept.reserved == 60 * MIB  # what is empty is given back where that is needed only
    given_back = CachingAllocator(capacity=40 * MIB)
    given_back.free(given_back.malloc(20 * MIB))
    given_back.malloc(40 * MIB)
    assert given_back.reserved == 40 * MIB


@pytest.mark.parametrize(("arch", "each"), [(80, 8_519_680), (90, 33_554_432), (100, 33_554_432)])
def test_cublas_has_a_workspace_in_each_of_two_threads(arch, each):
    """The caller's and autograd's, from the caching allocator as everything else."""
    assert library_bytes(arch) == 2 * each
    weight = Trace()
    weight.events.append(Event(Piece(512, "weights"), "load", False, ""))
    found = replay(weight, arch)
    assert found.phases["load"].allocated == 2 * each + 512
    # 8.1 MiB are less than 10: both are in one segment of 20 MiB, the weight in a small one.
    assert found.reserved == (20 * MIB if arch == 80 else 64 * MIB) + 2 * MIB


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
