"""Speed and memory of every primitive beside its floor and its peers: forward, backward and both, on one machine.

    python benchmarks/throughput.py                                     # this machine's suite of every primitive
    python benchmarks/throughput.py lora_linear --model llama-3-8b --rows 512 8192 --rank 16 --csv FILE

Contenders alternate in one process on rotating inputs; what computes wrong values, or leaks, is reported and not timed.
On a GPU each is timed as Python launches it ("eager") and as a CUDA graph. With --csv an interrupted run goes on where
it ended.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # called by its path, it finds its neighbours too

from benchmarks import cases, environment, rows, summary
from benchmarks.measure import PARTS, Effort
from benchmarks.memory_methods import DTYPES, linears
from benchmarks.rows import Row

_SAME = ("device", "threads", *(name for name in rows.WHERE if name not in ("commit", "date")))
"""Columns in which a measurement that is done must be as one that would be made now."""


def current(found: Sequence[Row], env: dict[str, str], rounds: int) -> list[Row]:
    """The rows that need not be measured again: of these sources, versions, seed and device, and as many rounds."""
    same = [row for row in found if all(row[name] == env.get(name, "") for name in _SAME)]
    return [row for row in same if row["status"] != "ok" or int(row["samples"]) >= rounds]


def pending(chosen: Sequence, done: Sequence[Row], parts: Sequence[str]) -> list:
    """The cases of which the rows lack a part, or the compiled peers."""
    found = {(row["case"], row["dtype"], row["part"]) for row in done}
    compiled = {(row["case"], row["dtype"]) for row in done if row["contender"].endswith("torch.compile")}

    def lacks(case) -> bool:
        key = case.label, str(case.dtype).removeprefix("torch.")
        missing = [part for part in case.parts if part in parts and (*key, part) not in found]
        return bool(missing) or (case.compiled and key not in compiled)

    return [case for case in chosen if lacks(case)]


def model_layers(name: str) -> dict[tuple[int, int], list[str]]:
    """(in, out) features of a named model's linear layers -> the kinds of layer that have them.

    Raises:
        ValueError: no such model.
    """
    from benchmarks import architectures  # it needs transformers, which the suites do not

    architecture = architectures.find(name)
    architecture.config.num_hidden_layers = 1
    with torch.device("meta"):
        model = architecture.build(torch.bfloat16)
    found: dict[tuple[int, int], list[str]] = {}
    for path, sizes in linears(model).items():
        kinds = found.setdefault(sizes, [])
        kinds += [path.rpartition(".")[2]] * (path.rpartition(".")[2] not in kinds)
    return found


def chosen_cases(primitive: str, args: argparse.Namespace) -> list:
    """Those of the suite, of the model's layers, or of both, each once."""
    mine, found = cases.PRIMITIVES[primitive], []
    if args.suite:
        found += mine.suites[args.suite]
    if args.quick and found:
        found = cases.quick(found)
    if args.model:
        layers = model_layers(args.model)
        print(f"{args.model}: " + "; ".join(f"N={n} K={k} {', '.join(kinds)}" for (k, n), kinds in layers.items()))
        for M in args.rows:
            for R in args.rank:
                found += mine.of_layers(layers, M, R, DTYPES[args.dtype], args.dropout)
    unique: dict = {}
    for case in found:
        twin = unique.get((case.label, case.dtype), case)
        unique[case.label, case.dtype] = replace(case, compiled=args.compile or case.compiled or twin.compiled)
    return list(unique.values())


def run(primitive: str, chosen: Sequence, args: argparse.Namespace, env: dict[str, str]) -> list[Row]:
    """Every case's rows, written to the file case by case."""
    cuda, found = args.device == "cuda", []
    effort = Effort(args.rounds, (0.2 if args.quick else 2.0) if cuda else 0.1)
    for case in tqdm(chosen, unit="case", desc=primitive, dynamic_ncols=True, disable=not chosen):
        tqdm.write(f"{primitive} {str(case.dtype).removeprefix('torch.')} {case.label}")
        mine = cases.run_case(primitive, case, args.device, env, effort, parts=args.parts, seed=args.seed)
        if args.csv:
            rows.write(_file(args.csv, primitive), mine)
        found += mine
        if cuda:
            torch.cuda.empty_cache()
        if case.compiled:
            torch._dynamo.reset()  # each shape is compiled on its own, not as the n-th recompilation of one function
    return found


