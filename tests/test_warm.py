"""A script that the warm server forks is as one that `python SCRIPT` starts."""

import os
import signal
import subprocess
import sys
import time

import pytest
import warm

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("warm")]

SCRIPT = """
import json, os, sys, threading

if __name__ == "__main__":
    import beside
    print(json.dumps([sys.argv, sys.path[0], __file__, os.getcwd(), os.environ.get("MINE"), beside.__file__, input()]))
    print("to stderr", file=sys.stderr)
    exec(sys.argv[1])
"""
ENDS = {
    "by itself": "pass",
    "with a code": "sys.exit(3)",
    "with a message": "sys.exit('no such thing')",
    "by an error": "1 / 0",
    "by Ctrl-C": "os.kill(os.getpid(), 2)",
    "by the system": "os.kill(os.getpid(), 9)",
    "without ado": "os._exit(4)",
}


@pytest.mark.parametrize("end", ENDS)
def test_as_if_python_had_started_it(end, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/script.py").write_text(SCRIPT)
    (tmp_path / "folder/beside.py").write_text("")
    command = ["folder/script.py", ENDS[end], "--option"]
    cold = subprocess.run(
        [sys.executable, *command], input="yes\n", capture_output=True, text=True, env=os.environ | {"MINE": "1"}
    )
    process = warm.start(*command, answers="yes\n", MINE="1")
    out, err = process.communicate(timeout=60)
    assert process.returncode == cold.returncode
    assert out == cold.stdout
    # A traceback has the server's own lines too.
    assert err.splitlines()[:2] == cold.stderr.splitlines()[:2] and err.splitlines()[-1] == cold.stderr.splitlines()[-1]


def test_signals_and_waiting(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import time\nprint('began', flush=True)\ntime.sleep(60)")
    for number in (signal.SIGINT, signal.SIGKILL):
        process = warm.start(script)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.2)
        assert process.poll() is None and os.getpgid(process.pid)
        time.sleep(0.5)
        process.send_signal(number)
        out, err = process.communicate(timeout=10)
        assert (process.poll(), out) == (-number, "began\n") and ("KeyboardInterrupt" in err) == (number == 2)


def test_tests_of_a_group_stay_together(request):
    """pytest-xdist says so in their names, which newer versions of pytest do not let it change."""
    if not getattr(request.config.option, "loadgroup", False):
        pytest.skip("tests run side by side with --dist loadgroup")
    assert request.node.nodeid.endswith("@warm")
