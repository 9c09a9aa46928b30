"""An HTTP server on the loopback for as long as a block runs."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class QuietHandler(BaseHTTPRequestHandler):
    """A request handler that prints nothing."""

    def log_message(self, *args):
        pass


class Loopback:
    """A context manager that serves what `handler()`, a class, answers; `url` is its address."""

    def handler(self) -> type[QuietHandler]:
        raise NotImplementedError

    def __enter__(self):
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), self.handler())
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        return self

    def __exit__(self, *exception):
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()