def _file(path: Path, primitive: str) -> Path:
    """--csv names a file, or a folder in which every primitive has its own."""
    return path if path.suffix == ".csv" else path / f"{primitive}.csv"


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/throughput.py", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    known, suites = sorted(cases.PRIMITIVES), sorted({s for one in cases.PRIMITIVES.values() for s in one.suites})
    parser.add_argument("primitive", nargs="*", metavar="PRIMITIVE", help=f"default: all, {', '.join(known)}")
    parser.add_argument("--suite", choices=suites, help="default, without --model: gpu on a GPU, else cpu")
    parser.add_argument("--model", help="the linear layers of a named model, or of a config.json, as shapes")
    parser.add_argument("--rows", type=int, nargs="+", default=[2048], metavar="M", help="of x, with --model")
    parser.add_argument("--rank", type=int, nargs="+", default=[16], help="with --model")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bf16", help="with --model")
    parser.add_argument("--dropout", type=float, default=0.0, help="with --model")
    parser.add_argument("--compile", action="store_true", help="peers under torch.compile too: some seconds a case")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, help="at least; default: 50 on a GPU, 5 on a CPU, 10 with --quick")
    parser.add_argument("--seed", type=int, default=0, help="of the random inputs")
    parser.add_argument("--csv", type=Path, help="merge the rows into this file, or <primitive>.csv of this folder")
    parser.add_argument("--quick", action="store_true", help="without the suite's largest shapes, fewer rounds")
    parser.add_argument("--force", action="store_true", help="measure again what the file already has")
    args = parser.parse_args(argv)
    args.primitive = list(dict.fromkeys(args.primitive)) or known
    for name in args.primitive:
        if name not in known:
            parser.error(f"primitive {name!r}; expected one or more of {', '.join(known)}")
    sizes = {"--rows": min(args.rows), "--rank": min(args.rank), "--rounds": 1 if args.rounds is None else args.rounds}
    for option, size in sizes.items():
        if size < 1:
            parser.error(f"{option} is {size}; expected at least 1")
    if not 0 <= args.dropout < 1:
        parser.error(f"--dropout is {args.dropout}; expected 0 up to, not with, 1")
    if args.model and environment.version("transformers") == "none":
        parser.error("--model needs transformers, which knows its layers: pip install transformers")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no CUDA device")
    if args.csv and args.csv.suffix == ".csv" and len(args.primitive) > 1:
        parser.error(f"--csv {args.csv} is one file for {len(args.primitive)} primitives; expected a folder")
    args.parts = [part for part in PARTS if part in args.parts]
    args.suite = args.suite or (None if args.model else "gpu" if args.device == "cuda" else "cpu")
    args.rounds = args.rounds or (10 if args.quick else 50 if args.device == "cuda" else 5)
    for path in [_file(args.csv, name) for name in args.primitive] if args.csv else ():
        try:
            rows.check_file(path)
        except ValueError as error:
            parser.error(f"--csv {args.csv}: {error}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    env, bad = environment.environment(args.device) | {"seed": str(args.seed)}, []
    for primitive in args.primitive:
        try:
            chosen = chosen_cases(primitive, args)
        except ValueError as error:
            print(f"throughput: {error}", file=sys.stderr)
            return 2
        path = args.csv and _file(args.csv, primitive)
        labels = {case.label for case in chosen}
        done = current(rows.read(path), env, args.rounds) if path and not args.force else []
        found = run(primitive, pending(chosen, done, args.parts), args, env)
        found = rows.merge((row for row in done if row["case"] in labels and row["part"] in args.parts), found)
        print(f"\n{primitive} on {environment.describe(args.device)}: time over the floor\n")
        print(summary.table(found))
        print("\n".join(summary.problems(found)))
        bad += [row for row in found if summary.is_fault(row)]
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
