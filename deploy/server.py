"""The application behind deploy/serve.py: what it takes and gives, its limits, its metrics."""

import asyncio
import contextlib
import itertools
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel, ConfigDict, field_validator, model_validator
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deploy.batcher import Batcher, QueueFull
from deploy.classify import Classifier

# So many of a request's faults are told.
_LISTED = 5


@dataclass(frozen=True)
class Limits:
    """Texts of a batch, and seconds that one waits for others; texts that wait; texts and bytes of a request."""

    max_batch: int
    max_wait: float
    max_queue: int
    max_texts: int
    max_bytes: int


def question_of(max_texts: int) -> type[BaseModel]:
    """What a request to classify says, with `max_texts` texts at most."""

    class Question(BaseModel):
        """A `text`, with its `text_pair` where the student learnt from pairs; or many `texts`, each of which may be a
        pair."""

        model_config = ConfigDict(
            extra="forbid",
            json_schema_extra={"examples": [{"text": "a gripping film"}, {"texts": ["one", "another"]}]},
        )
        text: str | None = None
        text_pair: str | None = None
        texts: list[str | tuple[str, str]] | None = None

        @field_validator("texts", mode="before")
        @classmethod
        def few(cls, texts):
            # Before a look at each of them, which may be a million.
            if isinstance(texts, list) and len(texts) > max_texts:
                raise ValueError(f"more than {max_texts} texts")
            return texts

        @model_validator(mode="after")
        def one_or_many(self) -> "Question":
            if (self.text is None) == (self.texts is None):
                raise ValueError("give text or texts")
            if self.text is None and self.text_pair is not None:
                raise ValueError("text_pair goes with text")
            for text in itertools.chain(*self.pairs()):
                text.encode()  # JSON has halves of letters, which are a ValueError here and not in a batch with others
            return self

        def pairs(self) -> list[tuple[str, ...]]:
            """All texts, as a classifier takes them."""
            if self.texts is not None:
                return [(text,) if isinstance(text, str) else text for text in self.texts]
            return [(self.text,) if self.text_pair is None else (self.text, self.text_pair)]

    return Question


class Answer(BaseModel):
    """Of a text: `label` and `probabilities`, or of a regression a `score`; `labels` where a text may have several."""

    label: str | None = None
    labels: list[str] | None = None
    probabilities: dict[str, float] | None = None
    score: float | None = None


class Answers(BaseModel):
    """One for each text, in their order."""

    answers: list[Answer]


class Metrics:
    """What a server counts."""

    def __init__(self):
        self.registry = CollectorRegistry()
        known = {"registry": self.registry}
        self.requests = Counter(
            "classify_requests", "Requests to classify, by the answer's status", ["status"], **known
        )
        self.texts = Counter("classify_texts", "Texts that were classified", **known)
        self.seconds = Histogram("classify_seconds", "From a request to its answer", **known)
        self.sizes = Histogram("classify_batch_texts", "Texts of a batch", buckets=[2**k for k in range(11)], **known)
        self.waiting = Gauge("classify_waiting_texts", "Texts that wait for a batch", **known)

    def in_words(self) -> str:
        """How many requests were answered with which status."""
        (family,) = self.requests.collect()
        found = [(s.labels["status"], s.value) for s in family.samples if s.name.endswith("_total")]
        return ", ".join(f"{value:.0f} with {status}" for status, value in sorted(found)) or "none"


class Gate:
    """Around an application: refuses a request to classify that is too large, and counts how each was answered."""

    def __init__(self, app: ASGIApp, max_bytes: int, metrics: Metrics):
        self.app, self.max_bytes, self.metrics = app, max_bytes, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != "/classify":
            await self.app(scope, receive, send)
            return
        begin, seen = time.perf_counter(), 0

        async def limited() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self.max_bytes:
                raise HTTPException(413, f"more than {self.max_bytes} bytes")
            return message

        async def counted(message: Message) -> None:
            await send(message)
            if message["type"] == "http.response.start":
                self.metrics.requests.labels(message["status"]).inc()
                self.metrics.seconds.observe(time.perf_counter() - begin)

        # Others would be read as something else than JSON, and not be understood.
        kind = dict(scope["headers"]).get(b"content-type", b"application/json")
        app = self.app if b"json" in kind else JSONResponse({"detail": "give Content-Type: application/json"}, 415)
        try:
            await app(scope, limited, counted)
        except Exception:
            self.metrics.requests.labels(500).inc()
            raise


def make_app(classifier: Classifier, limits: Limits) -> FastAPI:
    """The application: POST /classify, GET /health, GET /metrics, and the OpenAPI page on /docs."""
    metrics, Question = Metrics(), question_of(limits.max_texts)
    batcher = Batcher(
        lambda texts: classifier.logits(texts, limits.max_batch),
        limits.max_batch,
        limits.max_wait,
        limits.max_queue,
        metrics.sizes.observe,
    )
    metrics.waiting.set_function(lambda: len(batcher))
    width = len(classifier.text_columns) or 1

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.running = asyncio.create_task(batcher.run())
        yield
        # The server comes here when all requests are answered.
        batcher.close()
        await app.state.running
        print(f"stopped; requests answered: {metrics.in_words()}", file=sys.stderr)

    app = FastAPI(title="Text classification", summary=f"Outputs: {', '.join(classifier.names)}", lifespan=lifespan)
    app.add_middleware(Gate, max_bytes=limits.max_bytes, metrics=metrics)

    @app.exception_handler(RequestValidationError)
    async def wrong(_: Request, error: RequestValidationError) -> JSONResponse:
        # Without the input, which may be long, or hold what JSON cannot.
        said = [
            f"{'.'.join(map(str, found['loc'][1:]))}: {found['msg']}".lstrip(": ") for found in error.errors()[:_LISTED]
        ]
        return JSONResponse({"detail": "; ".join(dict.fromkeys(said))}, 422)

    @app.post("/classify", response_model_exclude_none=True)
    async def classify(question: Question) -> Answers:
        """Labels and probabilities, or scores, of texts."""
        texts = question.pairs()
        if app.state.running.done():
            raise HTTPException(503, "no batches are classified any more")
        if any(len(pair) != width for pair in texts):
            raise HTTPException(422, "this student takes pairs of texts" if width == 2 else "give texts, not pairs")
        try:
            logits = await batcher.logits(texts)
        except QueueFull:
            raise HTTPException(429, "too many texts wait", {"Retry-After": "1"}) from None
        metrics.texts.inc(len(texts))
        return Answers(answers=[Answer(**classifier.answer(found)) for found in logits])

    @app.get("/health")
    async def health() -> dict:
        """What is served."""
        if app.state.running.done():
            raise HTTPException(503, "no batches are classified any more")
        return {"status": "ok", "file": classifier.file, "outputs": classifier.names, "texts_of_an_input": width}

    @app.get("/metrics")
    async def prometheus() -> Response:
        """How it goes, in Prometheus' format."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return app
