"""How a planned run is carried out: its script in a process of its own, its log, what holds others off.

Imports nothing heavy: a Ray worker needs no more than this to run a script.
"""

import ctypes
import datetime
import fcntl
import functools
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO

from experiments.planned_runs import PlannedRun

_POLL_SECONDS = 0.2
_SECONDS_TO_STOP = 10
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def lock(file: IO) -> bool:
    """Take the lock of an open file, which ends with the last process that has it open. False: another has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def execute(run: PlannedRun, environment: dict[str, str], stopping: threading.Event) -> dict:
    """Carry out one run and return its record; `environment`: variables beside those of this process.

    Nothing is done where the run has finished before; of one that finishes the checkpoints are removed. Once `stopping`
    is set the script is ended, and its record is left as it is. Raises OSError where log or record cannot be written.
    """
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    with open(run.log, "ab") as log:
        # The script writes into the log too, so the lock lasts as long as any process of an earlier start of this run,
        # one that outlived its suite or its Ray worker.
        while not lock(log):
            if stopping.wait(_POLL_SECONDS):
                return run.read_record()
        if run.is_done() or stopping.is_set():
            return run.read_record()
        started = {"started": datetime.datetime.now().astimezone().isoformat(timespec="seconds")}
        before = run.seconds_so_far()
        run.write_record("running", **started, seconds=before)
        log.write(f"$ {run.shown}\n".encode())
        log.flush()
        begin = time.monotonic()
        returncode = run_script(run.command, environment, log, stopping)
    if returncode is None:
        return run.read_record()
    ended = started | {"seconds": round(before + time.monotonic() - begin, 1), "returncode": returncode}
    if returncode:
        return run.write_record("failed", **ended, error=last_error(run.log, returncode))
    record = run.write_record("done", **ended)
    run.remove_checkpoints()
    return record


def run_script(
    command: list[str], environment: dict[str, str], log: IO, stopping: threading.Event | None = None
) -> int | None:
    """Run a script with all its output in `log`; its exit code, or None where it was ended by `stopping`."""
    stopping = stopping or threading.Event()
    process = subprocess.Popen(
        [sys.executable, *command],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=os.environ | {"PYTHONUNBUFFERED": "1", "TQDM_DISABLE": "1"} | environment,
        start_new_session=True,  # Ctrl-C is for the suite, which then ends its runs
        preexec_fn=functools.partial(_die_with, os.getpid()) if _LIBC else None,
    )
    try:
        while process.poll() is None:
            if stopping.wait(_POLL_SECONDS):
                return None
        return process.returncode
    finally:
        _end(process)


def _die_with(parent: int) -> None:
    """In a new process: be killed when the thread that started it ends, however that comes about."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _end(process: subprocess.Popen) -> None:
    """End a script, if it still runs, and its data loaders' processes."""
    if process.poll() is not None:
        return
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(_SECONDS_TO_STOP)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def last_error(log: Path, returncode: int) -> str:
    """Why the last run in `log` failed, in one line: the last that speaks of an error, or the last at all."""
    if returncode < 0:
        return f"killed by {signal.Signals(-returncode).name}"
    lines = log.read_text(encoding="utf-8", errors="replace").rpartition("\n$ ")[2].splitlines()[1:]
    lines = [line.strip() for line in lines if line.strip()]
    return next((line for line in reversed(lines) if "error" in line.lower()), (lines or ["no output"])[-1])
