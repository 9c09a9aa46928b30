"""Every bad input ends with exit code 2 and one line that names what is wrong and where; what was there before is left
alone. The downloader's dealings with servers and archives are in test_download_glue_data.py."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name

import pytest
import torch
from conftest import ROOT, save_bert
from glue_files import FORMATS, rows, write_task, write_tsv
from mishaps import dies, full_disk, permissions_apply, snapshot
from safetensors.torch import load_file
from test_convert_bert_original_tf_checkpoint_to_pytorch import make_release

import download_glue_data
import quickstart
from bert_emd.emd_task_distill import main as distil
from bert_finetune import convert_bert_original_tf_checkpoint_to_pytorch as converter
from bert_finetune import tf_conversion
from bert_finetune.checkpoints import load_classifier, load_tokenizer, save_classifier
from bert_finetune.files import write_atomically
from bert_finetune.glue import get_task
from bert_finetune.run_glue import main as finetune
from bert_finetune.training_log import QuietProgress

RTE = ["entailment", "not_entailment"]
HEADER = FORMATS["RTE"][0]
ROWS = rows("RTE", "train", 3)

# Each script with a command that is right; {w} is the folder of everything that it reads and writes.
SCRIPTS = {
    "finetune": (
        finetune,
        "--model_name_or_path {w}/pretrained --task_name RTE --data_dir {w}/data --do_train --output_dir {w}/out "
        "--max_seq_length 32",
    ),
    "distil": (
        distil,
        "--teacher_model {w}/teacher --student_model {w}/student --task_name RTE --data_dir {w}/data "
        "--output_dir {w}/out --max_seq_length 32",
    ),
    "convert": (converter.main, "--tf_checkpoint_path {w}/release --pytorch_dump_path {w}/dump"),
    "download": (download_glue_data.main, "--data_dir {w}/glue_data --tasks RTE --base_url http://127.0.0.1:9"),
    "quickstart": (quickstart.main, "--output_dir {w}/quickstart"),
}


def command(script: str, world: Path, options: str = "") -> list[str]:
    return [part.format(w=world) for part in f"{SCRIPTS[script][1]} {options}".split()]


@pytest.fixture(scope="module")
def good_world(tmp_path_factory, teacher, pretrained, small_student) -> Path:
    world = tmp_path_factory.mktemp("world")
    for name, folder in (("teacher", teacher), ("pretrained", pretrained), ("student", small_student)):
        shutil.copytree(folder, world / name)
    for folder in (world / "data", world / "glue_data" / "RTE"):
        write_task(folder, "RTE")
    make_release(world / "release")
    (world / "file").write_text("mine")
    (world / "rated.txt").write_text("".join(f"{k}\t{k % 2 * 4 - 2}\t{' '.join(ROWS[0])} {k}\n" for k in range(9)))
    return world


@pytest.fixture
def world(tmp_path, good_world, monkeypatch) -> Path:
    """Good models, data and a release, all copies that a case may break; outputs go beside them."""
    shutil.copytree(good_world, tmp_path / "w")
    monkeypatch.setattr(quickstart, "fetch_model", lambda: None)
    monkeypatch.setattr(quickstart, "fetch_text", lambda: None)
    monkeypatch.setattr(quickstart, "SENTENCES", tmp_path / "w" / "rated.txt")
    return tmp_path / "w"


# Ways to break a file of the world.


def missing(path: str):
    return lambda w: (w / path).unlink()


def holds(path: str, content: bytes | str):
    return lambda w: (w / path).write_bytes(content.encode() if isinstance(content, str) else content)


def cut(path: str, size: int = 100):
    return lambda w: os.truncate(w / path, size)


def folder(path: str):
    return lambda w: ((w / path).unlink(missing_ok=True), (w / path).mkdir())


def broken_link(path: str):
    return lambda w: ((w / path).unlink(), (w / path).symlink_to("nowhere"))


def unreadable(path: str):
    return lambda w: (w / path).chmod(0)


def unwritable(path: str):
    return lambda w: ((w / path).mkdir(exist_ok=True), (w / path).chmod(0o555))


def table(path: str, header: list[str], lines: list[list[str]]):
    return lambda w: write_tsv(w / path, header, lines)


def settings(path: str, **changes):
    return lambda w: (w / path).write_text(json.dumps(json.loads((w / path).read_text()) | changes))


def encoded(path: str, encoding: str):
    return lambda w: (w / path).write_bytes((w / path).read_text(encoding="utf-8").replace("a", "ä").encode(encoding))


def bert(name: str, class_names: list[str] | None, **changes):
    return lambda w: save_bert(w / name, class_names, **changes)


def append(path: Path, content: bytes) -> None:
    path.write_bytes(path.read_bytes() + content)


class _Code:
    def __reduce__(self):
        return os.mkdir, ("made-by-a-pickle",)


def in_pickle(name: str, size: int | None = None, code: bool = False):
    """Weights as a pickle, cut to `size`, or with `code` to run as they are read."""

    def damage(w):
        weights = load_file(w / name / "model.safetensors")
        (w / name / "model.safetensors").unlink()
        torch.save(weights | ({"x": _Code()} if code else {}), w / name / "pytorch_model.bin")
        if size is not None:
            os.truncate(w / name / "pytorch_model.bin", size)

    return damage


@dataclass(frozen=True)
class Case:
    """What is wrong: `damage` done to the world, `options` added to the command; and what the line must say."""

    scripts: str
    message: str
    damage: Callable[[Path], object] = lambda world: None
    options: str = ""


BOTH = "finetune distil"
EVERY = "finetune distil convert download quickstart"
CASES = {
    # Data
    "no training file": Case(BOTH, "{w}/data/train.tsv: no such file", missing("data/train.tsv")),
    "no dev file": Case(BOTH, "{w}/data/dev.tsv: no such file", missing("data/dev.tsv")),
    "no test file": Case(BOTH, "{w}/data/test.tsv: no such file", missing("data/test.tsv"), "--do_train --do_predict"),
    "no data folder": Case(BOTH, "nowhere/train.tsv: no such file", options="--data_dir nowhere"),
    "data in a file": Case(BOTH, "{w}/file/train.tsv: no such file", options="--data_dir {w}/file"),
    "an empty file": Case(BOTH, "{w}/data/train.tsv: the file holds no row", holds("data/train.tsv", b"")),
    "a header only": Case(BOTH, "{w}/data/train.tsv: the file holds no row", table("data/train.tsv", HEADER, [])),
    "another column": Case(
        BOTH,
        "{w}/data/train.tsv: no column 'sentence1'; its columns are index, premise, sentence2, label",
        table("data/train.tsv", ["index", "premise", "sentence2", "label"], ROWS),
    ),
    "another task's columns": Case(
        BOTH, "{w}/data/dev.tsv: no column 'sentence1'", table("data/dev.tsv", FORMATS["SST-2"][0], [["good", "1"]])
    ),
    "commas in place of tabs": Case(
        BOTH,
        "{w}/data/train.tsv: no column 'sentence1'; its columns are index,sentence1,sentence2,label",
        holds("data/train.tsv", "index,sentence1,sentence2,label\n0,a,b,entailment\n"),
    ),
    "a label": Case(
        BOTH,
        "{w}/data/train.tsv, line 3: label 'maybe' is not one of RTE's: entailment, not_entailment",
        table("data/train.tsv", HEADER, [ROWS[0], [*ROWS[1][:3], "maybe"]]),
    ),
    "a score": Case(
        BOTH,
        "{w}/data/dev.tsv, line 2: '5.5' is not a score between 0 and 5",
        lambda w: (
            save_bert(w / "teacher", ["score"]),
            write_task(w / "data", "STS-B"),
            write_tsv(w / "data/dev.tsv", FORMATS["STS-B"][0], [[*rows("STS-B", "dev", 1)[0][:-1], "5.5"]]),
        ),
        "--task_name STS-B",
    ),
    "a short row": Case(
        BOTH,
        "{w}/data/dev.tsv, line 3: 2 tab-separated fields where 4 are needed",
        table("data/dev.tsv", HEADER, [ROWS[0], ROWS[1][:2]]),
    ),
    "no text at all": Case(BOTH, "{w}/data/train.tsv, line 1: not UTF-8", holds("data/train.tsv", b"\xff\xfe\x00")),
    "UTF-16": Case(BOTH, "{w}/data/train.tsv, line 1: not UTF-8 text; save", encoded("data/train.tsv", "utf-16")),
    "Latin-1": Case(BOTH, "{w}/data/train.tsv, line 1: not UTF-8 text; save", encoded("data/train.tsv", "latin-1")),
    "half a letter": Case(
        BOTH, "{w}/data/train.tsv, line 26: not UTF-8", lambda w: append(w / "data/train.tsv", "24\tnaï".encode()[:-1])
    ),
    "a folder for a file": Case(BOTH, "{w}/data/train.tsv: cannot be read: Is a directory", folder("data/train.tsv")),
    "a broken link": Case(BOTH, "{w}/data/dev.tsv: no such file", broken_link("data/dev.tsv")),
    "unreadable data": Case(
        BOTH, "{w}/data/train.tsv: cannot be read: Permission denied", unreadable("data/train.tsv")
    ),
    "an unreadable data folder": Case(BOTH, "{w}/data/RTE/train.tsv: Permission denied", unreadable("data")),
    # Options
    "unknown task": Case(BOTH, "--task_name XNLI: no such task; choose one of CoLA", options="--task_name XNLI"),
    "no number": Case(
        BOTH, "argument --learning_rate/--learning-rate: invalid float value: 'fast'", options="--learning_rate fast"
    ),
    "no whole number": Case(BOTH, "argument --seed: invalid int value: '1.5'", options="--seed 1.5"),
    "neither true nor false": Case(
        BOTH, "argument --fp16: Truthy value expected: got perhaps", options="--fp16 perhaps"
    ),
    "no value": Case(BOTH, "argument --output_dir/--output-dir: expected one argument", options="--output_dir"),
    "unknown option": Case(BOTH, "unrecognized arguments: --learning_rat 1", options="--learning_rat 1"),
    "a stray word": Case(BOTH, "unrecognized arguments: RTE", options="RTE"),
    "too long": Case(BOTH, "--max_seq_length 65: the model has only 64 positions", options="--max_seq_length 65"),
    "too short": Case(BOTH, "--max_seq_length 4 leaves no room for text", options="--max_seq_length 4"),
    "no checkpoint": Case(
        BOTH, "--resume_from_checkpoint nowhere: not a complete", options="--resume_from_checkpoint nowhere"
    ),
    "batch size": Case(BOTH, "--train_batch_size 0: must be at least 1", options="--train_batch_size 0"),
    "seed": Case(BOTH, "--seed -1: must be from 0", options="--seed -1"),
    "batch larger than the data": Case(
        BOTH,
        "--dataloader_drop_last: the training file has 24 rows, fewer than a batch of 25",
        options="--dataloader_drop_last --train_batch_size 25",
    ),
    "strategy": Case(BOTH, "sometimes is not a valid SaveStrategy", options="--save_strategy sometimes"),
    "schedule": Case(BOTH, "wavy is not a valid SchedulerType", options="--schedule wavy"),
    "metric": Case(BOTH, "--metric_for_best_model f1: RTE has loss, accuracy", options="--metric_for_best_model f1"),
    "architecture": Case("finetune", "--model_type roberta: {w}/pretrained is a bert", options="--model_type roberta"),
    # Models
    "no model": Case("finetune", "--model_name_or_path {w}/no: no such folder", options="--model_name_or_path {w}/no"),
    "no teacher": Case("distil", "--teacher_model {w}/no: no such folder", options="--teacher_model {w}/no"),
    "a file for a model": Case(
        "distil", "--student_model {w}/file: no such folder", options="--student_model {w}/file"
    ),
    "an empty folder": Case(
        "finetune",
        "--model_name_or_path {w}/empty: cannot be loaded",
        folder("empty"),
        "--model_name_or_path {w}/empty",
    ),
    "no head": Case(
        "distil",
        "--teacher_model {w}/teacher: not a fine-tuned classifier, it has no weights for classifier.bias",
        bert("teacher", None),
    ),
    "another task's teacher": Case(
        "distil",
        "--teacher_model {w}/teacher: its 3 labels (contradiction, entailment, neutral) do not fit RTE (entailment, "
        "not_entailment)",
        bert("teacher", ["contradiction", "entailment", "neutral"]),
    ),
    "other class names": Case(
        "distil",
        "--teacher_model {w}/teacher: its labels (negative, positive) are not RTE's",
        bert("teacher", ["negative", "positive"]),
    ),
    "heads": Case(
        "distil",
        "the student has 2 attention heads and the teacher 3",
        bert("student", None, num_attention_heads=2, num_hidden_layers=2),
    ),
    "vocabulary": Case(
        "distil",
        "--student_model {w}/student: its vocabulary (7 tokens) is not that of --teacher_model {w}/teacher",
        bert("student", None, vocabulary=["other", "words"], num_hidden_layers=2),
    ),
    "teacher too short": Case(
        "distil",
        "--max_seq_length 32: the model has only 16 positions",
        bert("teacher", RTE, max_position_embeddings=16),
    ),
    "configuration missing": Case(
        "finetune", "--model_name_or_path {w}/pretrained: cannot be loaded", missing("pretrained/config.json")
    ),
    "configuration empty": Case(
        "distil", "--teacher_model {w}/teacher: cannot be loaded", holds("teacher/config.json", b"")
    ),
    "configuration cut": Case("distil", "--student_model {w}/student: cannot be loaded", cut("student/config.json")),
    "configuration not JSON": Case(
        "finetune", "--model_name_or_path {w}/pretrained: cannot be loaded", holds("pretrained/config.json", "x = 1")
    ),
    "configuration a list": Case(
        "finetune", "--model_name_or_path {w}/pretrained: cannot be loaded", holds("pretrained/config.json", "[]")
    ),
    "configuration in UTF-16": Case(
        "finetune", "--model_name_or_path {w}/pretrained: cannot be loaded", encoded("pretrained/config.json", "utf-16")
    ),
    "a width that is text": Case(
        "distil",
        "Validation error for field 'hidden_size': TypeError: Field 'hidden_size' expected int, got str",
        settings("teacher/config.json", hidden_size="wide"),
    ),
    "a width that does not divide": Case(
        "distil",
        "--teacher_model {w}/teacher: cannot be loaded: The hidden size (25) is not a multiple",
        settings("teacher/config.json", hidden_size=25),
    ),
    "an unknown architecture": Case(
        "finetune",
        "--model_name_or_path {w}/pretrained: cannot be loaded",
        settings("pretrained/config.json", model_type="brt"),
    ),
    "labels that are none": Case(
        "distil",
        "--teacher_model {w}/teacher: id2label of its config.json is 7; it must say a name for each",
        settings("teacher/config.json", id2label=7),
    ),
    "labels in a list, of another task": Case(
        "distil",
        "--teacher_model {w}/teacher: its labels (a, b) are not RTE's",
        settings("teacher/config.json", id2label=["a", "b"]),
    ),
    "weights missing": Case(
        "distil", "--teacher_model {w}/teacher: cannot be loaded", missing("teacher/model.safetensors")
    ),
    "weights empty": Case(
        "distil", "--teacher_model {w}/teacher: cannot be loaded", holds("teacher/model.safetensors", b"")
    ),
    "weights cut in the header": Case(
        "distil", "--student_model {w}/student: cannot be loaded", cut("student/model.safetensors")
    ),
    "weights cut at the end": Case(
        "finetune",
        "--model_name_or_path {w}/pretrained: cannot be loaded",
        lambda w: os.truncate(
            w / "pretrained/model.safetensors", (w / "pretrained/model.safetensors").stat().st_size - 1
        ),
    ),
    "weights of something else": Case(
        "distil", "--student_model {w}/student: cannot be loaded", holds("student/model.safetensors", b"x" * 100)
    ),
    "a header of any size": Case(
        "distil", "--student_model {w}/student: cannot be loaded", holds("student/model.safetensors", b"\xff" * 100)
    ),
    "weights of another model": Case(
        "distil",
        "--teacher_model {w}/teacher: its weights and its configuration do not fit: bert.embeddings.LayerNorm.bias is "
        "(12,), not (24,)",
        lambda w: shutil.copy(w / "student/model.safetensors", w / "teacher/model.safetensors"),
    ),
    "a student's weights of another model": Case(
        "distil",
        "--student_model {w}/student: its weights and its configuration do not fit: bert.embeddings.LayerNorm.bias is "
        "(24,), not (12,)",
        lambda w: shutil.copy(w / "pretrained/model.safetensors", w / "student/model.safetensors"),
    ),
    "a folder for weights": Case(
        "distil", "--student_model {w}/student: cannot be loaded", folder("student/model.safetensors")
    ),
    "a broken link for weights": Case(
        "distil", "--student_model {w}/student: cannot be loaded", broken_link("student/model.safetensors")
    ),
    "unreadable weights": Case(
        "distil", "--student_model {w}/student: cannot be loaded: ", unreadable("student/model.safetensors")
    ),
    "an unreadable configuration": Case(
        "finetune",
        "--model_name_or_path {w}/pretrained: cannot be loaded: {w}/pretrained/config.json: Permission denied",
        unreadable("pretrained/config.json"),
    ),
    "pytorch_model.bin cut": Case(
        "distil", "--student_model {w}/student: cannot be loaded", in_pickle("student", 1000)
    ),
    "pytorch_model.bin empty": Case("distil", "--student_model {w}/student: cannot be loaded", in_pickle("student", 0)),
    "pytorch_model.bin with code": Case(
        "distil", "--student_model {w}/student: cannot be loaded", in_pickle("student", code=True)
    ),
    "tokenizer cut": Case(
        "finetune", "--model_name_or_path {w}/pretrained, its tokenizer: cannot be", cut("pretrained/tokenizer.json")
    ),
    "tokenizer empty": Case(
        "distil", "--teacher_model {w}/teacher, its tokenizer: cannot be loaded", holds("teacher/tokenizer.json", b"")
    ),
    "tokenizer of something else": Case(
        "distil",
        "--teacher_model {w}/teacher, its tokenizer: cannot be loaded: KeyError",
        holds("teacher/tokenizer.json", b'{"a": 1}'),
    ),
    "tokenizer's settings cut": Case(
        "distil",
        "--student_model {w}/student, its tokenizer: cannot be loaded",
        cut("student/tokenizer_config.json", 20),
    ),
    "an unreadable tokenizer": Case(
        "distil",
        "--teacher_model {w}/teacher, its tokenizer: cannot be loaded: {w}/teacher/tokenizer.json: Perm",
        unreadable("teacher/tokenizer.json"),
    ),
    # Distillation
    "no student": Case("distil", "give --student_model, or --student_layers", options="--student_model="),
    "two students": Case("distil", "leave it or --student_model out", options="--student_layers 2"),
    "too many layers": Case(
        "distil", "--student_layers 5: the teacher has 4 layers", options="--student_model= --student_layers 5"
    ),
    "no layers": Case(
        "distil", "--student_layers few: give a number of layers", options="--student_model= --student_layers few"
    ),
    "a width for a student of its own": Case(
        "distil", "--student_width: the --student_model has its own", options="--student_width 12"
    ),
    "a start for a student of its own": Case(
        "distil", "--student_start: the --student_model has its own", options="--student_start random"
    ),
    "a width that heads do not divide": Case(
        "distil",
        "--student_width 10: 3 attention heads do not divide it",
        options="--student_model= --student_layers 2 --student_width 10",
    ),
    "no width": Case("distil", "invalid int value: 'wide'", options="--student_width wide"),
    "too narrow": Case(
        "distil",
        "--student_width 0: must be at least 1",
        options="--student_model= --student_layers 2 --student_width 0",
    ),
    "too wide": Case(
        "distil",
        "--student_width 27: the teacher is only 24 wide",
        options="--student_model= --student_layers 2 --student_width 27",
    ),
    "too many layers for a narrow student": Case(
        "distil",
        "--student_layers 5: the teacher has 4 layers",
        options="--student_model= --student_layers 5 --student_width 12",
    ),
    "heads that cannot be compared": Case(
        "distil",
        "the student has 2 attention heads and the teacher 3",
        options="--student_model= --student_layers 2 --student_width 12 --student_heads 2 --student_start random",
    ),
    "an unknown start": Case(
        "distil",
        "invalid choice: 'best'",
        options="--student_model= --student_layers 2 --student_start best",
    ),
    "widths": Case("distil", "--projection none: the student is 12 wide, the teacher 24", options="--projection none"),
    "mapping": Case(
        "distil",
        "--layer_mapping skip: leaves a student's last layer to the predictions, and this one has no other",
        bert("student", None, num_hidden_layers=1),
        "--layer_mapping skip",
    ),
    "unknown mapping": Case("distil", "invalid choice: 'emb'", options="--layer_mapping emb"),
    "temperature": Case("distil", "--T 0.0: must be above 0", options="--T 0"),
    "temperature of the costs": Case("distil", "--T_emd -1.0: must be above 0", options="--T_emd -1"),
    "alpha": Case("distil", "--alpha 1.5: must be from 0 to 1", options="--alpha 1.5"),
    "beta": Case("distil", "--beta -1.0: must be 0 or more", options="--beta -1"),
    "no loss left": Case("distil", "no loss is left to train with", options="--one_step False --layer_mapping none"),
    "label smoothing": Case(
        "distil",
        "--label_smoothing_factor: is not supported in distillation",
        options="--label_smoothing_factor 0.1",
    ),
    "gradient checkpointing": Case(
        "distil", "--activation_checkpointing: is not supported in distillation", options="--gradient_checkpointing"
    ),
    "padding": Case(
        "distil",
        "--count_padding: needs --pad_to_max_length",
        options="--objective published --count_padding",
    ),
    "padding without units": Case(
        "distil",
        "--count_padding: needs --objective published",
        options="--pad_to_max_length --count_padding",
    ),
    "a recipe's padding": Case(
        "distil",
        "--count_padding: needs --pad_to_max_length",
        options="--recipe authors-2022 --pad_to_max_length False",
    ),
    # Output
    "output below a file": Case(
        BOTH, "--output_dir {w}/file/out: {w}/file is a file, not a folder", options="--output_dir {w}/file/out"
    ),
    "output is a file": Case(
        BOTH, "--output_dir {w}/file: {w}/file is a file, not a folder", options="--output_dir {w}/file"
    ),
    "output holds the input": Case(
        "distil", "--output_dir {w}: {w}/teacher is also read from", options="--output_dir {w}"
    ),
    "output is input": Case(
        "distil",
        "--output_dir {w}/teacher: {w}/teacher is also read from; choose another folder",
        options="--output_dir {w}/teacher",
    ),
    "output is the model": Case(
        "finetune",
        "--output_dir {w}/pretrained: {w}/pretrained is also read from",
        options="--output_dir {w}/pretrained",
    ),
    "output in a locked folder": Case(
        BOTH,
        "--output_dir {w}/locked/out: {w}/locked/out: Permission denied",
        unwritable("locked"),
        "--output_dir {w}/locked/out",
    ),
    "a locked output": Case(BOTH, "{w}/locked/", unwritable("locked"), "--output_dir {w}/locked"),
    "output where no folder can be": Case(
        BOTH, "--output_dir /proc/nowhere: /proc/nowhere: No such file", options="--output_dir /proc/nowhere"
    ),
    # The conversion of TensorFlow's release; more of its configuration and vocabulary in the converter's own tests
    "no release": Case("convert", "{w}/no.index: no such file", options="--tf_checkpoint_path {w}/no"),
    "no checkpoint in the folder": Case(
        "convert",
        "{w}/release: needs one .index file, found none",
        missing("release/bert_model.ckpt.index"),
    ),
    "index cut": Case("convert", "bert_model.ckpt.index: damaged, cut short", cut("release/bert_model.ckpt.index")),
    "index empty": Case("convert", "bert_model.ckpt.index: damaged", holds("release/bert_model.ckpt.index", b"")),
    "index a folder": Case(
        "convert", "{w}/release/bert_model.ckpt.index: Is a directory", folder("release/bert_model.ckpt.index")
    ),
    "index unreadable": Case(
        "convert",
        "{w}/release/bert_model.ckpt.index: Permission denied",
        unreadable("release/bert_model.ckpt.index"),
    ),
    "data missing": Case(
        "convert",
        "{w}/release/bert_model.ckpt.data-00000-of-00001: variable 'bert/",
        missing("release/bert_model.ckpt.data-00000-of-00001"),
    ),
    "data cut": Case(
        "convert",
        "{w}/release/bert_model.ckpt.data-00000-of-00001: variable 'bert/",
        cut("release/bert_model.ckpt.data-00000-of-00001"),
    ),
    "data unreadable": Case(
        "convert",
        "{w}/release/bert_model.ckpt.data-00000-of-00001: variable 'bert/",
        unreadable("release/bert_model.ckpt.data-00000-of-00001"),
    ),
    "release's configuration missing": Case(
        "convert", "{w}/release/bert_config.json: no such file", missing("release/bert_config.json")
    ),
    "release's configuration cut": Case(
        "convert", "{w}/release/bert_config.json: not JSON", cut("release/bert_config.json")
    ),
    "release's configuration unreadable": Case(
        "convert", "{w}/release/bert_config.json: Permission denied", unreadable("release/bert_config.json")
    ),
    "release's width as text": Case(
        "convert",
        "{w}/release/bert_config.json: 'hidden_size' is '16', should be a whole number from 1",
        settings("release/bert_config.json", hidden_size="16"),
    ),
    "release's vocabulary in UTF-16": Case(
        "convert", "{w}/release/vocab.txt: not UTF-8", encoded("release/vocab.txt", "utf-16")
    ),
    "release's vocabulary in Latin-1": Case(
        "convert", "{w}/release/vocab.txt: not UTF-8", encoded("release/vocab.txt", "latin-1")
    ),
    "release's vocabulary unreadable": Case(
        "convert", "{w}/release/vocab.txt: Permission denied", unreadable("release/vocab.txt")
    ),
    "dump below a file": Case(
        "convert", "{w}/file/dump: cannot be written: Not a directory", options="--pytorch_dump_path {w}/file/dump"
    ),
    "dump is a file": Case("convert", "{w}/file: not a folder", options="--pytorch_dump_path {w}/file"),
    "dump in a locked folder": Case(
        "convert",
        "{w}/locked/dump: cannot be written: Permission denied",
        unwritable("locked"),
        "--pytorch_dump_path {w}/locked/dump",
    ),
    "dump onto other files": Case(
        "convert", "{w}/data: holds 'dev.tsv'", options="--pytorch_dump_path {w}/data --overwrite"
    ),
    "conversion's casing": Case("convert", "invalid choice: 'perhaps'", options="--do_lower_case perhaps"),
    # The downloader; what its server gives is in its own tests
    "unknown data set": Case("download", "--tasks: unknown 'snli'", options="--tasks SNLI"),
    "no address": Case("download", "--base_url: 'ftp://x' is not an http(s) address", options="--base_url ftp://x"),
    "unreadable file to check": Case(
        "download", "{w}/glue_data/RTE/train.tsv: Permission denied", unreadable("glue_data/RTE/train.tsv")
    ),
    "locked data folder": Case(
        "download",
        "{w}/locked/RTE: Permission denied",
        unwritable("locked"),
        "--data_dir {w}/locked",
    ),
    # The quickstart
    "quickstart's seed": Case("quickstart", "argument --seed: invalid int value: 'x'", options="--seed x"),
    "quickstart's output a file": Case("quickstart", "{w}/file/data: Not a directory", options="--output_dir {w}/file"),
    "quickstart's output locked": Case(
        "quickstart", "{w}/locked/data: Permission denied", unwritable("locked"), "--output_dir {w}/locked"
    ),
    "quickstart's text unreadable": Case("quickstart", "{w}/rated.txt: Permission denied", unreadable("rated.txt")),
    # All
    "an unknown option": Case(EVERY, "unrecognized arguments: --no_such_option", options="--no_such_option"),
}


@pytest.mark.parametrize(("script", "name"), [(s, name) for name, case in CASES.items() for s in case.scripts.split()])
def test_bad_input(script, name, world, exits_with_2):
    case = CASES[name]
    case.damage(world)
    before = snapshot(world)
    with permissions_apply():
        line = exits_with_2(SCRIPTS[script][0], *command(script, world, case.options))
    assert case.message.format(w=world) in line
    assert snapshot(world) == before


REQUIRED = {
    "--task_name": "give --task_name with --data_dir, or --train_file, --validation_file and --test_file",
    "--data_dir": "--data_dir is missing",
}


@pytest.mark.parametrize("missing", REQUIRED)
@pytest.mark.parametrize("script", BOTH.split())
def test_required_options(script, missing, world, exits_with_2):
    words = command(script, world)
    at = words.index(missing)
    line = exits_with_2(SCRIPTS[script][0], *words[:at], *words[at + 2 :])
    assert REQUIRED[missing] in line


def test_nothing_to_do(world, exits_with_2):
    words = [word for word in command("finetune", world) if word != "--do_train"]
    assert "nothing to do: give --do_train, --do_eval or --do_predict" in exits_with_2(finetune, *words)
    words = command("distil", world)[2:]
    assert "--teacher_model is missing" in exits_with_2(distil, *words)


@pytest.mark.training
@pytest.mark.parametrize("script", BOTH.split())
def test_output_folder_that_holds_a_run(script, world, exits_with_2):
    main, words = SCRIPTS[script][0], command(script, world, "--max_steps 1")
    (world / "out").mkdir()
    (world / "out" / "notes.txt").write_text("mine")
    main(words)
    before = snapshot(world)
    line = exits_with_2(main, *words)
    assert "already holds a run; choose another folder, or give --overwrite_output_dir" in line
    line = exits_with_2(main, *words, "--overwrite_output_dir", "--dataloader_drop_last", "--train_batch_size", 25)
    assert "fewer than a batch of 25" in line
    assert snapshot(world) == before
    main([*words, "--overwrite_output_dir"])
    assert (world / "out" / "notes.txt").read_text() == "mine"
    assert len(list((world / "out/runs").iterdir())) == 1


@pytest.mark.training
@pytest.mark.parametrize("script", BOTH.split())
def test_damaged_checkpoints(script, world, exits_with_2):
    """A checkpoint that was completed, and is not whole any more."""
    main = SCRIPTS[script][0]
    main(command(script, world, "--max_steps 1 --save_steps 1"))
    checkpoint = world / "out" / "checkpoint-1"
    words = command(script, world, "--max_steps 2 --save_steps 1 --resume_from_checkpoint {w}/out/checkpoint-1")
    names = ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"]
    for name in [*names, *(["distillation.safetensors", "flows.npz"] if script == "distil" else [])]:
        whole = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(whole[: len(whole) // 2])
        before = snapshot(checkpoint)
        line = exits_with_2(main, *words)
        assert f"error: --resume_from_checkpoint {checkpoint}: its {name} is damaged" in line
        assert snapshot(checkpoint) == before
        (checkpoint / name).write_bytes(whole)
    main(words)


# When the disk is full


@dataclass(frozen=True)
class FullDisk:
    """The function during which no file can grow beyond `limit` bytes, and what the line names."""

    script: str
    function: str
    named: str
    limit: int = 40
    options: str = ""


FULL_DISKS = {
    "the run's description": FullDisk("finetune", "bert_finetune.outputs.write_json", "{w}/out/args.json"),
    "a checkpoint's weights": FullDisk(
        "finetune", "bert_finetune.training.TaskTrainer._save_checkpoint", "{w}/out/checkpoint-1", 20_000
    ),
    "a checkpoint's optimizer": FullDisk(
        "distil", "transformers.Trainer._save_optimizer_and_scheduler", "{w}/out/checkpoint-1", 20_000
    ),
    "a checkpoint's flows": FullDisk(
        "distil", "bert_emd.history.LayerHistory.save", "{w}/out/.saving-checkpoint-1/checkpoint-1/flows.npz"
    ),
    "a checkpoint's state": FullDisk(
        "distil", "transformers.trainer_callback.TrainerState.save_to_json", "{w}/out/checkpoint-1"
    ),
    "the log": FullDisk(
        "finetune",
        "transformers.Trainer._inner_training_loop",
        "{w}/out/runs",
        200,
        "--logging_steps 1 --save_strategy no --max_steps 9",
    ),
    "the finished model": FullDisk("finetune", "bert_finetune.finishing.save_classifier", "{w}/out", 20_000),
    "a checkpoint's tokenizer": FullDisk(
        "distil", "transformers.BertTokenizer.save_pretrained", "{w}/out/checkpoint-1", 500
    ),
    "the results": FullDisk("distil", "bert_finetune.finishing.write_eval_results", "{w}/out/eval_results.json"),
    "the layer weights": FullDisk("distil", "bert_emd.history.LayerHistory.write_weights", "{w}/out/layer_weights.csv"),
    "a picture": FullDisk("distil", "bert_emd.pictures.save_picture", "{w}/out/flow.png"),
    "the predictions": FullDisk(
        "finetune", "bert_finetune.finishing.write_atomically", "{w}/out/RTE.tsv", options="--do_predict"
    ),
    "the converted weights": FullDisk("convert", "transformers.PreTrainedModel.save_pretrained", "{w}/dump", 2_000),
    "the converted tokenizer": FullDisk("convert", "transformers.BertTokenizer.save_pretrained", "{w}/dump", 500),
    "the converted vocabulary": FullDisk("convert", "shutil.copyfile", "{w}/dump"),
    "the quickstart's data": FullDisk("quickstart", "quickstart.write_task", "{w}/quickstart/data/dev.tsv"),
}


@pytest.mark.training
@pytest.mark.draws
@pytest.mark.parametrize("name", FULL_DISKS)
def test_full_disk(name, world, exits_with_2, monkeypatch):
    case = FULL_DISKS[name]
    original = resolve_name(case.function)

    def on_a_full_disk(*args, **kwargs):
        with full_disk(case.limit):
            return original(*args, **kwargs)

    train = "--max_steps 1 --save_steps 1" if case.script in BOTH else ""
    words = command(case.script, world, f"{train} {case.options}")
    before = snapshot(world)
    with monkeypatch.context() as patch:
        patch.setattr(case.function, on_a_full_disk)
        line = exits_with_2(SCRIPTS[case.script][0], *words)
    assert f"error: {case.named.format(w=world)}: cannot be written: " in line
    after = snapshot(world)
    assert before.items() <= after.items()
    # Nothing is left half-written: no file aside, and what has its final name is whole.
    new = [path for path in after if path not in before]
    assert not [path for path in new if Path(path).name.startswith(".")]
    assert case.named in ("{w}/out", "{w}/out/runs") or case.named.removeprefix("{w}/") not in new
    for checkpoint in (world / "out").glob("checkpoint-*"):
        json.loads((checkpoint / "trainer_state.json").read_text())
    if (world / "out" / "model.safetensors").exists():
        load_classifier(str(world / "out"), get_task("RTE"), "--output_dir", fine_tuned=True)


# When the user, or the system, ends a run

INTERRUPTED = {  # where Ctrl-C comes, at which call of a function, and what the line says
    "training": (
        *("finetune", "bert_finetune.training.TaskTrainer.training_step", 3),
        "goes on from {w}/out/checkpoint-2",
    ),
    "saving": ("finetune", "transformers.Trainer._save_rng_state", 2, "goes on from {w}/out/checkpoint-2"),
    "finishing": ("distil", "bert_finetune.finishing.write_eval_results", 1, "goes on from {w}/out/checkpoint-5"),
    "the first step": ("distil", "bert_emd.trainer.DistillationTrainer.compute_loss", 1, "there is no checkpoint yet"),
    "tokenising": ("distil", "bert_finetune.data.tokenize", 1, "interrupted"),
    "converting": ("convert", "transformers.PreTrainedModel.save_pretrained", 1, "interrupted"),
    "fetching": ("download", "download_glue_data.download", 1, "interrupted; the same command goes on from here"),
    "the quickstart": ("quickstart", "quickstart.run", 1, "interrupted"),
}


@pytest.mark.training
@pytest.mark.parametrize("name", INTERRUPTED)
def test_interrupted(name, world, capsys, monkeypatch):
    script, function, call, message = INTERRUPTED[name]
    original, calls = resolve_name(function), iter(range(1, 1000))

    def interrupted(*args, **kwargs):
        if next(calls) == call:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(function, interrupted)
    train = "--max_steps 5 --save_steps 2" if script in BOTH else ""
    before = snapshot(world)
    with pytest.raises(SystemExit) as exit_info:
        SCRIPTS[script][0](command(script, world, train))
    assert exit_info.value.code == 130
    said = capsys.readouterr().err
    assert said.count(": interrupted") == 1 and "Traceback" not in said
    assert message.format(w=world) in said.splitlines()[-1]
    after = snapshot(world)
    assert before.items() <= after.items()
    assert "dump" not in after and "out/checkpoint-4" not in after
    if name == "saving":
        SCRIPTS[script][0](command(script, world, f"{train} --resume_from_checkpoint"))


def test_ctrl_c_in_a_real_process(world):
    """The signal itself, sent to a downloader whose server does not answer."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        process = subprocess.Popen(
            [sys.executable, ROOT / "download_glue_data.py", *command("download", world, f"--base_url {address}")],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"NO_PROXY": "127.0.0.1"},
            # A shell's background job ignores it, and so would what that starts.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        server.settimeout(60)
        connection, _ = server.accept()
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[1]
        connection.close()
    assert (process.returncode, said) == (
        130,
        "download_glue_data.py: interrupted; the same command goes on from here\n",
    )


