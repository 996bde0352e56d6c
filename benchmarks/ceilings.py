"""What this device can do at most: a large copy in GB/s and a large matrix product in TFLOP/s, into ceilings.json.

python -m benchmarks.ceilings --device cuda --out DIR
"""

import argparse
import json
import os
from pathlib import Path

import torch

from . import environment
from .measure import Effort, time_cpu, time_cuda

_COPY_BYTES = {"cuda": 2 * 1024**3, "cpu": 64 * 1024**2}
_MATMUL_SIZE = {"cuda": 8192, "cpu": 512}


def ceilings(device: str, effort: Effort) -> dict[str, float]:
    """Median rates; a copy counts the bytes read and the bytes written."""
    nbytes, size = _COPY_BYTES[device], _MATMUL_SIZE[device]
    source = torch.randn(nbytes // 4, device=device)
    target = torch.empty_like(source)
    left, right = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))
    clock = time_cuda if device == "cuda" else time_cpu
    timings = clock({"copy": lambda i: target.copy_(source), "matmul": lambda i: left @ right}, effort)
    return {
        "copy_gb_per_s": 2 * nbytes / timings["copy"].median / 1e6,
        "bf16_tflop_per_s": 2 * size**3 / timings["matmul"].median / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    effort = Effort(50, 2.0) if options.device == "cuda" else Effort(5, 0.2, 50)
    found = {name: round(value, 2) for name, value in ceilings(options.device, effort).items()}
    options.out.mkdir(parents=True, exist_ok=True)
    partial = options.out / "ceilings.partial"
    partial.write_text(json.dumps(found | environment.environment(options.device), indent=1) + "\n")
    os.replace(partial, options.out / "ceilings.json")
    print(found)


if __name__ == "__main__":
    main()
