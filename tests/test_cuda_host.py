"""The shim that runs CUDA kernels on a CPU: what it computes, and that it reports what a GPU shows only at times."""

from pathlib import Path

import pytest
import torch
from cuda_host.build import CXX, library
from cuda_host.memory import at, memory

pytestmark = pytest.mark.skipif(CXX is None, reason="needs a C++ compiler")

FAILED, BAD_CONFIGURATION = 719, 9
REPORTS = {
    "two_barriers": "is at the barrier of probe.cu",
    "returned": "63 at the barrier of probe.cu:{line}, 1 have returned",
    "shuffle_outside_mask": "lane 0 shuffles from lane 16, which is not in the mask 0000ffff",
    "part_of_warp": "16 at the warp collective of probe.cu:{line}, 48 have returned",
    "misaligned": "undefined behaviour",
    "read_past": "thread (63, 0, 0) of block (0, 0, 0): access 256 bytes from the start of a buffer of 256",
    "write_past": "access 256 bytes from the start of a buffer of 256",
    "write_before": None,  # into the poison before the buffer: seen when it is freed
    "shared_past": "access 4096 bytes from the start of a shared object of 4096",
    "dynamic_past": "access 256 bytes from the start of dynamic shared memory of 256",
    "dynamic_before": "a write beside dynamic shared memory of 256 bytes",
    "unwritten": None,
    "no_barrier": None,
    "overflow": "undefined behaviour",
}
"""What the shim says of each fault in probe.cu, in the order of its enum; None: the launch ends well."""


@pytest.fixture(scope="module")
def probe(pytestconfig):
    return library(pytestconfig.cache.mkdir("cuda_host"), "tests/cuda_host/probe.cu")


@pytest.fixture(params=["forward", "reverse"])
def ordered(probe, request):
    probe.simt_reverse(request.param == "reverse")
    yield probe
    probe.simt_reverse(0)


@pytest.mark.parametrize("threads", [32, 96, 1024])
def test_warp_collectives(ordered, threads):
    with memory(ordered) as device:
        out = device.empty((4, threads), torch.int32)
        assert ordered.probe_warp(at(out), threads) == 0, ordered.simt_error()
        t = torch.arange(threads)
        down = torch.where(t % 16 + 3 < 16, t + 3, t)
        ballots = [sum(1 << lane for lane in range(32) if (w * 32 + lane) % 3 == 0) for w in range(threads // 32)]
        ballot = torch.tensor(ballots).repeat_interleave(32)
        want = torch.stack([t ^ 5, down, 10 * (t // 8 * 8 + 7), ballot])
        assert torch.equal(out.to(torch.int64) % 2**32, want)


@pytest.mark.parametrize("threads", [1, 33, 1024])
def test_blocks_shared_memory_and_barriers(ordered, threads):
    with memory(ordered) as device:
        out = device.empty((2, 3, threads), torch.int32)
        assert ordered.probe_block(at(out), 3, 2, threads) == 0, ordered.simt_error()
        blocks = 1000 * torch.arange(6).view(2, 3, 1)
        assert torch.equal(out.to(torch.int64), blocks + torch.arange(threads).flip(0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_mma_is_the_plain_product(ordered, dtype):
    a, b, c = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype), torch.randn(16, 8)
    with memory(ordered) as device:
        out = device.empty((16, 8), torch.float32)
        assert ordered.probe_mma(*map(at, map(device.put, (a, b, c))), at(out), dtype == torch.float16, 32) == 0, (
            ordered.simt_error()
        )
        # Sums of 17 exact products in fp64 are exact here to far below fp32: one rounding is left, half an ulp.
        truth = a.double() @ b.double() + c.double()
        assert ((out.double() - truth).abs() <= 2**-24 * truth.abs() + 1e-14).all()


def test_mma_needs_the_whole_warp(probe):
    with memory(probe) as device:
        operands = [device.put(torch.ones(16, n)) for n in (16, 16, 16, 16)]
        assert probe.probe_mma(*map(at, operands), 0, 31) == FAILED
        assert b"lanes that the block lacks" in probe.simt_error()


def test_conversions_are_torchs(probe):
    """Every 16-bit pattern, as fp16 and as the upper half of a float, beside the ties and their neighbours."""
    upper = torch.arange(65536) << 16
    bits = torch.cat([upper + low for low in (0, 1, 0x7FFF, 0x8000, 0x8001)] + [upper + 0x1000, upper + 0x0FFF])
    halves = torch.arange(65536).to(torch.uint16).view(torch.float16).float()
    ties = (halves[:-1] + halves[1:]) / 2
    around = [ties, torch.nextafter(ties, halves[1:]), torch.nextafter(ties, halves[:-1]), halves]
    values = torch.cat([bits.to(torch.uint32).view(torch.float32), *around])
    n = len(values)
    with memory(probe) as device:
        bf16, half = device.empty((n,), torch.bfloat16), device.empty((n,), torch.float16)
        back = device.empty((n,), torch.float32)
        assert probe.probe_convert(at(device.put(values)), at(bf16), at(half), at(back), n) == 0, probe.simt_error()
        nan = values.isnan()
        for got, want in ((bf16, values.bfloat16()), (half, values.half())):
            assert torch.equal(got.isnan(), nan)
            assert torch.equal(got[~nan].view(torch.int16), want[~nan].view(torch.int16))
        assert torch.equal(back[:65536].nan_to_num(7.0), halves.nan_to_num(7.0))
        assert torch.equal(back[:65536].isnan(), halves.isnan())


@pytest.mark.parametrize("fault", REPORTS)
def test_faults_are_reported(probe, fault):
    with memory(probe) as device:
        data = device.put(torch.zeros(64), align=16)
        code = probe.probe_fault(list(REPORTS).index(fault), at(data))
        said, want = probe.simt_error().decode(), REPORTS[fault]
        if fault == "write_before":
            assert device.free() == 1
        elif fault == "unwritten":
            assert data.isnan().all()
        elif fault == "no_barrier":
            assert (data != torch.arange(64) ^ 1).any()
        else:
            line = said.partition("probe.cu:")[2].partition(",")[0]
            assert code == FAILED and want.format(line=line) in said, said


def test_the_shim_works_after_a_fault(probe):
    with memory(probe) as device:
        assert probe.probe_fault(1, at(device.put(torch.zeros(64)))) == FAILED
        out = device.empty((1, 1, 64), torch.int32)
        assert probe.probe_block(at(out), 1, 1, 64) == 0 and probe.simt_error() == b""


def test_launches_no_gpu_takes(probe):
    assert probe.probe_block(None, 1, 1, 1025) == BAD_CONFIGURATION
    assert probe.probe_block(None, 0, 1, 32) == BAD_CONFIGURATION
    assert probe.probe_block(None, 1, 65536, 32) == BAD_CONFIGURATION


def test_a_launch_gives_its_mappings_back(probe):
    """Linux grants a process 65,530 of them: two for each thread of each library would end a whole run of the tests."""

    def mappings() -> int:
        return len(Path("/proc/self/maps").read_text().splitlines())

    before = mappings()
    with memory(probe) as device:
        assert probe.probe_block(at(device.empty((1, 1, 1024), torch.int32)), 1, 1, 1024) == 0
        assert probe.probe_fault(list(REPORTS).index("write_past"), at(device.put(torch.zeros(64)))) == FAILED
    assert mappings() < before + 100
