"""A server of exported students: what it answers, what it refuses, batches of several requests, and an orderly stop."""

import asyncio
import contextlib
import http.client
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import uvicorn
from conftest import ROOT
from test_classify import bare_environment, save_student, tokenizer  # noqa: F401 (a fixture)

from deploy.batcher import Batcher, QueueFull
from deploy.classify import Classifier
from deploy.serve import listen, read_options
from deploy.server import Limits, make_app

NAMES = ["ah", "bee", "sea"]


@contextlib.contextmanager
def served(classifier, **limits):
    """The port of a server in this process."""
    limits = {"max_batch": 8, "max_wait": 0.001, "max_queue": 100, "max_texts": 20, "max_bytes": 2000} | limits
    app = make_app(classifier, Limits(**limits))
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical"))
    with listen("127.0.0.1", 0) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield listening.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


def ask(port, path="/classify", body=None, **headers):
    """Status and content of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    body = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("GET" if body is None else "POST", path, body, {"Content-Type": "application/json"} | headers)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, json.loads(content) if "json" in answer.headers["Content-Type"] else content.decode()


@pytest.fixture(scope="module")
def student(tmp_path_factory, tokenizer):  # noqa: F811
    return save_student(tmp_path_factory.mktemp("serve") / "onnx", tokenizer, NAMES)


@pytest.fixture(scope="module")
def port(student):
    with served(Classifier(student)) as port:
        yield port


def labels(answer):
    assert answer[0] == 200, answer
    return [found["label"] for found in answer[1]["answers"]]


def test_one_text_and_many(port, student):
    assert labels(ask(port, body={"text": "b b"})) == ["bee"]
    assert labels(ask(port, body={"texts": ["a", "b", "c c"] * 6})) == NAMES * 6  # more than a batch
    assert ask(port, body={"texts": []}) == (200, {"answers": []})
    (found,) = ask(port, body={"text": "b b"})[1]["answers"]
    assert found["probabilities"] == pytest.approx(Classifier(student)(["b b"])[0]["probabilities"])
    assert set(found) == {"label", "probabilities"}


def test_pairs_and_scores(tmp_path, tokenizer):  # noqa: F811
    pairs = save_student(tmp_path / "pairs", tokenizer, NAMES, text_columns=["premise", "hypothesis"])
    with served(Classifier(pairs)) as port:
        assert labels(ask(port, body={"text": "a", "text_pair": "c c"})) == ["sea"]
        assert labels(ask(port, body={"texts": [["a", "b b"], ["c", "c"]]})) == ["bee", "sea"]
        assert ask(port, body={"texts": ["a"]}) == (422, {"detail": "this student takes pairs of texts"})
        assert ask(port, "/health")[1]["texts_of_an_input"] == 2
    with served(Classifier(save_student(tmp_path / "score", tokenizer, ["LABEL_0"]))) as port:
        assert ask(port, body={"text": "h h"}) == (200, {"answers": [{"score": pytest.approx(4)}]})


REFUSED = {
    "pairs": ({"text": "a", "text_pair": "b"}, 422, "give texts, not pairs"),
    "nothing": ({}, 422, "Value error, give text or texts"),
    "both": ({"text": "a", "texts": ["b"]}, 422, "Value error, give text or texts"),
    "half a pair": ({"texts": ["a"], "text_pair": "b"}, 422, "Value error, text_pair goes with text"),
    "another name": ({"inputs": "a"}, 422, "inputs: Extra inputs are not permitted"),
    "no text": ({"text": 5}, 422, "text: Input should be a valid string"),
    "no JSON": (b'{"text": ', 422, "9: JSON decode error"),
    "half a letter": (b'{"text": "\\ud800"}', 422, "surrogates not allowed"),
    "no UTF-8": (b'{"text": "\xff"}', 400, "There was an error parsing the body"),
    "deep": (b"[" * 1900, (400, 422), ""),  # where the parser gives up depends on what called it
    "too many texts": ({"texts": [1] * 21}, 422, "texts: Value error, more than 20 texts"),
    "many faults": ({"texts": [1] * 20}, 422, "texts.0.str: Input should be a valid string; texts.0."),
    "too many bytes": ({"text": "a" * 2000}, 413, "more than 2000 bytes"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, port):
    body, status, detail = REFUSED[case]
    found = ask(port, body=body)
    assert found[0] in np.atleast_1d(status) and detail in found[1]["detail"] and len(found[1]["detail"]) < 500
    assert labels(ask(port, body={"text": "c"})) == ["sea"]


def test_another_type_of_content(port):
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    assert ask(port, body={"text": "a"}, **form) == (415, {"detail": "give Content-Type: application/json"})


def test_a_large_body_that_does_not_say_so(port):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    chunks = iter([b'{"text": "'] + [b"a" * 500] * 5 + [b'"}'])
    connection.request("POST", "/classify", chunks, {"Content-Type": "application/json"}, encode_chunked=True)
    assert connection.getresponse().status == 413


def test_health_metrics_and_openapi(student):
    with served(Classifier(student)) as port:
        health = {"status": "ok", "file": "model.onnx", "outputs": NAMES, "texts_of_an_input": 1}
        assert ask(port, "/health") == (200, health)
        ask(port, body={"texts": ["a", "b"]})
        ask(port, body={"text": 5})
        lines = ask(port, "/metrics")[1].splitlines()
        for line in (
            'classify_requests_total{status="200"} 1.0',
            'classify_requests_total{status="422"} 1.0',
            "classify_texts_total 2.0",
            "classify_batch_texts_sum 2.0",
            "classify_seconds_count 2.0",
            "classify_waiting_texts 0.0",
        ):
            assert line in lines
        described = ask(port, "/openapi.json")[1]
        assert set(described["paths"]) == {"/classify", "/health", "/metrics"}
        assert ask(port, "/docs")[0] == 200 and ask(port, "/other")[0] == 404


def test_answers_are_sent_at_once(student):
    """Not when the client's machine has acknowledged the first half of them, 40 ms later."""
    with served(Classifier(student), max_wait=0) as port:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        seconds = []
        for _ in range(15):
            begin = time.perf_counter()
            connection.request("POST", "/classify", '{"text": "a"}', {"Content-Type": "application/json"})
            connection.getresponse().read()
            seconds.append(time.perf_counter() - begin)
        assert min(seconds[3:]) < 0.03  # the first ones are acknowledged at once


