"""What batching gives a server of deploy/serve.py under load, and whether a stop loses anything.

    python benchmarks/load.py --model model/quickstart/student-EMD/onnx --texts lines.txt

Clients on the loopback ask one text at a time, each as soon as it has its last answer, for a bounded number of
requests: in turns a server that classifies each text alone, and one that gathers batches. Then the second is stopped in
the middle of all this, and the answers that it says it gave are counted against those that came. Server and clients
share the machine. Writes load.json and load.md into --output_dir.
"""

import argparse
import asyncio
import itertools
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from bert_finetune.errors import ArgumentParser, InputError, reading, reports_input_errors
from bert_finetune.files import write_atomically, write_json
from bert_finetune.footprint import processor_name

ROOT = Path(__file__).resolve().parent.parent
SERVERS = {"one at a time": ["--max_batch", "1"], "batches": []}


@dataclass
class Server:
    """A server's process."""

    process: subprocess.Popen
    port: int

    @classmethod
    def start(cls, model: Path, options: list[str]) -> "Server":
        command = [sys.executable, str(ROOT / "deploy/serve.py"), "--model", str(model), "--port", "0", *options]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        port = re.search(r":(\d+)/docs$", process.stdout.readline().strip())
        if port is None:
            raise InputError(process.communicate()[1].strip() or "the server has not started")
        return cls(process, int(port[1]))

    def stop(self) -> int:
        """Returns how many requests it says it has answered."""
        self.process.send_signal(signal.SIGTERM)
        said = self.process.communicate(timeout=60)[1]
        return sum(map(int, re.findall(r"(\d+) with \d+", said)))


@dataclass
class Load:
    """What clients saw: seconds from each request to its answer, and how many had none."""

    seconds: list[float] = field(default_factory=list)
    unanswered: int = 0
    wall: float = 0.0


def put_load(port: int, texts: list[str], clients: int, requests: int | None) -> Load:
    """So many clients, each with a connection that it keeps; `requests` of them all, or None: until the server ends."""
    return asyncio.run(_put_load(port, texts, clients, requests))


async def _put_load(port: int, texts: list[str], clients: int, requests: int | None) -> Load:
    # By hand, since a library's client takes more of the two's processor time than the server does.
    bodies = [json.dumps({"text": text}).encode() for text in texts]
    head = "POST /classify HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n"
    questions = itertools.cycle([head.format(len(body)).encode() + body for body in bodies])
    left = iter(range(requests)) if requests else itertools.count()
    load = Load()

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            while next(left, None) is not None:
                begin = time.perf_counter()
                writer.write(next(questions))
                answer = await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(int(re.search(rb"(?i)content-length: (\d+)", answer)[1]))
                if b" 200 " not in answer.split(b"\r\n", 1)[0]:
                    raise InputError(f"the server says {answer.decode()}")
                load.seconds.append(time.perf_counter() - begin)
        except (OSError, asyncio.IncompleteReadError):
            load.unanswered += 1
        finally:
            writer.close()

    begin = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    load.wall = time.perf_counter() - begin
    return load


def measure(model: Path, texts: list[str], clients: int, requests: int, rounds: int) -> dict:
    """Both servers in turns, and a stop of the second."""
    servers: dict[str, Server] = {}
    loads: dict[str, list[Load]] = {name: [] for name in SERVERS}
    answered = 0  # by the second
    try:
        for name, options in SERVERS.items():
            servers[name] = Server.start(model, options)
        for number in range(rounds + 1):  # the first is a warm-up
            for name, server in servers.items():
                load = put_load(server.port, texts, clients, requests)
                if load.unanswered:
                    raise InputError(f"{name}: {load.unanswered} connections were lost")
                answered += len(load.seconds) if name == "batches" else 0
                if number:
                    loads[name].append(load)
        found = {name: summary(of_it) for name, of_it in loads.items()}
        last = servers["batches"]
        said: list[int] = []
        stopping = threading.Timer(1.0, lambda: said.append(last.stop()))
        stopping.start()
        load = put_load(last.port, texts, clients, None)
        stopping.join()
        answered += len(load.seconds)
    finally:
        for server in servers.values():
            server.process.kill()
    if not said:
        raise InputError("the server has not stopped within a minute")
    stop = {"answers_sent": said[0], "answers_received": answered, "unanswered": load.unanswered}
    return {"servers": found, "stop": stop | {"lost": said[0] - answered}}


def summary(loads: list[Load]) -> dict[str, float]:
    """Of several rounds: the median of requests a second, and milliseconds of all requests."""
    milliseconds = sorted(1000 * seconds for load in loads for seconds in load.seconds)
    return {
        "requests_a_second": statistics.median(len(load.seconds) / load.wall for load in loads),
        "median_ms": statistics.median(milliseconds),
        "p99_ms": milliseconds[int(0.99 * (len(milliseconds) - 1))],
    }


def as_markdown(found: dict) -> str:
    rows = ["| server | requests a second | median ms | 99 % ms |", "|---|---|---|---|"]
    for name, row in found["servers"].items():
        rows.append(f"| {name} | {row['requests_a_second']:.0f} | {row['median_ms']:.1f} | {row['p99_ms']:.1f} |")
    stop = found["stop"]
    rows += [
        "",
        f"{found['clients']} clients, {found['rounds']} rounds of {found['requests']} requests of one text each, after "
        f"a warm-up; {found['model']}; {os.cpu_count()} cores of {found['processor']}, which clients and server share. "
        f"Stopped under load: {stop['answers_sent']} answers sent and {stop['answers_received']} received, "
        f"{stop['lost']} lost; {stop['unanswered']} connections ended without one more.",
    ]
    return "\n".join(rows) + "\n"


@reports_input_errors
def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="the folder of an exported student")
    parser.add_argument("--texts", type=Path, required=True, help="a text a line")
    parser.add_argument("--clients", type=int, default=32, help="at the same time (32)")
    parser.add_argument("--requests", type=int, default=3000, help="of a round (3000)")
    parser.add_argument("--rounds", type=int, default=3, help="of each server (3)")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "benchmarks", help="(benchmarks)")
    options = parser.parse_args(argv)
    with reading(str(options.texts)):
        texts = list(filter(None, options.texts.read_text(encoding="utf-8").splitlines()))
    if min(options.clients, options.requests, options.rounds, len(texts)) < 1:
        raise InputError("--clients, --requests, --rounds and the lines of --texts: must be 1 or more")
    found = {
        "model": f"{options.model.parent.name}/{options.model.name}",
        "processor": processor_name(),
        **{name: getattr(options, name) for name in ("clients", "requests", "rounds")},
        **measure(options.model, texts, options.clients, options.requests, options.rounds),
    }
    options.output_dir.mkdir(parents=True, exist_ok=True)
    write_json(options.output_dir / "load.json", found)
    write_atomically(options.output_dir / "load.md", as_markdown(found))
    print(as_markdown(found))
    if found["stop"]["lost"]:
        raise InputError(f"{found['stop']['lost']} answers were lost")


if __name__ == "__main__":
    main()
