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
    """`parameters` and `megabytes` (10⁶ bytes of weights), `milliseconds` a sentence (None: not timed)."""

    parameters: int
    megabytes: float
    milliseconds: float | None


def processor_name() -> str:
    """What the machine calls its processor."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def measure_folders(folders: list[str | Path], sentences: list[str], batch_size: int = 32) -> list[Footprint]:
    """The footprint of each model folder, timed on `sentences` in batches, tokenisation included.

    Runs on the GPU where there is one.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in folders]
    models = [AutoModelForSequenceClassification.from_pretrained(folder).eval().to(device) for folder in folders]

    def classify(model, tokenizer) -> None:
        for k in range(0, len(sentences), batch_size):
            inputs = tokenizer(sentences[k : k + batch_size], padding=True, truncation=True, return_tensors="pt")
            model(**inputs.to(device)).logits.cpu()  # the copy waits for the GPU

    works = [lambda m=m, t=t: classify(m, t) for m, t in zip(models, tokenizers, strict=True)]
    return _footprints(models, works, len(sentences), repeats=5)


def measure_models(models: list[PreTrainedModel], inputs: dict[str, torch.Tensor]) -> list[Footprint]:
    """The footprint of each model in evaluation mode, timed on one batch of `inputs` on the models' device."""
    works = [lambda m=m: m(**inputs).logits.cpu() for m in models]
    training = [model.training for model in models]
    for model in models:
        model.eval()
    try:
        return _footprints(models, works, len(inputs["input_ids"]), repeats=3)
    finally:
        for model, mode in zip(models, training, strict=True):
            model.train(mode)


@torch.inference_mode()
def _footprints(
    models: list[PreTrainedModel], works: list[Callable[[], object]], sentences: int, repeats: int
) -> list[Footprint]:
    # The models take turns and the median counts: what else the machine does then hits all of them alike.
    seconds = [[_seconds(work) for work in works] for _ in range(1 + repeats)][1:]
    return [
        Footprint(
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            megabytes=sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()) / 1e6,
            milliseconds=1000 * statistics.median(times) / sentences,
        )
        for model, times in zip(models, zip(*seconds, strict=True), strict=True)
    ]


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
