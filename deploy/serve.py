"""Serve an exported student over HTTP: texts of requests that come at the same time are classified together.

    pip install -r requirements-serve.txt
    python deploy/serve.py --model model/SST-2/student/onnx
    curl http://127.0.0.1:8000/classify --json '{"text": "a gripping film"}'

POST /classify takes a `text`, with its `text_pair` where the student learnt from pairs, or many `texts`, each of which
may be a pair. GET /health says what is served, GET /metrics how it goes (Prometheus); /docs is the OpenAPI page. Past
--max_queue the answer is 429, of a request that is too large 413. SIGTERM and Ctrl-C stop the server once it has
answered what it has taken in, within 30 seconds. It needs neither torch nor transformers, and of the project only the
folder deploy/.
"""

import argparse
import math
import signal
import socket
import sys
from pathlib import Path

# Seconds that a stop waits for requests which are not wholly there yet, or wait for their answer.
_PATIENCE = 30


def main(argv: list[str] | None = None) -> None:
    options = read_options(argv)
    if not __package__:  # run as a file, perhaps where the project is not installed
        sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    try:
        import uvicorn

        from deploy.classify import Classifier, WrongInput
        from deploy.server import Limits, make_app
    except ImportError as error:
        fail(f"needs {error.name}: pip install -r requirements-serve.txt")
    try:
        classifier = Classifier(options.model, options.file, options.threads)
        listening = listen(options.host, options.port)
    except WrongInput as error:
        fail(str(error))
    except OSError as error:
        fail(f"--host {options.host} --port {options.port}: {error.strerror}")
    limits = Limits(
        options.max_batch, options.max_wait_ms / 1000, options.max_queue, options.max_texts, options.max_bytes
    )
    app = make_app(classifier, limits)
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=_PATIENCE)
    server = uvicorn.Server(config)
    # The server raises a signal again when it has stopped for it; then there is nothing more to do.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: setattr(server, "should_exit", True))
    host, port = listening.getsockname()[:2]
    address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    print(f"{options.model}, {classifier.file}, is served on {address}; its API is on {address}/docs", flush=True)
    server.run(sockets=[listening])


def listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections. Raises OSError."""
    # Only of a socket that says it is TCP does asyncio send answers at once, and not 40 ms later.
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, proto=socket.IPPROTO_TCP)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(2048)
    except OSError:
        listening.close()
        raise
    return listening


def fail(said: str) -> None:
    """End with a line and exit code 2."""
    print(f"serve.py: error: {said}", file=sys.stderr)
    sys.exit(2)


def read_options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="the folder of an exported student")
    parser.add_argument("--file", help="which of its models (default: model_quantized.onnx, where it is there)")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 is for other machines too (127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="0 is for one that is free (8000)")
    parser.add_argument("--threads", type=int, help="of a batch (default: one for each core)")
    parser.add_argument("--max_batch", type=int, default=8, help="texts that are classified at once (8)")
    parser.add_argument("--max_wait_ms", type=float, default=0, help="that a text waits for others (0)")
    parser.add_argument("--max_queue", type=int, default=1024, help="texts that wait; past them comes 429 (1024)")
    parser.add_argument("--max_texts", type=int, default=256, help="of a request (256)")
    parser.add_argument("--max_bytes", type=int, default=1_000_000, help="of a request (1000000)")
    options = parser.parse_args(argv)
    for name in ("threads", "max_batch", "max_queue", "max_texts", "max_bytes"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name} {value}: give 1 or more")
    if not 0 <= options.max_wait_ms < math.inf:
        parser.error(f"--max_wait_ms {options.max_wait_ms:g}: give 0 or more")
    if not 0 <= options.port < 2**16:
        parser.error(f"--port {options.port}: there is none")
    if options.max_texts > options.max_queue:
        parser.error(f"--max_texts {options.max_texts}: so many could never wait, with --max_queue {options.max_queue}")
    return options


if __name__ == "__main__":
    main()
