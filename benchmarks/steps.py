"""Runs steps as subprocesses, each with its own time budget and log; resumes, and stops where going on has no sense."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

DONE, BEFORE, FAILED, OVERRAN, NOT_RUN = "done", "done before", "failed", "overran", "not run"
_TAIL_LINES = 40
_LEAST_SECONDS = 5.0  # with less than this left of the whole, a step is not begun


@dataclass(frozen=True)
class Step:
    """A command with `budget` seconds. `stops` lists the statuses after which no later step runs."""

    name: str
    command: tuple[str, ...]
    budget: float
    stops: tuple[str, ...] = (FAILED, OVERRAN)
    env: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    name: str
    status: str
    seconds: float = 0.0
    note: str = ""


class Journal:
    """Which steps are done for this version of the sources, in a file that survives an interrupted run."""

    def __init__(self, path: Path, source: str):
        self._path, self._source = path, source
        self._done: dict[str, dict] = json.loads(path.read_text()) if path.exists() else {}

    def holds(self, step: Step) -> bool:
        """Done by the very same command on the very same sources."""
        return self._done.get(step.name) == self._entry(step)

    def add(self, step: Step) -> None:
        self._done[step.name] = self._entry(step)
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps(self._done, indent=1))
        os.replace(partial, self._path)

    def _entry(self, step: Step) -> dict:
        return {"source": self._source, "command": list(step.command), "env": step.env}


def log_of(folder: Path, name: str) -> Path:
    """Where a step of this name writes what it prints."""
    return folder / "logs" / f"{name.replace(' ', '-')}.log"


def _run(step: Step, log: Path, seconds: float, cwd: Path) -> tuple[str, str]:
    """(status, note) of one command; its whole process group ends with it."""
    with log.open("w") as file:
        process = subprocess.Popen(
            step.command,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONUNBUFFERED": "1"} | step.env,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return OVERRAN, f"stopped after {seconds:.0f} s"
    return (DONE, "") if code == 0 else (FAILED, f"exit status {code}")


def _tail(log: Path) -> str:
    return "\n".join(f"  | {line}" for line in log.read_text(errors="replace").splitlines()[-_TAIL_LINES:])


def run_steps(
    steps: Sequence[Step], folder: Path, source: str, cwd: Path, limit: float, force: bool = False
) -> list[Outcome]:
    """Run the steps in order within `limit` seconds together; `folder` keeps the journal and one log per step.

    A step that is done for `source` (a hash of the sources) is not repeated unless `force`. The log of a step
    that failed or overran is printed to its end.
    """
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    journal = Journal(folder / "journal.json", source)
    outcomes: list[Outcome] = []
    begin, stopped_by = time.monotonic(), ""
    for step in steps:
        left = limit - (time.monotonic() - begin)
        if stopped_by:
            outcomes.append(Outcome(step.name, NOT_RUN, note=stopped_by))
        elif journal.holds(step) and not force:
            outcomes.append(Outcome(step.name, BEFORE))
        elif left < _LEAST_SECONDS:
            outcomes.append(Outcome(step.name, NOT_RUN, note=f"the whole run's {limit:.0f} s are spent"))
        else:
            log = log_of(folder, step.name)
            started = time.monotonic()
            status, note = _run(step, log, min(step.budget, left), cwd)
            outcomes.append(Outcome(step.name, status, time.monotonic() - started, note))
            if status == DONE:
                journal.add(step)
            else:
                print(_tail(log), flush=True)
            if status in step.stops:
                stopped_by = f"{step.name} {status}"
        one = outcomes[-1]
        print(f"[{one.name}] {one.status} {one.seconds:.0f} s {one.note}".rstrip(), flush=True)
    return outcomes