class Slow:
    """A classifier that waits until it is `let` go on, and remembers its batches."""

    names, text_columns, file = NAMES, [], "model.onnx"

    def __init__(self):
        self.let, self.batches = threading.Event(), []

    def logits(self, texts, batch_size):
        self.batches.append([text for (text,) in texts])
        assert self.let.wait(60)
        if "bad" in self.batches[-1]:
            raise RuntimeError("oh")
        return np.eye(3)[[len(text) % 3 for (text,) in texts]]

    def answer(self, logits):
        return {"label": NAMES[int(logits.argmax())]}


def in_thread(results, key, *args, **keywords):
    thread = threading.Thread(target=lambda: results.__setitem__(key, ask(*args, **keywords)))
    thread.start()
    return thread


def wait_until(true):
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_requests_share_batches_and_a_full_queue_says_so():
    slow, found = Slow(), {}
    with served(slow, max_batch=4, max_wait=0, max_queue=5) as port:
        threads = [in_thread(found, 0, port, body={"text": "x"})]
        wait_until(lambda: slow.batches == [["x"]])
        threads += [in_thread(found, k, port, body={"text": "x" * (k + 1)}) for k in range(1, 6)]
        wait_until(lambda: "classify_waiting_texts 5.0" in ask(port, "/metrics")[1])
        assert ask(port, body={"text": "y"}) == (429, {"detail": "too many texts wait"})
        slow.let.set()
        for thread in threads:
            thread.join()
        assert [len(batch) for batch in slow.batches] == [1, 4, 1]
        assert [labels(found[k]) for k in range(6)] == [[NAMES[(k + 1) % 3]] for k in range(6)]


def test_a_batch_that_fails_is_an_error_of_its_own_requests():
    slow = Slow()
    slow.let.set()
    with served(slow) as port:
        assert ask(port, body={"text": "bad"})[0] == 500
        assert labels(ask(port, body={"text": "xx"})) == ["sea"]
        assert 'classify_requests_total{status="500"} 1.0' in ask(port, "/metrics")[1]


def test_what_has_been_taken_in_is_answered_at_the_stop():
    slow, found = Slow(), {}
    with served(slow, max_batch=2, max_wait=0.2) as port:
        threads = [in_thread(found, k, port, body={"text": "x"}) for k in range(5)]
        wait_until(lambda: "classify_waiting_texts 3.0" in ask(port, "/metrics")[1])
        threading.Timer(0.2, slow.let.set).start()  # while it stops
    for thread in threads:
        thread.join()
    assert [labels(answer) for answer in found.values()] == [["bee"]] * 5