def save_a_model(world: Path) -> None:
    model = load_classifier(str(world / "teacher"), get_task("RTE"), "--teacher_model", fine_tuned=True)
    save_classifier(model, load_tokenizer(str(world / "teacher"), "--teacher_model"), world / "pretrained")


KILLED = {
    "a text file": lambda w: write_atomically(w / "file", "new " * 100),
    "a model": save_a_model,
    "a conversion": lambda w: tf_conversion.convert_tf_checkpoint_to_pytorch(
        w / "release", None, w / "dump", do_lower_case=False, overwrite=True
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", KILLED)
def test_killed_while_writing(name, world):
    """The process dies in mid-file, at different sizes, then before each of its renames: a file has all of its old
    content, or all of its new. Between its two renames a conversion's old folder is beside its place."""
    if name == "a conversion":
        tf_conversion.convert_tf_checkpoint_to_pytorch(world / "release", None, world / "dump")
    old = snapshot(world)
    moments = [*({"size": size} for size in (0, 100, 1_000)), *({"rename": number} for number in range(20))]
    states = []
    for moment in moments:
        died = dies(lambda: KILLED[name](world), **moment)
        states.append({path: content for path, content in snapshot(world).items() if not hidden(path)})
        if "rename" in moment and not died:
            break
    new = states[-1]
    assert len(states) > 4 and not died and new != old
    for state in states:
        assert old.keys() <= state.keys() or name == "a conversion"
        assert all(content in (old.get(path), new.get(path)) for path, content in state.items())


def hidden(path: str) -> bool:
    return any(part.startswith(".") for part in Path(path).parts)


@pytest.mark.training
@pytest.mark.parametrize("script", BOTH.split())
@pytest.mark.parametrize("broken_by", [5, 6])  # between two checkpoints; just before one is due
def test_nan_stops_the_run_and_keeps_the_last_good_checkpoint(script, broken_by, world, exits_with_2, monkeypatch):
    original = QuietProgress.on_step_end

    def diverge(self, args, state, control, model=None, **kwargs):
        # The step's update leaves weights beyond what float32 holds, as a learning rate that is far too high does.
        if state.global_step == broken_by:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1e38)
        original(self, args, state, control, **kwargs)

    monkeypatch.setattr(QuietProgress, "on_step_end", diverge)
    words = command(script, world, "--save_steps 2 --train_batch_size 4 --num_train_epochs 3")
    line = exits_with_2(SCRIPTS[script][0], *words)
    assert "at step 6; nothing was saved after it" in line
    assert f"the last good checkpoint is {world / 'out' / 'checkpoint-4'}" in line
    assert not (world / "out" / "model.safetensors").exists()
    assert not (world / "out" / "checkpoint-6").exists()
    weights = load_file(world / "out" / "checkpoint-4" / "model.safetensors")
    assert all(torch.isfinite(value).all() for value in weights.values())


@pytest.mark.training
def test_a_learning_rate_far_too_high(world, exits_with_2):
    line = exits_with_2(distil, *command("distil", world, "--learning_rate 1e30 --warmup_steps 0"))
    assert "not finite" in line or "loss is" in line
    # Nothing of it stands in the way of the corrected command.
    distil(command("distil", world, "--max_steps 1"))
