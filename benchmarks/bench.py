"""What a step costs, ours against the looped way (benchmarks/looped.py) in the same run.

    python benchmarks/bench.py                     # every table, under 20 minutes on 2 CPU cores
    python benchmarks/bench.py --only losses,step
    python benchmarks/bench.py --device cuda

Prints the tables; all of them on a CPU are also written to RESULTS.md and results.json beside this file, whatever else
into --output_dir. A ratio is the looped way's time over ours; both take turns, after a pass that is not timed, and
medians count. Peak memory is what the work itself adds.
"""

import argparse
import ctypes
import gc
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, set_seed

sys.path.append(str(Path(__file__).resolve().parents[1]))
import looped

import quickstart
from bert_emd.attention_scores import expose_attention
from bert_emd.choices import SOLVERS
from bert_emd.distillation import Distillation
from bert_emd.layer_distance import pairwise_attention_mse, pairwise_mse
from bert_emd.layer_outputs import LayerOutputs, layer_outputs
from bert_emd.layer_transport import LayerTransport, solve_transport
from bert_emd.objectives import PARTS, LayerCosts, Objective
from bert_emd.student import make_projections
from bert_emd.teacher_answers import Layout, TeacherCache
from bert_finetune.data import load_split, tokenize
from bert_finetune.files import write_atomically, write_json
from bert_finetune.footprint import processor_name
from bert_finetune.glue import get_task
from bert_finetune.task_kinds import Classification

HERE = Path(__file__).resolve().parent
# The paper's models: BERT-base as teacher, TinyBERT's two shapes as students.
TEACHER = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
STUDENTS = {
    4: {"hidden_size": 312, "num_hidden_layers": 4, "num_attention_heads": 12, "intermediate_size": 1200},
    6: {"hidden_size": 768, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 3072},
}
KIND = Classification({"0": "no", "1": "yes"})
VOCABULARY = 30522
BATCH, LENGTH = 32, 128
READ, PRODUCT = 1 << 27, 4096  # elements to read, and rows of a square matrix, for the machine's limits
TASKS = ("MRPC", "CoLA", "RTE")
KERNELS = {"cpu": ("eager", "compiled"), "cuda": ("eager", "triton")}
LENGTHS, BATCHES = (32, 64, 128, 256, 512), (8, 16, 32, 64, 128, 256)


class Machine:
    """Where the work runs, and how its time and memory are taken."""

    def __init__(self, device: str):
        self.device = torch.device(device)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, works: dict[str, Callable[[], object]], repeats: int = 5) -> dict[str, float]:
        """Median seconds of each work; they take turns, after one pass that is not timed."""
        times = {name: [] for name in works}
        for turn in range(repeats + 1):
            for name, work in works.items():
                self.synchronize()
                start = time.perf_counter()
                work()
                self.synchronize()
                if turn:
                    times[name].append(time.perf_counter() - start)
        return {name: statistics.median(values) for name, values in times.items()}

    def peak(self, work: Callable[[], object]) -> float:
        """Megabytes that the work adds at its peak."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            work()
            torch.cuda.synchronize()
            return (torch.cuda.max_memory_allocated() - before) / 1e6
        with ResidentMemory() as memory:
            work()
        return memory.added / 1e6

    def __str__(self) -> str:
        if self.device.type == "cuda":
            return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
        return f"{processor_name()}, {torch.get_num_threads()} threads"


class ResidentMemory:
    """The most resident memory of this process while the block runs, beyond that before it; `added` bytes."""

    def __enter__(self):
        if platform.libc_ver()[0] == "glibc":  # memory that was freed but not given back would hide what is taken now
            ctypes.CDLL(None).malloc_trim(0)
        self._done, self._before = threading.Event(), self._now()
        self._most = self._before
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._done.set()
        self._thread.join()
        self.added = self._most - self._before

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self._most = max(self._most, self._now())

    @staticmethod
    def _now() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def layer_inputs(machine: Machine, student_layers: int, batch: int, length: int):
    """Random layers of both models: hidden states (projected) and attention scores; the student's first."""
    sides = []
    heads, width = TEACHER["num_attention_heads"], TEACHER["hidden_size"]
    for model in (STUDENTS[student_layers], TEACHER):
        layers = model["num_hidden_layers"]
        states = [torch.randn(batch, length, width, device=machine.device) for _ in range(layers + 1)]
        scores = [torch.randn(batch, heads, length, length, device=machine.device) for _ in range(layers)]
        sides.append(LayerOutputs(None, states, scores))
    for layer in (*sides[0].hidden_states, *sides[0].attention):
        layer.requires_grad_()
    return sides


