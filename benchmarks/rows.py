"""Result rows: one CSV schema for every primitive, written whole or not at all, and the tables printed from it."""

import csv
import errno
import io
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from tabulate import tabulate

KEY = ("primitive", "case", "dtype", "contender", "part", "timing", "device", "threads")
"""What makes a row one: a new measurement replaces the row with the same key. part: forward, backward, or both."""

MEASURED = (
    "role",  # floor, ours or peer
    "implementation",  # which kernel ran: native, triton (with its path), reference, or a peer's version
    "status",  # ok, or why there is no figure: wrong values, not installed, out of memory, error
    "samples",
    "ms_p50",
    "ms_p20",
    "ms_p80",
    "ratio_floor",  # median over the rounds of this / floor, both measured in that round
    "ratio_floor_low",  # 95 % confidence interval of that median
    "ratio_floor_high",
    "ours_over_this",  # median over the rounds of ours / this: below 1 is where ours is faster
    "ours_over_this_low",
    "ours_over_this_high",
    "peak_bytes",  # most allocated during the part, minus what was allocated before it; of a whole step, minus the
    # base model's weights
    "saved_bytes",  # kept between forward and backward, parameters not counted
    "error_over_bound",  # worst |value - fp64 truth| / derived bound over sampled outputs and gradients
)

WHERE = ("driver", "cuda", "isa", "python", "torch", "triton", "peft", "commit", "source", "seed", "date")

COLUMNS = KEY + MEASURED + WHERE

EARLIER = {"part": "both", "seed": "0"}
"""Columns that the first result files do not have, and what was true of their rows."""

Row = dict[str, str]


def values_of(case: str) -> dict[str, float | str]:
    """A case's label in parts: M=8192 N=4096 act=gelu -> {"M": 8192.0, "N": 4096.0, "act": "gelu"}."""
    words = (word.split("=") for word in case.split())
    return {name: float(value) if value[:1].isdigit() else value for name, value in words}


def make_row(**values: object) -> Row:
    """A row of every column, as text; a float keeps five significant digits, what is not given is empty.

    Raises:
        KeyError: a value that is no column.
    """
    unknown = set(values) - set(COLUMNS)
    if unknown:
        raise KeyError(f"no such column: {', '.join(sorted(unknown))}")
    return {name: _text(values.get(name)) for name in COLUMNS}


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def read(path: Path) -> list[Row]:
    """The rows of a result file, none when it is not there.

    Raises:
        ValueError: a file with other columns.
    """
    if not path.exists():
        return []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        names = set(reader.fieldnames or ())
        if not set(COLUMNS) - set(EARLIER) <= names <= set(COLUMNS):
            raise ValueError(f"{path} has columns {reader.fieldnames}; expected {list(COLUMNS)}")
        return [{name: row.get(name, EARLIER.get(name, "")) for name in COLUMNS} for row in reader]


def merge(before: Iterable[Row], rows: Iterable[Row]) -> list[Row]:
    """All of them, sorted; of rows with the same key the later."""
    merged = {tuple(row[name] for name in KEY): row for row in [*before, *rows]}
    return [merged[key] for key in sorted(merged)]


def write(path: Path, rows: Iterable[Row]) -> None:
    """Merge `rows` into the file at `path`: same key replaces, others stay, sorted; the file is never half-written."""
    replace_file(path, csv_bytes(COLUMNS, merge(read(path), rows)))


def csv_bytes(columns: Sequence[str], lines: Iterable[dict]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue().encode()


def make_room(path: Path) -> None:
    """Make a file's folder.

    Raises:
        OSError: no file can be written there.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "it is a folder; expected a file to write")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent):
        pass


def check_file(path: Path) -> None:
    """Raise ValueError, saying why, where rows cannot be merged into the file at `path`; make its folder."""
    try:
        make_room(path)
        read(path)
    except OSError as error:
        raise ValueError(f"cannot be written: {error.strerror}") from error
    except (ValueError, csv.Error) as error:
        raise ValueError(f"is not a file of rows: {error}") from error


def replace_file(path: Path, content: bytes) -> None:
    """Write the file at `path`, and its folders, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=path.suffix, delete=False) as file:
        file.write(content)
    os.chmod(file.name, 0o644)  # a temporary file is private, a result is not
    os.replace(file.name, path)


def markdown(headers: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """A GitHub table; cells are printed as they are."""
    return tabulate(list(lines), headers=list(headers), tablefmt="github", disable_numparse=True)
