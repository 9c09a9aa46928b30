"""Where the runs of a suite are carried out, and how many at once: this machine, or a Ray cluster."""

import math
import os
import queue
import threading
from concurrent.futures import Future, ThreadPoolExecutor

from bert_finetune.errors import InputError, reason
from experiments.execution import execute
from experiments.planned_runs import PlannedRun

MEMORY_PER_RUN = 4 * 2**30  # bytes that a run on a CPU is taken to need, BERT-base as its teacher


class LocalEngine:
    """Runs side by side on this machine, as many as there are `environments`: each has one to itself while it runs."""

    # What a run's future raises where the run could not be carried out, and nobody made a mistake.
    failures = (OSError,)

    def __init__(self, environments: list[dict[str, str]]):
        # No more than can begin: of what is ready next, the first in the plan's order is then the next.
        self.jobs = self.room = len(environments)
        self._free = queue.SimpleQueue()
        for environment in environments:
            self._free.put(environment)
        self._pool = ThreadPoolExecutor(self.jobs)
        self._stopping = threading.Event()

    def submit(self, run: PlannedRun) -> Future:
        return self._pool.submit(self._execute, run)

    def _execute(self, run: PlannedRun) -> dict:
        environment = self._free.get()
        try:
            return execute(run, environment, self._stopping)
        finally:
            self._free.put(environment)

    def stop(self) -> None:
        """End every run; returns when none is left."""
        self._stopping.set()
        self._pool.shutdown(cancel_futures=True)


def local_environments(jobs: int | None) -> list[dict[str, str]]:
    """One set of environment variables for each of `jobs` runs side by side (None: as many as this machine bears)."""
    import psutil
    import torch

    gpus = []
    if torch.cuda.is_available():
        named = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = named.split(",") if named else [str(k) for k in range(torch.cuda.device_count())]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    fit = min(cores // 2, int(psutil.virtual_memory().available / MEMORY_PER_RUN))
    jobs = jobs or len(gpus) or max(1, fit)
    threads = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(max(1, cores // jobs))}
    return [threads | ({"CUDA_VISIBLE_DEVICES": gpus[k % len(gpus)]} if gpus else {}) for k in range(jobs)]


class RayEngine:
    """Runs as tasks of a Ray cluster whose machines share the current folder, and have this project installed.

    address: the cluster's, or "auto" for the one that this machine belongs to. cpus, gpus: what a run asks for (a GPU
    may be a fraction); None: a GPU and its share of the cores where the cluster has GPUs, else 2 cores.
    Raises InputError where Ray is not installed, there is no such cluster, or no room in it for a run.
    """

    room = math.inf  # what waits in a cluster begins wherever a machine comes free, or is added
    RETRIES = 5  # of a run whose worker or machine died; it resumes from its last checkpoint

    def __init__(self, address: str, cpus: float | None, gpus: float | None):
        try:
            import ray
        except ImportError as error:
            raise InputError("--engine ray: Ray is not installed; pip install ray") from error
        try:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise InputError(
                f"--ray_address {address}: {reason(error)}; 'ray start --head' starts a cluster"
            ) from error
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
        self.failures = (OSError, ray.exceptions.RayError)

    def stop(self) -> None:
        """Leave the cluster, which ends this suite's tasks and with them their scripts."""
        self._ray.shutdown()


def _execute_in(folder: str, run: PlannedRun, environment: dict[str, str]) -> dict:
    os.chdir(folder)
    return execute(run, environment, threading.Event())
