"""What a model costs to keep and to run: parameters, bytes on disk, milliseconds a sentence."""

import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer


@dataclass(frozen=True)
class Footprint:
    """`parameters` and `megabytes` (10⁶ bytes of weights on disk), `milliseconds` a sentence."""

    parameters: int
    megabytes: float
    milliseconds: float


def measure_footprints(
    folders: list[str | Path], sentences: list[str], batch_size: int = 32, repeats: int = 5
) -> list[Footprint]:
    """The footprint of each model folder, timed on `sentences` in batches, tokenisation included.

    The models take turns, `repeats` times after one pass that is not timed, and the median counts: what else the
    machine does then hits all of them alike. Runs on the GPU where there is one.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in folders]
    models = [AutoModelForSequenceClassification.from_pretrained(folder).eval().to(device) for folder in folders]

    @torch.inference_mode()
    def seconds(model, tokenizer) -> float:
        start = time.perf_counter()
        for k in range(0, len(sentences), batch_size):
            inputs = tokenizer(sentences[k : k + batch_size], padding=True, truncation=True, return_tensors="pt")
            model(**inputs.to(device)).logits.cpu()  # the copy waits for the GPU
        return time.perf_counter() - start

    passes = [
        [seconds(model, tokenizer) for model, tokenizer in zip(models, tokenizers, strict=True)]
        for _ in range(repeats + 1)
    ][1:]
    return [
        Footprint(
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            megabytes=sum(file.stat().st_size for file in Path(folder).glob("*.safetensors")) / 1e6,
            milliseconds=1000 * statistics.median(times) / len(sentences),
        )
        for folder, model, times in zip(folders, models, zip(*passes, strict=True), strict=True)
    ]
