"""What models cost to keep and to run, side by side: in PyTorch, and exported where an export lies beside them.

    python deploy/measure.py model/SST-2/teacher model/SST-2/student

The first model is what the others are compared with. Parameters, embeddings apart; floating point operations of a
sentence; bytes on disk; seconds to load and the most memory, each in a process of its own; latency at several batches
and lengths, median and 95th percentile. The models take turns after a warm-up, so that what else the machine does hits
all of them alike. Prints and writes costs.md, costs.csv, costs.json and a picture.
"""

import argparse
import importlib.util
import itertools
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bert_finetune.errors import ArgumentParser, InputError, reading, reports_input_errors
from bert_finetune.files import as_csv, write_atomically, write_json
from deploy.classify import ENGINES, FLOAT, INT8, OPENVINO, batch_of, files_of

# In a process of its own: how long loading takes, and the most memory up to the end of one batch. Prints both.
_LOAD_TORCH = """
import sys, time
import torch
from transformers import AutoModelForSequenceClassification

begin = time.perf_counter()
dtype = getattr(torch, sys.argv[4])
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1], dtype=dtype).eval()
seconds = time.perf_counter() - begin
ids = torch.ones(int(sys.argv[2]), int(sys.argv[3]), dtype=torch.long)
with torch.inference_mode():
    model(input_ids=ids, attention_mask=ids)
"""
_LOAD_GRAPH = """
import importlib, sys, time
from pathlib import Path
import numpy
from deploy.classify import ENGINES, batch_of

path = Path(sys.argv[1])
engine = ENGINES[path.suffix]
importlib.import_module(engine.package)
begin = time.perf_counter()
graph = engine.open(path)
seconds = time.perf_counter() - begin
ids = numpy.ones((int(sys.argv[2]), int(sys.argv[3])), numpy.int64)
graph(batch_of(graph, ids))
"""
# On Linux, getrusage would tell of the process that this one was started by, too.
_SAY = """
try:
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    kilobytes = int(status["VmHWM"].split()[0])
except OSError:
    import resource
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "darwin" else 1)
print(seconds, kilobytes)
"""


@dataclass(frozen=True)
class Form:
    """A form that a model is run in: where its file lies in the model's folder, what a process of its own does, and in
    PyTorch (else empty) the type of its weights."""

    name: str
    file: str
    program: str
    dtype: str = ""

    def is_there(self, folder: Path) -> bool:
        """Whether the model is there in this form, and what runs it is installed."""
        file = folder / self.file
        needed = ENGINES[file.suffix].package if file.suffix in ENGINES else "torch"
        return file.is_file() and importlib.util.find_spec(needed) is not None


FORMS = (
    Form("PyTorch float32", "model.safetensors", _LOAD_TORCH, "float32"),
    Form("PyTorch bfloat16", "model.safetensors", _LOAD_TORCH, "bfloat16"),
    Form("ONNX float32", f"onnx/{FLOAT}", _LOAD_GRAPH),
    Form("ONNX int8", f"onnx/{INT8}", _LOAD_GRAPH),
    Form("OpenVINO float32", f"openvino/{OPENVINO}", _LOAD_GRAPH),
)


@dataclass(frozen=True)
class Candidate:
    """A model in one of its forms."""

    model: str
    folder: Path
    form: Form

    @property
    def file(self) -> Path:
        return self.folder / self.form.file


@reports_input_errors
def main(argv: list[str] | None = None) -> None:
    options = read_options(argv)
    candidates = find_candidates(options.folders, max(options.lengths))

    import torch

    from bert_finetune.footprint import processor_name

    torch.set_num_threads(options.threads or torch.get_num_threads())
    shapes = list(itertools.product(options.batches, options.lengths))
    models = [describe(name, folder, options.lengths) for name, folder in _named(options.folders).items()]
    latencies = measure_latencies(candidates, shapes)
    costs = {
        "threads": torch.get_num_threads(),
        "processor": processor_name(),
        "models": models,
        "forms": [weigh(candidate, max(options.batches), max(options.lengths)) for candidate in candidates],
        "latencies": compared(latencies),
    }
    options.output_dir.mkdir(parents=True, exist_ok=True)
    text = as_markdown(costs)
    write_json(options.output_dir / "costs.json", costs)
    write_atomically(options.output_dir / "costs.md", text)
    write_atomically(options.output_dir / "costs.csv", as_csv(costs["latencies"], decimals=4))
    draw_latencies(costs["latencies"], options.output_dir / "costs")
    print(text)
    print(f"written into {options.output_dir}: costs.md, costs.csv, costs.json, costs.png, costs.svg")