def layer_losses(machine: Machine, student_layers: int, batch: int, length: int) -> dict[str, Callable]:
    """Layer losses of one step, forward and backward, of the same layers; ours with each kernel of this device."""
    student, teacher = layer_inputs(machine, student_layers, batch, length)
    mask = torch.ones(batch, length, dtype=torch.long, device=machine.device)
    transport = looped.LoopedTransport(student_layers, TEACHER["num_hidden_layers"])

    def theirs():
        sum(transport(student.attention, teacher.attention, student.hidden_states, teacher.hidden_states)).backward()
        forget((*student.hidden_states, *student.attention))

    works = {"looped": theirs}
    for kernel in KERNELS[machine.device.type]:
        mapping = LayerTransport(student_layers, TEACHER["num_hidden_layers"], solver="pot")
        objective = Objective(KIND, LayerCosts(kernel), 1.0, looks_at=PARTS - {"logits"})

        def ours(objective=objective, mapping=mapping):
            objective(mapping, student, teacher, mask, None)[0].backward()
            forget((*student.hidden_states, *student.attention))

        works[kernel] = ours
    return works


def forget(layers) -> None:
    """Drop gradients, as an optimizer's zero_grad does."""
    for layer in layers:
        layer.grad = None


def table_losses(machine: Machine, options: argparse.Namespace) -> list[dict]:
    """(a) Layer losses, forward and backward, at (32, 12 heads, 128)."""
    rows = []
    for layers in STUDENTS:
        works = layer_losses(machine, layers, BATCH, LENGTH)
        seconds = machine.seconds(works)
        memory = {name: machine.peak(work) for name, work in works.items()}
        rows.append({"teacher x student layers": f"12 x {layers}", **_compared(seconds), **_memories(memory)})
    return rows


def table_batches(machine: Machine, options: argparse.Namespace) -> list[dict]:
    """(f) Layer losses by batch size, 12 x 4 layers, length 128."""
    rows = []
    for batch in BATCHES:
        works = layer_losses(machine, 4, batch, LENGTH)
        room = _free_memory(machine)
        # The looped way keeps some 2.5 values a pair of layers for each score and each hidden value of a layer.
        scores = batch * LENGTH * (TEACHER["num_attention_heads"] * LENGTH + TEACHER["hidden_size"])
        if 2.5 * 4 * 4 * TEACHER["num_hidden_layers"] * scores > room:
            works.pop("looped")
        rows.append({"batch": batch, **_compared(machine.seconds(works, repeats=3))})
    return rows