def batches_of(texts, **limits):
    """The batches in which texts are classified that come one by one while nothing else is done."""

    async def play():
        batches = []

        def classify(pairs):
            batches.append([text for (text,) in pairs])
            return np.zeros((len(pairs), 1))

        batcher = Batcher(classify, **({"max_batch": 3, "max_wait": 0.05, "max_queue": 99} | limits))
        running = asyncio.create_task(batcher.run())
        await asyncio.gather(*(batcher.logits([(text,)]) for text in texts))
        batcher.close()
        await running
        return batches

    return asyncio.run(play())


def test_a_batch_is_closed_when_it_is_full_or_has_waited():
    begin = time.monotonic()
    assert batches_of("abcdef", max_wait=60) == [list("abc"), list("def")]
    assert time.monotonic() - begin < 30
    begin = time.monotonic()
    assert batches_of("abcd", max_wait=0.2) == [list("abc"), ["d"]]
    assert time.monotonic() - begin >= 0.2
    with pytest.raises(QueueFull):
        batches_of("abcd", max_queue=3)


def test_a_text_that_comes_a_moment_later_is_seen():
    async def play():
        batcher = Batcher(lambda pairs: np.zeros((len(pairs), 1)), 2, 60, 9)
        running = asyncio.create_task(batcher.run())
        first = asyncio.create_task(batcher.logits([("a",)]))
        for _ in range(4):  # at whatever moment of the other's wait
            await asyncio.sleep(0)
        await asyncio.wait_for(asyncio.gather(first, batcher.logits([("b",)])), 30)
        batcher.close()
        await running

    asyncio.run(play())


def test_texts_of_similar_length_share_a_batch():
    texts = ["a", "b" * 9, "c", "d" * 8, "e" * 9, "f" * 2]
    assert batches_of(texts) == [["a", "c", "f" * 2], ["b" * 9, "e" * 9, "d" * 8]]


def test_who_does_not_wait_is_not_classified():
    async def play():
        classified = []
        batcher = Batcher(lambda pairs: classified.extend(pairs) or np.zeros((len(pairs), 1)), 2, 0.02, 9)
        patient, gone = (asyncio.create_task(batcher.logits([(text,)])) for text in ("patient", "gone"))
        await asyncio.sleep(0)
        gone.cancel()
        running = asyncio.create_task(batcher.run())
        await patient
        batcher.close()
        await running
        return classified

    assert asyncio.run(play()) == [("patient",)]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_bare_environment_and_a_stop_in_order(number, student, tmp_path):
    """With copies of the folder's light files, and of packages only what requirements-serve.txt names."""
    lines = (ROOT / "requirements-serve.txt").read_text().splitlines()
    packages = {re.match(r"[\w-]+", line)[0] for line in lines if not line.startswith("#")}
    environment = bare_environment(tmp_path / "site", *packages)
    (tmp_path / "deploy").mkdir()
    for name in ("__init__", "classify", "batcher", "server", "serve"):
        shutil.copy(ROOT / f"deploy/{name}.py", tmp_path / "deploy")
    command = [sys.executable, "-S", "deploy/serve.py", "--model", student, "--port", "0"]
    process = subprocess.Popen(
        list(map(str, command)),
        env=environment,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    line = process.stdout.readline()
    assert "model.onnx, is served on http://127.0.0.1:" in line, process.stderr.read()
    port = int(line.rsplit(":", 1)[1].removesuffix("/docs\n"))
    assert labels(ask(port, body={"text": "b b"})) == ["bee"]
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "", "stopped; requests answered: 1 with 200\n")


BAD = {
    "no threads": (["--threads", "0"], "--threads 0: give 1 or more"),
    "no wait": (["--max_wait_ms", "-1"], "--max_wait_ms -1: give 0 or more"),
    "not a wait": (["--max_wait_ms", "nan"], "--max_wait_ms nan: give 0 or more"),
    "forever": (["--max_wait_ms", "inf"], "--max_wait_ms inf: give 0 or more"),
    "no port": (["--port", "70000"], "--port 70000: there is none"),
    "never": (["--max_queue", "10"], "--max_texts 256: so many could never wait, with --max_queue 10"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options(case, student, capsys):
    words, said = BAD[case]
    with pytest.raises(SystemExit) as exit_info:
        read_options(["--model", str(student), *words])
    assert exit_info.value.code == 2 and capsys.readouterr().err.endswith(f"error: {said}\n")


def test_bad_starts(student, tmp_path, exits_with_2):
    from deploy.serve import main

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = exits_with_2(main, "--model", student, "--port", port)
        assert f"--host 127.0.0.1 --port {port}: Address already in use" in line
    assert "give the folder that deploy/export_student.py has written" in exits_with_2(main, "--model", tmp_path)
