"""How a suite shows where it stands: a table redrawn in place on a terminal, elsewhere one line per event."""

import shutil
import sys
import time
from collections.abc import Callable
from statistics import mean

from experiments.planned_runs import PlannedRun

_UP_AND_CLEAR = "\033[{}F\033[J"


def duration(seconds: float) -> str:
    """Seconds as `45 s`, `12.5 min` or `3.4 h`."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def table_of_runs(runs: list[PlannedRun], content: Callable[[list[PlannedRun]], str]) -> list[str]:
    """Lines of a table with a row for each task and size, a column for each method, the teacher's first.

    content: what a cell says of its runs. A task's teacher stands in the row of its first size.
    """
    cells: dict[tuple[str, str], list[PlannedRun]] = {}
    for run in runs:
        sizes = [other.size for other in runs if other.task == run.task and not other.is_teacher]
        size = sizes[0] if run.is_teacher and sizes else run.size
        cells.setdefault((f"{run.task} {size}".strip(), run.method), []).append(run)
    rows, columns = (list(dict.fromkeys(names)) for names in zip(*cells, strict=True))

    def cell(row: str, column: str) -> str:
        here = cells.get((row, column))
        return content(here) if here else ""

    lines = [["", *columns], *([row, *(cell(row, column) for column in columns)] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]


class Progress:
    """Shows the state of all runs. `records`: run name -> record, of which `state`, `seconds` and `error` are read."""

    def __init__(self, runs: list[PlannedRun], jobs: int, stream=None):
        self._runs, self._jobs, self._stream = runs, jobs, stream or sys.stdout
        self._shown: dict[str, str] = {}
        self._begins: dict[str, float] = {}
        self._height = 0

    def show(self, records: dict[str, dict]) -> None:
        """Show what has changed since the last call."""
        states = {run.name: records.get(run.name, {}).get("state", "waiting") for run in self._runs}
        for name, state in states.items():
            if state == "running" and name not in self._begins:
                self._begins[name] = time.monotonic()
        if self._stream.isatty():
            self._redraw(self._table(states, records))
        else:
            self._print_changes(states, records)
        self._shown = states

    def _print_changes(self, states: dict[str, str], records: dict[str, dict]) -> None:
        ended = sum(state in ("done", "failed", "skipped") for state in states.values())
        place = f"[{ended}/{len(states)}]"
        if not self._shown:
            print(f"{place} {len(states) - ended} runs to go, {self._jobs} side by side", file=self._stream, flush=True)
            return
        for run in self._runs:
            state, record = states[run.name], records.get(run.name, {})
            if state != self._shown[run.name]:
                more = (
                    f" in {duration(record['seconds'])}" if state in ("done", "failed") and "seconds" in record else ""
                )
                more += self._about(states, records) if state == "done" else ""
                more += f": {record['error']}" if "error" in record else ""
                print(f"{place} {run.name} {state}{more}", file=self._stream, flush=True)

    def _redraw(self, lines: list[str]) -> None:
        width = shutil.get_terminal_size().columns
        up = _UP_AND_CLEAR.format(self._height) if self._height else ""
        self._stream.write(up + "".join(line[: width - 1] + "\n" for line in lines))
        self._stream.flush()
        self._height = len(lines)

    def _table(self, states: dict[str, str], records: dict[str, dict]) -> list[str]:
        def counted(runs: list[PlannedRun]) -> str:
            here = [states[run.name] for run in runs]
            counts = {state: here.count(state) for state in ("done", "running", "failed", "skipped")}
            marks = [f"{counts[state]} {state}" for state in ("running", "failed", "skipped") if counts[state]]
            return ", ".join([f"{counts['done']}/{len(here)}", *marks])

        table = table_of_runs(self._runs, counted)
        done = sum(state == "done" for state in states.values())
        failures = [f"{name}: {record['error']}" for name, record in records.items() if record["state"] == "failed"]
        return [*table, f"{done} of {len(states)} runs done{self._about(states, records)}", *failures[-3:]]

    def _about(self, states: dict[str, str], records: dict[str, dict]) -> str:
        left = self._left(states, records)
        return f", about {duration(left)} left" if left else ""

    def _left(self, states: dict[str, str], records: dict[str, dict]) -> float | None:
        """Seconds until all is done, by the means of the finished runs that are most alike; None: there are none. Steps
        are like nothing else, and left out."""
        of_tasks = [run for run in self._runs if not run.is_step]

        def likenesses(run: PlannedRun) -> list[tuple]:
            kind = run.is_teacher
            return [(kind, run.task, run.size, run.method), (kind, run.task), (kind,), ()]

        known: dict[tuple, list[float]] = {}
        for run in of_tasks:
            if states[run.name] == "done":
                for likeness in likenesses(run):
                    known.setdefault(likeness, []).append(records[run.name]["seconds"])
        if not known:
            return None
        seconds = 0
        for run in of_tasks:
            if states[run.name] in ("waiting", "running"):
                whole = mean(next(known[likeness] for likeness in likenesses(run) if likeness in known))
                if states[run.name] == "running":
                    whole -= records[run.name].get("seconds", 0) + time.monotonic() - self._begins[run.name]
                seconds += max(0, whole)
        return seconds / self._jobs