def read_options(argv: list[str] | None) -> argparse.Namespace:
    """The command line. Raises InputError for numbers that make no sense."""
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="folders of models; the others are compared to the first")
    parser.add_argument("--batches", default="1,8,32", help="sentences at once (1,8,32)")
    parser.add_argument("--lengths", default="16,32,128", help="tokens of a sentence (16,32,128)")
    parser.add_argument("--threads", type=int, help="of each model (default: PyTorch's own choice)")
    parser.add_argument("--output_dir", type=Path, help="where all goes (default: costs, in the last folder)")
    options = parser.parse_args(argv)
    options.output_dir = options.output_dir or options.folders[-1] / "costs"
    for name in ("batches", "lengths"):
        try:
            numbers = [int(number) for number in getattr(options, name).split(",")]
        except ValueError:
            numbers = [0]
        if min(numbers) < 1:
            raise InputError(f"--{name} {getattr(options, name)}: give whole numbers from 1 on, with commas between")
        setattr(options, name, numbers)
    if options.threads is not None and options.threads < 1:
        raise InputError(f"--threads {options.threads}: give 1 or more")
    return options


def _named(folders: list[Path]) -> dict[str, Path]:
    """Each folder under its own name, or, where two have the same, its whole path."""
    names = [folder.resolve().name for folder in folders]
    return {
        name if names.count(name) == 1 else str(folder): folder for name, folder in zip(names, folders, strict=True)
    }


def find_candidates(folders: list[Path], longest: int) -> list[Candidate]:
    """All forms that the models are there in. Raises InputError for a folder that holds no model, and for one that
    takes no `longest` tokens."""
    import torch
    from transformers import AutoModelForSequenceClassification

    from bert_finetune.architectures import longest_input
    from bert_finetune.checkpoints import load_classifier_config

    found = []
    for name, folder in _named(folders).items():
        if not (folder / "config.json").is_file() or not (folder / FORMS[0].file).is_file():
            raise InputError(f"{folder}: holds no model (config.json, {FORMS[0].file})")
        with torch.device("meta"):  # a model without its weights
            empty = AutoModelForSequenceClassification.from_config(load_classifier_config(str(folder), "model"))
        positions = longest_input(empty)
        if longest > positions:
            raise InputError(f"--lengths {longest}: {folder} has only {positions} positions")
        found += [Candidate(name, folder, form) for form in FORMS if form.is_there(folder)]
    return found


def _load(folder: Path, dtype: str = "float32", **settings):
    import torch
    from transformers import AutoModelForSequenceClassification

    with reading(str(folder)):
        model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=getattr(torch, dtype), **settings)
    return model.eval()


def describe(name: str, folder: Path, lengths: list[int]) -> dict:
    """Layers, width, parameters, and the floating point operations of a sentence at each length: a multiplication and
    an addition are two."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    model = _load(folder, attn_implementation="eager")  # of which all multiplications are counted
    embeddings = sum(part.weight.numel() for part in model.modules() if isinstance(part, torch.nn.Embedding))
    flops = {}
    for length in lengths:
        ids = torch.ones(1, length, dtype=torch.long)
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            model(input_ids=ids, attention_mask=ids)
        flops[length] = counter.get_total_flops()
    return {
        "model": name,
        "layers": model.config.num_hidden_layers,
        "width": model.config.hidden_size,
        "parameters": model.num_parameters() - embeddings,
        "embeddings": embeddings,
        "flops": flops,
    }


def weigh(candidate: Candidate, batch: int, length: int) -> dict:
    """Megabytes on disk, seconds to load, and the most memory up to the end of a batch, in a process of its own."""
    in_torch = [candidate.form.dtype] if candidate.form.dtype else []
    arguments = [candidate.folder if in_torch else candidate.file, batch, length, *in_torch]
    command = [sys.executable, "-c", candidate.form.program + _SAY, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"{candidate.file}: cannot be run: {(done.stderr.strip().splitlines() or ['no output'])[-1]}")
    seconds, peak = map(float, done.stdout.split()[-2:])
    return {
        "model": candidate.model,
        "form": candidate.form.name,
        "megabytes": sum(path.stat().st_size for path in files_of(candidate.file)) / 1e6,
        "load_seconds": seconds,
        "peak_megabytes": peak * 1024 / 1e6,
    }


def _runner(candidate: Candidate) -> Callable[[int, int], Callable[[], object]]:
    """What makes a batch of so many sentences and tokens, to be run."""
    import torch

    if candidate.form.dtype:
        from bert_finetune.footprint import classifying

        model = _load(candidate.folder, candidate.form.dtype)

        def make(batch: int, length: int) -> Callable[[], object]:
            ids = torch.ones(batch, length, dtype=torch.long)
            return classifying(model, {"input_ids": ids, "attention_mask": ids})
    else:
        import numpy as np

        # Threads that wait by spinning take the cores from the other models, which have their turns in this process.
        graph = ENGINES[candidate.file.suffix].open(candidate.file, torch.get_num_threads(), spin=False)

        def make(batch: int, length: int) -> Callable[[], object]:
            inputs = batch_of(graph, np.ones((batch, length), np.int64))
            return lambda: graph(inputs)

    return make


def measure_latencies(candidates: list[Candidate], shapes: list[tuple[int, int]]) -> list[dict]:
    """Milliseconds of a batch, in turns: a row for each candidate and shape, with the number of `rounds`."""
    from bert_finetune.footprint import time_in_turns

    runners = [_runner(candidate) for candidate in candidates]
    rows = []
    for batch, length in shapes:
        times = time_in_turns([make(batch, length) for make in runners])
        for candidate, seconds in zip(candidates, times, strict=True):
            milliseconds = sorted(1000 * value for value in seconds)
            rows.append(
                {
                    "model": candidate.model,
                    "form": candidate.form.name,
                    "batch": batch,
                    "length": length,
                    "median_ms": statistics.median(milliseconds),
                    "p95_ms": milliseconds[min(len(milliseconds) - 1, int(0.95 * len(milliseconds)))],
                    "rounds": len(milliseconds),
                }
            )
    return rows


def compared(rows: list[dict]) -> list[dict]:
    """With sentences a second, and how many times as fast as the first model in PyTorch's float32."""
    first = {(row["batch"], row["length"]): row["median_ms"] for row in reversed(rows)}
    return [
        row
        | {
            "sentences_a_second": 1000 * row["batch"] / row["median_ms"],
            "speed_up": first[row["batch"], row["length"]] / row["median_ms"],
        }
        for row in rows
    ]