def table_lengths(machine: Machine, options: argparse.Namespace) -> list[dict]:
    """(e) Attention distances by length, forward and backward; 12 x 4 layers, batch 8.

    Ours of ready scores, whose own size is given too, and both forms of ours of their factors, queries and keys.
    """
    rows, heads = [], TEACHER["num_attention_heads"]
    for length in LENGTHS:
        sides = [
            [
                torch.randn(2, 8, heads, length, model["hidden_size"] // heads, device=machine.device)
                for _ in range(model["num_hidden_layers"])
            ]
            for model in (STUDENTS[4], TEACHER)
        ]
        scores = [[(layer[0] @ layer[1].mT).requires_grad_(side is sides[0]) for layer in side] for side in sides]
        for layer in sides[0]:
            layer.requires_grad_()
        flow = torch.zeros(4, TEACHER["num_hidden_layers"], device=machine.device)
        for j in range(TEACHER["num_hidden_layers"]):
            flow[j // 3, j] = 1 / TEACHER["num_hidden_layers"]

        def ours(compare, student, teacher, flow=flow):
            (flow * compare(student, teacher)).sum().backward()
            forget(student)

        def theirs(scores=scores, flow=flow):
            pairs = [
                torch.nn.functional.mse_loss(
                    torch.where(s <= -100, torch.zeros_like(s), s), torch.where(t <= -100, torch.zeros_like(t), t)
                )
                for s in scores[0]
                for t in scores[1]
            ]
            (flow.flatten() * torch.stack(pairs)).sum().backward()
            forget(scores[0])

        works = {
            "scores": lambda scores=scores: ours(pairwise_mse, *scores),
            "direct": lambda sides=sides: ours(partial(pairwise_attention_mse, form="direct"), *sides),
            "factored": lambda sides=sides: ours(partial(pairwise_attention_mse, form="factored"), *sides),
            "looped": theirs,
        }
        seconds = machine.seconds(works, repeats=3)
        memory = {name: machine.peak(work) for name, work in works.items()}
        rows.append(
            {"length": length, "scores themselves (MB)": sum(x.numel() * 4 for side in scores for x in side) / 1e6}
            | {f"{name} (ms)": 1000 * value for name, value in seconds.items()}
            | {f"{name} (MB)": value for name, value in memory.items()}
        )
    return rows


def models(machine: Machine):
    """The paper's 4-layer student and its teacher, with random weights."""
    set_seed(0)
    both = [
        BertForSequenceClassification(BertConfig(vocab_size=VOCABULARY, **shape)).to(machine.device)
        for shape in (STUDENTS[4], TEACHER)
    ]
    both[1].eval().requires_grad_(False)
    return both


def tokens(machine: Machine, lengths: list[int], padded_to: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(1000, VOCABULARY, (len(lengths), padded_to), device=machine.device)
    mask = torch.arange(padded_to, device=machine.device) < torch.tensor(lengths, device=machine.device)[:, None]
    return {"input_ids": ids * mask, "attention_mask": mask.long()}


class OurStep:
    """A training step as the project's trainer does it; `kernel`: of `pairwise_mse`."""

    def __init__(self, machine: Machine, student, teacher, bf16: bool, kernel: str | None = None):
        for model in (student, teacher):
            expose_attention(model, "--teacher_model", LENGTH)
        self.teacher, self.device, self.bf16 = teacher, machine.device.type, bf16
        self.objective = Objective(KIND, LayerCosts(kernel), beta=0.01)
        mapping = LayerTransport(4, TEACHER["num_hidden_layers"], solver="pot")
        projections = make_projections(student, TEACHER["hidden_size"])
        distillation = Distillation(student, self.objective, mapping, projections)
        self.distillation = distillation.to(machine.device).train()
        self.optimizer = torch.optim.AdamW(self.distillation.parameters(), lr=1e-5)

    def ask_teacher(self, inputs) -> LayerOutputs:
        with torch.no_grad(), torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
            return layer_outputs(self.teacher, self.objective.looks_at, **inputs)

    def ask_student(self, inputs) -> LayerOutputs:
        with torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
            return self.distillation.student_outputs(**inputs)

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def __call__(self, inputs, answers: LayerOutputs | None = None) -> None:
        answers = answers or self.ask_teacher(inputs)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
            self.distillation(**inputs, teacher=answers).loss.backward()
        self.update()


class LoopedStep:
    def __init__(self, machine: Machine, student, teacher):
        for model in (student, teacher):
            model.set_attn_implementation("looped")
        self.student, self.teacher = student.train(), teacher.train()
        self.projection = torch.nn.Linear(STUDENTS[4]["hidden_size"], TEACHER["hidden_size"]).to(machine.device)
        self.transport = looped.LoopedTransport(4, TEACHER["num_hidden_layers"])
        self.optimizer = torch.optim.AdamW([*student.parameters(), *self.projection.parameters()], lr=1e-5)

    def __call__(self, inputs) -> None:
        looped.step(self.student, self.projection, self.teacher, self.transport, self.optimizer, inputs)


def table_step(machine: Machine, options: argparse.Namespace) -> list[dict]:
    """(b) One training step at the paper's shape: batch 32, every example 128 tokens long, no padding to skip."""
    inputs = tokens(machine, [LENGTH] * BATCH, LENGTH)
    theirs = LoopedStep(machine, *models(machine))
    kernels = KERNELS[machine.device.type]
    works = {"looped": lambda: theirs(inputs)}
    for name, bf16, kernel in (
        ("float32", False, kernels[0]),
        ("bf16", True, kernels[0]),
        (f"bf16, {kernels[1]}", True, kernels[1]),
    ):
        step = OurStep(machine, *models(machine), bf16, kernel)
        works[name] = lambda step=step: step(inputs)
        kept = step.ask_teacher(inputs)
        works[f"{name}, teacher cached"] = lambda step=step, kept=kept: step(inputs, kept)
    seconds = machine.seconds(works, repeats=3)
    memory = {name: machine.peak(work) for name, work in works.items()}
    return [
        {"step": name, "seconds": seconds[name], "ratio": seconds["looped"] / seconds[name], "peak (MB)": memory[name]}
        for name in works
    ]


def table_profile(machine: Machine, options: argparse.Namespace) -> list[dict]:
    """(h) Where the time of such a step goes, in seconds."""
    inputs, rows = tokens(machine, [LENGTH] * BATCH, LENGTH), []
    for name, bf16 in (("float32", False), ("bf16", True)):
        step = OurStep(machine, *models(machine), bf16)
        at: dict[str, object] = {}

        def teacher(step=step, at=at):
            at["theirs"] = step.ask_teacher(inputs)

        def student(step=step, at=at):
            at["ours"] = step.ask_student(inputs)

        def losses(step=step, at=at):
            whole = step.distillation
            at["loss"] = whole.objective(whole.mapping, at["ours"], at["theirs"], inputs["attention_mask"], None)[0]

        works = {
            "teacher": teacher,
            "student forward": student,
            "losses": losses,
            "backward": lambda at=at: at["loss"].backward(),
            "optimizer": step.update,
        }
        rows.append({"precision": name, **machine.seconds(works)})
    return rows


def table_epochs(machine: Machine, options: argparse.Namespace, sampled: int = 6) -> list[dict]:
    """(c) An epoch of real tasks, first and later ones; ours in bf16 and with the teacher's answers kept.

    The looped way's steps all take the same time, since all are padded to 128; of ours, `sampled` batches spread evenly
    from the shortest to the longest are timed, and each stands for as many.
    """
    missing = [name for name in TASKS if not (options.glue_dir / name / "train.tsv").exists()]
    if missing:
        print(f"(c) left out: {options.glue_dir} does not hold {', '.join(missing)}; see download_glue_data.py")
        return []
    if options.tokenizer == quickstart.MODEL:
        quickstart.fetch_model()
    theirs, step = LoopedStep(machine, *models(machine)), OurStep(machine, *models(machine), bf16=True)
    full = tokens(machine, [LENGTH] * BATCH, LENGTH)
    per_step = machine.seconds({"looped": lambda: theirs(full)}, repeats=2)["looped"]
    tokenizer, rows, folder = AutoTokenizer.from_pretrained(options.tokenizer), [], tempfile.TemporaryDirectory()
    for name in TASKS:
        data = tokenize(load_split(get_task(name), options.glue_dir / name / "train.tsv", "train"), tokenizer, LENGTH)
        lengths = sorted(len(ids) for ids in data["input_ids"])
        batches = [lengths[k : k + BATCH] for k in range(0, len(lengths), BATCH)]
        chosen = [batches[int((k + 0.5) * len(batches) / sampled)] for k in range(sampled)]
        layout = Layout.of(step.teacher, step.objective.looks_at)
        kept_lengths = [length for batch in chosen for length in batch]
        # As --teacher_cache auto does.
        on_disk = Path(folder.name, name) if machine.device.type == "cpu" else None
        cache = TeacherCache(layout, kept_lengths, folder=on_disk, device="cpu" if on_disk else machine.device)
        first = later = 0.0
        for k, batch in enumerate(chosen):
            inputs = tokens(machine, batch, max(batch))
            numbers, mask = torch.arange(k * BATCH, k * BATCH + len(batch)), inputs["attention_mask"]

            def fresh(inputs=inputs, numbers=numbers, mask=mask, cache=cache):
                for part in cache._parts.values():  # each time as if it were the first
                    part._verified[numbers] = False
                    if part._on_disk:
                        part._checksums[numbers] = 0
                cache.keep(numbers, step.ask_teacher(inputs))
                step(inputs, cache.answers(numbers, mask))

            def cached(inputs=inputs, numbers=numbers, mask=mask, cache=cache):
                assert cache.knows(numbers)
                step(inputs, cache.answers(numbers, mask))

            seconds = machine.seconds({"first": fresh, "later": cached}, repeats=2)
            first += seconds["first"] * len(batches) / sampled
            later += seconds["later"] * len(batches) / sampled
        slow = per_step * len(batches)
        rows.append(
            {
                "task": name,
                "steps": len(batches),
                "mean length": statistics.mean(lengths),
                "looped (s)": slow,
                "first epoch (s)": first,
                "ratio, first": slow / first,
                "later epoch (s)": later,
                "ratio, later": slow / later,
            }
        )
    folder.cleanup()
    return rows


def table_solver(machine: Machine, options: argparse.Namespace) -> list[dict]:
    """(d) The transport problem: microseconds a solve, ours on M x N against pyemd on (M+N)², one thread."""
    rows, rng = [], np.random.default_rng(0)
    for m, n in ((4, 12), (6, 12), (12, 24)):
        problems = [
            (rng.dirichlet(np.ones(m)), rng.dirichlet(np.ones(n)), rng.random((m, n)) + 0.1) for _ in range(200)
        ]

        def square(ours, theirs, cost):
            m, n = cost.shape
            distance = np.zeros((m + n, m + n))
            distance[:m, m:], distance[m:, :m] = cost, cost.T
            looped.pyemd.emd_with_flow(
                np.concatenate([ours, np.zeros(n)]), np.concatenate([np.zeros(m), theirs]), distance
            )

        works = {"looped": lambda p=problems: [square(*x) for x in p]}
        for solver in SOLVERS:
            works[solver] = lambda p=problems, s=solver: [solve_transport(*x, s) for x in p]
        micro = {name: 1e6 * value / len(problems) for name, value in machine.seconds(works).items()}
        row = {"M x N": f"{m} x {n}"} | {f"{name} (µs)": value for name, value in micro.items()}
        rows.append(row | {"ratio, pot": micro["looped"] / micro["pot"]})
    return rows


def table_limits(machine: Machine, options: argparse.Namespace) -> list[dict]:
    """(g) What the machine can do, and the share of its memory bandwidth that the layer losses (12 x 4) reach."""
    big = torch.randn(READ, device=machine.device)
    square = torch.randn(PRODUCT, PRODUCT, device=machine.device)
    halves = square.bfloat16()
    works = {"read": lambda: big.sum(), "float32": lambda: square @ square, "bf16": lambda: halves @ halves}
    seconds = machine.seconds(works)
    losses = layer_losses(machine, 4, BATCH, LENGTH)
    losses = machine.seconds({kernel: losses[kernel] for kernel in KERNELS[machine.device.type]})
    # Read once forward and once backward, and the gradients written.
    student, teacher = layer_inputs(machine, 4, BATCH, LENGTH)
    sizes = [sum(x.numel() * 4 for x in (*side.hidden_states, *side.attention)) for side in (student, teacher)]
    moved = 3 * sizes[0] + 2 * sizes[1]
    bandwidth = 4 * big.numel() / seconds["read"]
    return [
        {"what": "memory read (GB/s)", "measured": bandwidth / 1e9},
        {"what": "float32 products (TFLOP/s)", "measured": 2 * PRODUCT**3 / seconds["float32"] / 1e12},
        {"what": "bfloat16 products (TFLOP/s)", "measured": 2 * PRODUCT**3 / seconds["bf16"] / 1e12},
        *(
            {"what": f"layer losses, {kernel}: share of the memory's", "measured": moved / seconds / bandwidth}
            for kernel, seconds in losses.items()
        ),
    ]


TABLES = {
    "losses": table_losses,
    "step": table_step,
    "epochs": table_epochs,
    "solver": table_solver,
    "lengths": table_lengths,
    "batches": table_batches,
    "limits": table_limits,
    "profile": table_profile,
}

# Ratios to the looped way that were to be reached on 2 CPU cores: table, its first column, what is measured, at least
# how much, and what is in the way where it is missed.
_COPIES = "eager copies what it reads into the cache first; compiled does not"
_BOUND = "three quarters are the teacher's products (h), at the rate of (g)"
_SIMPLEX = "nearly half of it is the simplex itself"
TARGETS = (
    ("losses", "12 x 4", "ratio, eager", 6, _COPIES),
    ("losses", "12 x 4", "ratio, compiled", 6, ""),
    ("losses", "12 x 6", "ratio, eager", 6, _COPIES),
    ("losses", "12 x 6", "ratio, compiled", 6, ""),
    ("step", "float32", "ratio", 2.5, _BOUND),
    ("step", "bf16", "ratio", 2.5, ""),
    ("epochs", "MRPC", "ratio, first", 5, ""),
    ("epochs", "MRPC", "ratio, later", 15, ""),
    ("epochs", "CoLA", "ratio, first", 10, ""),
    ("epochs", "CoLA", "ratio, later", 20, ""),
    ("solver", "4 x 12", "ratio, pot", 5, ""),
    ("solver", "6 x 12", "ratio, pot", 5, ""),
    ("solver", "12 x 24", "ratio, pot", 5, _SIMPLEX),
)


def against_targets(results: dict) -> str:
    """The ratios that were to be reached, as far as they were measured on a CPU, and what is in the way of some."""
    rows = []
    for table, first, name, least, obstacle in TARGETS:
        found = [row[name] for row in results.get(table, []) if first in row.values() and row.get(name)]
        if found:
            said = "reached"
            if found[0] < least:
                said = f"missed by {100 * (1 - found[0] / least):.0f} %" + (f": {obstacle}" if obstacle else "")
            rows.append({"what": f"{table}, {first}: {name}", "to reach": least, "measured": found[0], "": said})
    return f"## Against what was to be reached on 2 CPU cores\n\n{markdown(rows)}" if rows else ""


def _compared(seconds: dict[str, float]) -> dict:
    row = {f"{name} (ms)": 1000 * value for name, value in seconds.items()}
    slow = seconds.get("looped")
    return row | {f"ratio, {name}": slow and slow / value for name, value in seconds.items() if name != "looped"}


def _memories(memory: dict[str, float]) -> dict:
    return {f"{name}, peak (MB)": value for name, value in memory.items()}


def _free_memory(machine: Machine) -> int:
    if machine.device.type == "cuda":
        return torch.cuda.mem_get_info()[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def markdown(rows: list[dict]) -> str:
    """Rows as a table whose columns are all keys in them; numbers with three digits."""

    def cell(value) -> str:
        if not isinstance(value, float):
            return "" if value is None else str(value)
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"

    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, ["---"] * len(names), *([cell(row.get(name)) for name in names] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--only", default=",".join(TABLES), help="tables, with commas (default: %(default)s)")
    parser.add_argument("--output_dir", type=Path, help="where the results go")
    parser.add_argument(
        "--glue_dir", type=Path, default=HERE.parent / "glue_data", help="GLUE's official files, for the epochs"
    )
    parser.add_argument("--tokenizer", default=quickstart.MODEL, help="for these; BERT's uncased one")
    options = parser.parse_args(argv)
    machine = Machine(options.device)
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    text = [f"# Measured\n\n{machine}. {versions}. Command: `python {' '.join(sys.argv)}`.\n"]
    results = {"machine": str(machine), "versions": versions}
    for name in options.only.split(","):
        start = time.perf_counter()
        rows = TABLES[name](machine, options)
        heading = f"## {TABLES[name].__doc__.splitlines()[0]}\n\n{markdown(rows)}"
        print(f"{heading}({time.perf_counter() - start:.0f} s)\n", flush=True)
        text.append(heading)
        results[name] = rows
        gc.collect()
    folder = options.output_dir
    if folder is None and machine.device.type == "cpu" and set(results) >= set(TABLES):
        folder = HERE
    if folder is None:
        return
    if machine.device.type == "cpu":
        text.append(against_targets(results))
    write_atomically(folder / "RESULTS.md", "\n".join(filter(None, text)))
    write_json(folder / "results.json", results)


if __name__ == "__main__":
    main()
