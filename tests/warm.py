"""Scripts in processes of their own that do not wait for imports: a server has the libraries and forks one for each.

    process = warm.start(ROOT / "bert_emd/emd_task_distill.py", "--teacher_model", ...)
    out, err = process.communicate(timeout=60)

To a script it is as if `python SCRIPT ...` had started it: sys.argv, the path, streams, signals, exit code. What it
shares with its siblings is what the interpreter reads at its start, such as the seed of hashes, and what libraries read
from the environment when they are imported. Where that matters, a `Server` of its own has another environment, or the
test starts an interpreter.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path
from types import ModuleType

# All that the scripts import of others, down to what transformers loads once it is asked for.
LIBRARIES = """
    accelerate datasets matplotlib.figure matplotlib.image ot pyemd safetensors.torch scipy.stats sklearn.metrics
    tensorboardX torch transformers.data.data_collator transformers.models.auto.modeling_auto
    transformers.models.auto.tokenization_auto transformers.models.bert.modeling_bert
    transformers.models.bert.tokenization_bert transformers.trainer
""".split()
# Only a process of one thread can fork safely; torch starts its own with the first work.
NO_THREADS = {"OPENBLAS_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}
LONGEST_CALL = 2**17  # bytes, of which the environment is the most


class Process:
    """A script at work, with the part of subprocess.Popen's interface that tests use."""

    def __init__(self, command: list[str], reports: socket.socket, outputs: list):
        self.args, self._reports, self._outputs = command, reports, outputs
        self.pid, self.returncode = self._report(60), None

    def _report(self, timeout: float | None) -> int:
        self._reports.settimeout(timeout)
        return int(self._reports.recv(20))

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code, or minus the signal that ended it. Raises subprocess.TimeoutExpired."""
        if self.returncode is None:
            try:
                self.returncode = self._report(timeout)
            except (TimeoutError, BlockingIOError) as error:
                raise subprocess.TimeoutExpired(self.args, timeout) from error
        return self.returncode

    def poll(self) -> int | None:
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait, and read what it wrote to stdout and stderr."""
        self.wait(timeout)
        for file in self._outputs:
            file.seek(0)
        out, err = (file.read() for file in self._outputs)
        return out, err

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it has just ended, and nobody has said so yet
                os.kill(self.pid, number)


class Server:
    """Imports the libraries, in an environment (None: this process's), then forks. It ends with this process."""

    def __init__(self, environment: dict[str, str] | None = None):
        self._environment = environment
        self._calls, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())],
                env=(environment or os.environ) | NO_THREADS,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )

    def start(
        self,
        script: str | Path,
        *options,
        folder: Path | None = None,
        answers: str = "",
        terminal: int | None = None,
        draws: bool = False,
        **environment: str,
    ) -> Process:
        """Run a script in a folder (None: the present one).

        answers: what it reads from stdin. terminal: the descriptor of one, which then is its stdout. draws: whether its
        pictures show anything. environment: changes to the server's, for what is read there while the script runs.
        """
        call = {"command": [str(part) for part in (script, *options)], "folder": str(folder or Path.cwd())}
        call |= {"draws": draws, "environment": (self._environment or dict(os.environ)) | environment}
        outputs = [tempfile.TemporaryFile("w+") for _ in ("stdout", "stderr")]  # noqa: SIM115
        reports, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, tempfile.TemporaryFile("w+") as stdin:
            stdin.write(answers)
            stdin.seek(0)
            files = [file.fileno() for file in (theirs, stdin, *outputs)]
            if terminal is not None:
                files[2] = terminal
            socket.send_fds(self._calls, [json.dumps(call).encode()], files)
        return Process(call["command"], reports, outputs)


@functools.cache
def _server() -> Server:
    return Server()


def start(script: str | Path, *options, **more) -> Process:
    """`Server.start`, of a server in this process's environment."""
    return _server().start(script, *options, **more)


def start_pair(script: str | Path, *options, **environment: str) -> list[Process]:
    """Two processes of a script that work together, as torchrun starts them."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    both = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    both |= environment
    return [start(script, *options, RANK=rank, LOCAL_RANK=rank, **both) for rank in "01"]


def serve(calls: socket.socket) -> dict:
    """Fork for each call; returns in the new process, with the call that it is to carry out.

    Between that process and this one stands another, which reports the new one's number and, in the end, its exit code.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the scripts
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        message, files, *_ = socket.recv_fds(calls, LONGEST_CALL, 4)
        if not message:
            os._exit(0)
        if os.fork() == 0:
            break
        for file in files:
            os.close(file)
    calls.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    reports = socket.socket(fileno=files[0])
    pid = os.fork()
    if pid == 0:
        reports.close()
        for number, file in enumerate(files[1:]):
            os.dup2(file, number)
            os.close(file)
        return json.loads(message)
    reports.send(str(pid).encode())
    reports.send(str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])).encode())
    os._exit(0)


def carry_out(call: dict) -> None:
    import torch

    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(call["environment"])
    os.chdir(call["folder"])
    # No longer /dev/null, but a file or a terminal.
    sys.stdout = open(1, "w", 1 if os.environ.get("PYTHONUNBUFFERED") else -1, closefd=False)  # noqa: SIM115
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count())))
    sys.argv = call["command"]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    if not call["draws"]:
        import bert_emd.pictures

        bert_emd.pictures.save_picture = save_blank
    code = run(Path(sys.argv[0]).absolute())
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    if code == -signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(code)  # an interpreter that takes all its modules apart needs seconds for it


def run(script: Path) -> int:
    """Run it as `__main__`. Returns the code with which Python would end."""
    main = sys.modules["__main__"] = ModuleType("__main__")
    main.__file__ = str(script)
    try:
        exec(compile(script.read_bytes(), script, "exec"), main.__dict__)
    except SystemExit as end:
        if isinstance(end.code, int | None):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException as error:
        traceback.print_exc()
        return -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    return 0


if __name__ == "__main__":
    from blank_pictures import save_blank

    for name in LIBRARIES:
        importlib.import_module(name)
    assert len(os.listdir("/proc/self/task")) == 1
    gc.freeze()
    carry_out(serve(socket.socket(fileno=int(sys.argv[1]))))
