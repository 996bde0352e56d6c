"""Measures every case of a primitive's suite into a CSV, case by case, and goes on where an interrupted run ended.

python -m benchmarks.suite lora_linear --suite gpu --device cuda --csv FILE
"""

import argparse
from pathlib import Path

import torch
from tqdm import tqdm

from . import cases, environment, rows
from .measure import Effort


def pending(chosen: list, path: Path, env: dict[str, str]) -> list:
    """The cases that `path` has no rows of for these sources on this device."""
    done = {
        (row["case"], row["dtype"])
        for row in rows.read(path)
        if row["source"] == env["source"] and row["device"] == env["device"]
    }
    return [case for case in chosen if (case.label, str(case.dtype).removeprefix("torch.")) not in done]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("primitive", choices=sorted(cases.PRIMITIVES))
    parser.add_argument("--suite", required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="without the largest shapes and with fewer rounds")
    parser.add_argument("--force", action="store_true", help="measure again what the file already has")
    options = parser.parse_args()
    env = environment.environment(options.device)
    chosen = list(cases.PRIMITIVES[options.primitive].suites[options.suite])
    if options.quick:
        chosen = cases.quick(chosen)
    if not options.force:
        chosen = pending(chosen, options.csv, env)
    rounds = 50 if options.device == "cuda" else 5
    effort = Effort(10 if options.quick else rounds, 2.0 if options.device == "cuda" else 0.1)
    for case in tqdm(chosen, unit="case", dynamic_ncols=True):
        tqdm.write(f"{str(case.dtype).removeprefix('torch.')} {case.label}")
        rows.write(options.csv, cases.run_case(options.primitive, case, options.device, env, effort))
        if options.device == "cuda":
            torch.cuda.empty_cache()
        if case.compiled:
            torch._dynamo.reset()  # each shape is compiled on its own, not as the n-th recompilation of one function


if __name__ == "__main__":
    main()
