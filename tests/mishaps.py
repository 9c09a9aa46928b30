"""What can befall a run from outside, made to happen: no permission, a full disk; and a look at what it left."""

import ctypes
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 1, 2
CAPABILITY_VERSION_3 = 0x20080522


def snapshot(folder: Path) -> dict[str, bytes | str]:
    """Every path below `folder`: a file's bytes, where a link leads, or that it is a folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found[name] = f"link to {os.readlink(path)}"
        elif path.is_dir():
            found[name] = "folder"
        else:
            found[name] = path.read_bytes() if os.access(path, os.R_OK) else f"unreadable, {path.stat()}"
    return found


@contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """No file can grow beyond `limit` bytes: the system refuses the write, as it does when no space is left."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def permissions_apply() -> Iterator[None]:
    """Permissions hold as for anybody: for root, this thread lays down the two capabilities that see to it that not."""
    if os.geteuid() != 0:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "capset"):
        pytest.skip("permissions do not apply to root")
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    before = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable, and again for capabilities from 32 on
    assert libc.capget(header, before) == 0
    without = (ctypes.c_uint32 * 6)(*before)
    without[0] &= ~(1 << CAP_DAC_OVERRIDE | 1 << CAP_DAC_READ_SEARCH)
    assert libc.capset(header, without) == 0
    try:
        yield
    finally:
        assert libc.capset(header, before) == 0


def dies(action: Callable[[], object], size: int | None = None, rename: int | None = None) -> bool:
    """Do `action` in a process that the system kills as soon as a file would grow beyond `size` bytes, or before rename
    number `rename`; return whether it died of that."""
    child = os.fork()
    if child:
        status = os.waitpid(child, 0)[1]
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
        return os.WIFSIGNALED(status)
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if size is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        renames = iter(range(1000))

        def killed_before(original):
            def renamed(*args, **kwargs):
                if next(renames) == rename:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*args, **kwargs)

            return renamed

        os.rename, os.replace = killed_before(os.rename), killed_before(os.replace)
        action()
        os._exit(0)
    finally:
        os._exit(1)
