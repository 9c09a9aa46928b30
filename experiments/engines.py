"""One run of a suite: its command, its record on disk, and how it is carried out, here or on a Ray cluster.

Imports nothing heavy: a Ray worker needs no more than this to run a script.
"""

import contextlib
import ctypes
import datetime
import fcntl
import functools
import json
import os
import queue
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from bert_finetune.errors import InputError, reason
from bert_finetune.files import write_json

ROOT = Path(__file__).resolve().parents[1]

_POLL_SECONDS = 0.2
_SECONDS_TO_STOP = 10
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


@dataclass(frozen=True)
class Run:
    """One call of a script: a task's teacher (no method, no seed), or a student.

    options: what the plan says of it. place: options that only say where things lie; the others, and its teacher's, are
    what a finished run is recognised by.
    """

    task: str
    size: str
    method: str
    seed: int | None
    script: str
    options: dict
    folder: Path
    place: dict = field(default_factory=dict)
    teacher: "Run | None" = None

    @property
    def name(self) -> str:
        seed = None if self.seed is None else f"seed-{self.seed}"
        return "/".join(filter(None, (self.task, self.size, self.method, seed)))

    @property
    def command(self) -> list[str]:
        """The script and its arguments. A run that was stopped goes on from its last checkpoint."""
        path = ROOT / self.script
        shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
        place = self.place | {"output_dir": str(self.folder)}
        return [str(shown), *as_arguments(self.options | place), "--resume_from_checkpoint"]

    @property
    def shown(self) -> str:
        """The command, ready to paste."""
        return shlex.join(["python", *self.command])

    @property
    def record_file(self) -> Path:
        return self.folder.with_name(self.folder.name + ".json")

    @property
    def log(self) -> Path:
        return self.folder.with_name(self.folder.name + ".log")

    def read_record(self) -> dict:
        """What is known of the run from before; empty for one that was never started."""
        try:
            return json.loads(self.record_file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except ValueError:
            raise InputError(f"{self.record_file}: not a record of a run; remove it") from None

    def write_record(self, state: str, **more) -> dict:
        """Write and return the record: what the run is, its `state` (running, stopped, done, failed, skipped), `more`.

        `seconds` are those of all starts that have ended, from `seconds_so_far`; `returncode` is negative for a run
        that a signal killed.
        """
        what = {key: getattr(self, key) for key in ("task", "size", "method", "seed", "options")}
        if self.teacher:
            what["teacher_options"] = self.teacher.options
        record = {**what, "command": self.shown, "state": state, **more}
        self.record_file.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.record_file, record)
        return record

    def remove_checkpoints(self) -> None:
        """With the optimiser's state, each is as large as three models; the best of them is in the folder itself."""
        for checkpoint in self.folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint, ignore_errors=True)

    def seconds_so_far(self) -> float:
        """What the starts of this run took; one that nobody saw the end of counts up to its last line in the log."""
        record = self.read_record()
        if not self.folder.exists():  # removed, to run it anew
            return 0
        seconds = record.get("seconds", 0)
        if record.get("state") == "running" and self.log.exists():
            begun = datetime.datetime.fromisoformat(record["started"]).timestamp()
            seconds += max(0, self.log.stat().st_mtime - begun)
        return round(seconds, 1)

    def is_done(self) -> bool:
        return self.read_record().get("state") == "done" and (self.folder / "eval_results.json").exists()


def as_arguments(options: dict) -> list[str]:
    """Options as a plan writes them -> arguments: lists become `a,b`, true and false `True` and `False`."""
    arguments = []
    for name, value in options.items():
        arguments += [f"--{name}", ",".join(map(str, value)) if isinstance(value, list) else str(value)]
    return arguments


@contextlib.contextmanager
def only_suite(output_dir: Path) -> Iterator[None]:
    """Keep every other suite out of `output_dir`. Raises InputError where there is one already."""
    output_dir.mkdir(parents=True, exist_ok=True)
    with open(output_dir / ".lock", "ab") as lock:
        if not _lock(lock):
            raise InputError(f"--output_dir {output_dir}: another suite is running there")
        yield


def _lock(file: IO) -> bool:
    """Take the lock of an open file, which ends with the last process that has it open. False: another has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def execute(run: Run, environment: dict[str, str], stopping: threading.Event) -> dict:
    """Carry out one run and return its record; `environment`: variables beside those of this process.

    Nothing is done where the run has finished before; of one that finishes the checkpoints are removed. Once `stopping`
    is set the script is ended, and its record is left as it is. Raises OSError where log or record cannot be written.
    """
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    with open(run.log, "ab") as log:
        # The script writes into the log too, so the lock lasts as long as any process of an earlier start of this run,
        # one that outlived its suite or its Ray worker.
        while not _lock(log):
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


class LocalEngine:
    """Runs side by side on this machine, as many as there are `environments`: each has one to itself while it runs."""

    def __init__(self, environments: list[dict[str, str]]):
        self.jobs = len(environments)
        self._free = queue.SimpleQueue()
        for environment in environments:
            self._free.put(environment)
        self._pool = ThreadPoolExecutor(self.jobs)
        self._stopping = threading.Event()

    def submit(self, run: Run) -> Future:
        return self._pool.submit(self._execute, run)

    def _execute(self, run: Run) -> dict:
        environment = self._free.get()
        try:
            return execute(run, environment, self._stopping)
        finally:
            self._free.put(environment)

    def stop(self) -> None:
        """End every run; returns when none is left."""
        self._stopping.set()
        self._pool.shutdown(cancel_futures=True)


class RayEngine:
    """Runs as tasks of a Ray cluster whose machines share the current folder, and have this project installed.

    address: the cluster's, or "auto" for the one that this machine belongs to. cpus, gpus: what a run asks for (a GPU
    may be a fraction); None: a GPU and its share of the cores where the cluster has GPUs, else 2 cores.
    Raises InputError where Ray is not installed, there is no such cluster, or no room in it for a run.
    """

    RETRIES = 5  # of a run whose worker or machine died; it resumes from its last checkpoint

    def __init__(self, address: str, cpus: float | None, gpus: float | None):
        try:
            import ray
        except ImportError:
            raise InputError("--engine ray: Ray is not installed; pip install ray") from None
        try:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise InputError(f"--ray_address {address}: {reason(error)}; 'ray start --head' starts a cluster") from None
        self._ray = ray
        has, machines = ray.cluster_resources(), [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if gpus is None:
            gpus = 1 if has.get("GPU") else 0
        if cpus is None:
            cpus = max(1, has.get("CPU", 0) * gpus // has["GPU"]) if has.get("GPU") else 2
        asked = {name: amount for name, amount in (("CPU", cpus), ("GPU", gpus)) if amount}
        if not asked or min(asked.values()) < 0:
            raise InputError(
                "--cpus_per_run, --gpus_per_run: at least 0, and not both 0 (the default for GPUs is 0 here)"
            )
        self.jobs = sum(int(min(machine.get(name, 0) / asked[name] for name in asked)) for machine in machines)
        if self.jobs < 1:
            raise InputError(f"--ray_address {address}: no machine there has {cpus:g} CPUs and {gpus:g} GPUs for a run")
        threads = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(max(1, int(cpus)))}
        task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=self.RETRIES)(_execute_in)
        self.submit = lambda run: task.remote(os.getcwd(), run, threads).future()

    def stop(self) -> None:
        """Leave the cluster, which ends this suite's tasks and with them their scripts."""
        self._ray.shutdown()


def _execute_in(folder: str, run: Run, environment: dict[str, str]) -> dict:
    os.chdir(folder)
    return execute(run, environment, threading.Event())