def as_markdown(costs: dict) -> str:
    """Three tables: models, their forms, latencies."""
    lengths = list(costs["models"][0]["flops"])
    batch, length = (max(row[name] for row in costs["latencies"]) for name in ("batch", "length"))
    speed_ups = {
        row["model"]: row["speed_up"]
        for row in costs["latencies"]
        if (row["form"], row["batch"], row["length"]) == (FORMS[0].name, batch, length)
    }
    header = ["model", "layers x width", "parameters", "embeddings", *(f"GFLOPs at {k} tokens" for k in lengths)]
    header.append(f"speed-up at {batch} x {length}")
    models = [
        [
            row["model"],
            f"{row['layers']} x {row['width']}",
            f"{row['parameters'] / 1e6:.2f}M",
            f"{row['embeddings'] / 1e6:.2f}M",
            *(f"{row['flops'][k] / 1e9:.3f}" for k in lengths),
            f"{speed_ups[row['model']]:.1f} x",
        ]
        for row in costs["models"]
    ]
    forms = [
        [
            *(row["model"], row["form"], f"{row['megabytes']:.1f}"),
            *(f"{row['load_seconds']:.2f}", f"{row['peak_megabytes']:.0f}"),
        ]
        for row in costs["forms"]
    ]
    latencies = [
        [
            *(row["model"], row["form"], f"{row['batch']} x {row['length']}"),
            *(f"{row['median_ms']:.2f}", f"{row['p95_ms']:.2f}"),
            *(f"{row['sentences_a_second']:.0f}", f"{row['speed_up']:.2f} x"),
        ]
        for row in costs["latencies"]
    ]
    parts = [
        _table(header, models),
        _table(["model", "form", "MB", "seconds to load", "peak MB"], forms),
        _table(
            ["model", "form", "batch x length", "median ms", "95 % ms", "sentences a second", "speed-up"], latencies
        ),
        f"Speed-up: over the first model in PyTorch's float32, in the same turns. Threads: {costs['threads']}, "
        f"{costs['processor']}. Tokens are made up. Peak memory has the libraries in it.\n",
    ]
    return "\n".join(parts)


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def draw_latencies(rows: list[dict], path: Path) -> None:
    """A panel for each batch, milliseconds a sentence over the length, a line for each model in each form."""
    import matplotlib
    from matplotlib.figure import Figure

    from bert_emd.pictures import DASHES, GREYS, MARKERS, STYLE, save_picture

    batches = list(dict.fromkeys(row["batch"] for row in rows))
    lines = list(dict.fromkeys((row["model"], row["form"]) for row in rows))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(2.6 * len(batches), 3.2 + 0.16 * len(lines)), layout="constrained")
        panels = figure.subplots(1, len(batches), squeeze=False)[0]
        for panel, batch in zip(panels, batches, strict=True):
            for k, line in enumerate(lines):
                own = [row for row in rows if (row["model"], row["form"], row["batch"]) == (*line, batch)]
                panel.plot(
                    [row["length"] for row in own],
                    [row["median_ms"] / batch for row in own],
                    marker=MARKERS[k % len(MARKERS)],
                    markersize=4,
                    linestyle=DASHES[k % len(DASHES)],
                    color=GREYS[k % len(GREYS)],
                    label=", ".join(line),
                )
            panel.set_yscale("log")
            panel.set_title(f"batches of {batch}")
            panel.set_xlabel("tokens")
        panels[0].set_ylabel("milliseconds a sentence")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
        save_picture(figure, path)


if __name__ == "__main__":
    main()
