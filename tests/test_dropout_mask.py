"""The dropout mask's random numbers: Philox against published vectors, the bit layout, and statistics of the bits."""

import math

import bounds
import pytest
import torch

from peft_kernels.kernels._shared import drop_levels
from peft_kernels.kernels.lora_linear import reference

FAILURE = 1e-9
"""Probability that a perfect generator would fail one statistical check here."""

WORD = 0xFFFFFFFF
KNOWN_ANSWERS = [
    # Random123's kat_vectors for philox4x32-7: counter, key, result.
    ((0, 0, 0, 0), (0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    ((WORD,) * 4, (WORD,) * 2, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A),
    ),
]


def philox(counter: tuple, key: tuple, rounds: int = 7) -> tuple:
    """Philox4x32 on Python integers, from the paper (Salmon et al. 2011, section 4.3)."""
    c, k = list(counter), list(key)
    for _ in range(rounds):
        first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(second >> 32) ^ c[1] ^ k[0], second & WORD, (first >> 32) ^ c[3] ^ k[1], first & WORD]
        k = [(k[0] + 0x9E3779B9) & WORD, (k[1] + 0xBB67AE85) & WORD]
    return tuple(c)


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS, ids=["zeros", "ones", "pi"])
def test_philox_known_answers(counter, key, result):
    assert philox(counter, key) == result


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 0x299F31D0A4093822])
def test_reference_philox_is_the_published_one(seed):
    counters = [0, 1, 2**16 - 1, 2**32 - 1, 2**32, 2**33 + 12345, 2**62 + 7]
    words = reference._philox(torch.tensor([seed]), torch.tensor(counters))
    for i, counter in enumerate(counters):
        expected = philox((counter & WORD, counter >> 32, 0, 0), (seed & WORD, (seed >> 32) & WORD))
        assert tuple(int(word[i]) for word in words) == expected


def test_mask_layout():
    """Byte b of row m is one Philox call; its bits are the low halves of the four words, then the high halves."""
    seed, M, K, threshold = 12345, 3, 21, 20000
    mask = reference.dropout_mask(torch.tensor([seed]), M, K, threshold)
    assert mask.shape == (3, 3) and mask.dtype == torch.uint8
    for m in range(M):
        for k in range(K):
            words = philox((m * 3 + k // 8, 0, 0, 0), (seed, 0))
            j = k % 8
            lane = words[j] & 0xFFFF if j < 4 else words[j - 4] >> 16
            assert (int(mask[m, k // 8]) >> j & 1) == (lane >= threshold), (m, k)


@pytest.mark.parametrize("threshold", [0, 1 << 16])
def test_nothing_and_everything_dropped(threshold):
    keep = bounds.keep_bits(reference.dropout_mask(torch.tensor([3]), 50, 40, threshold), 40)
    assert bool((keep == (threshold == 0)).all())


def _assert_rate(hits: torch.Tensor, rate: float, name: str) -> None:
    """Hoeffding: of n independent bits, |mean - rate| exceeds sqrt(ln(2 / FAILURE) / 2n) with probability FAILURE."""
    limit = math.sqrt(math.log(2 / FAILURE) / (2 * hits.numel()))
    off = abs(hits.double().mean().item() - rate)
    assert off <= limit, f"{name}: off by {off:.2e}, limit {limit:.2e} for {hits.numel()} bits"


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_keep_rate_and_independence(p):
    M, K = 512, 2048
    threshold = drop_levels.drop_threshold(p)
    rate = 1 - threshold / drop_levels.DROP_LEVELS
    keep, other = (
        bounds.keep_bits(reference.dropout_mask(torch.tensor([seed]), M, K, threshold), K) for seed in (7, 8)
    )
    _assert_rate(keep, rate, "all bits")
    for lane in range(8):
        _assert_rate(keep[:, lane::8], rate, f"lane {lane}")
    # Bits that are independent agree with probability q^2 + (1 - q)^2; the pairs compared do not overlap.
    agree = rate**2 + (1 - rate) ** 2
    _assert_rate(keep == other, agree, "the same element under the next seed")
    _assert_rate(keep[0::2] == keep[1::2], agree, "neighbouring rows")
    for lag in (1, 2, 4, 8):
        blocks = keep.view(M, -1, 2, lag)
        _assert_rate(blocks[:, :, 0] == blocks[:, :, 1], agree, f"columns {lag} apart")


@pytest.mark.parametrize("p", [0.05, 0.1, 1 / 3, 0.5, 0.9])
def test_scaling_keeps_the_expected_value(p):
    """scaling / (1 - p) with the p that 2**16 levels can give: kept share x effective scaling = scaling."""
    threshold = drop_levels.drop_threshold(p)
    kept = 1 - threshold / drop_levels.DROP_LEVELS
    assert abs(kept - (1 - p)) <= 0.5 / drop_levels.DROP_LEVELS
    assert drop_levels.effective_scaling(2.0, threshold) * kept == pytest.approx(2.0, rel=4 * 2**-53)


def test_everything_dropped_scales_by_zero():
    assert drop_levels.effective_scaling(2.0, drop_levels.drop_threshold(1.0)) == 0.0
