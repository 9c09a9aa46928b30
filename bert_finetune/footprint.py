"""What a model costs to keep and to run: parameters, bytes of weights, milliseconds a sentence."""

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel


@dataclass(frozen=True)
class Footprint:
    """`parameters` and `megabytes` (10⁶ bytes of weights), `milliseconds` a sentence (None: not timed), and the same of
    its export with int8 weights (None: there is none)."""

    parameters: int
    megabytes: float
    milliseconds: float | None
    int8_milliseconds: float | None = None


def processor_name() -> str:
    """What the machine calls its processor."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def measure_models(models: list[PreTrainedModel], inputs: dict[str, torch.Tensor]) -> list[Footprint]:
    """The footprint of each model in evaluation mode, timed on one batch of `inputs` on the models' device."""
    training = [model.training for model in models]
    for model in models:
        model.eval()
    try:
        works = [classifying(model, inputs) for model in models]
        each = milliseconds_each(works, len(inputs["input_ids"]), most=3)
    finally:
        for model, mode in zip(models, training, strict=True):
            model.train(mode)
    return [footprint(model, milliseconds) for model, milliseconds in zip(models, each, strict=True)]


def footprint(model: PreTrainedModel, milliseconds: float) -> Footprint:
    """Of a model that takes so long for a sentence."""
    parameters = list(model.parameters())
    return Footprint(
        parameters=sum(parameter.numel() for parameter in parameters),
        megabytes=sum(parameter.numel() * parameter.element_size() for parameter in parameters) / 1e6,
        milliseconds=milliseconds,
    )


def classifying(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> Callable[[], object]:
    """What runs a model on a batch, to be timed."""

    @torch.inference_mode()
    def work() -> None:
        model(**inputs).logits.cpu()  # the copy waits for the GPU

    return work


def classifying_texts(
    folder: str | Path, texts: list[str], batch_size: int = 32
) -> tuple[PreTrainedModel, Callable[[], object]]:
    """The model in a folder, and what runs it on all `texts` in batches, tokenisation included; on the GPU where there
    is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval().to(device)

    def work() -> None:
        for k in range(0, len(texts), batch_size):
            inputs = tokenizer(texts[k : k + batch_size], padding=True, truncation=True, return_tensors="pt")
            classifying(model, inputs.to(device))()

    return model, work


def milliseconds_each(works: list[Callable[[], object]], sentences: int, **bounds) -> list[float]:
    """Median milliseconds a sentence of each of `works`, which do so many; in turns, within `bounds`."""
    return [1000 * statistics.median(seconds) / sentences for seconds in time_in_turns(works, **bounds)]


def time_in_turns(works: list[Callable[[], object]], most: int = 50, seconds: float = 6.0) -> list[list[float]]:
    """Seconds that each of `works` takes, once for each round.

    In a round all take turns, so that what else the machine does hits all of them alike; each is timed the second time,
    its threads awake and its weights in the cache, as in a server that runs nothing else. After a warm-up come as many
    rounds as fit into `seconds`, 5 or more, `most` at most.
    """
    once = sum(map(_seconds, works))  # slower than the rest
    once = min(once, sum(map(_seconds, works)))
    rounds = min(most, max(5, int(seconds / (2 * once))))
    return list(map(list, zip(*([_seconds(work) for work in works] for _ in range(rounds)), strict=True)))


def _seconds(work: Callable[[], object]) -> float:
    work()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
