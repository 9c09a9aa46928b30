"""Students as ONNX graphs: they compute what PyTorch does, or are not written."""

import json
import shutil
import sys

import numpy as np
import onnx
import pytest
import torch
from conftest import save_bert
from glue_files import rows, write_task
from mishaps import full_disk, snapshot
from test_narrow_student import SIZES, TEACHERS, VOCABULARY
from transformers import AutoModelForSequenceClassification, BertTokenizer

from bert_emd.emd_task_distill import main as distil
from bert_finetune.glue import get_task
from deploy import export as exporting
from deploy import graph as graphs
from deploy.classify import Classifier
from deploy.export_student import main

# On one worker, which makes its exports once.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("exports")]

RTE = get_task("RTE").kind.output_names
ARCHITECTURES = {name: TEACHERS[name] for name in ("BERT", "DistilBERT", "RoBERTa", "ELECTRA")} | {
    "MiniLM": (
        *TEACHERS["BERT"][:2],
        {"hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536, "initializer_range": 0.05},
    ),
}


def save(folder, architecture="BERT", names=RTE):
    """A classifier with random weights, large enough that its answers differ."""
    model, config, changes = ARCHITECTURES[architecture]
    sizes = SIZES | {"num_hidden_layers": 2, "initializer_range": 0.2, "max_position_embeddings": 66} | changes
    torch.manual_seed(3)
    config = config(**sizes, id2label=dict(enumerate(names)), label2id={name: k for k, name in enumerate(names)})
    model(config).save_pretrained(folder)
    BertTokenizer(vocab={word: k for k, word in enumerate(VOCABULARY)}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_task(tmp_path_factory.mktemp("data") / "RTE", "RTE", dev=20)


def command(model, data, *more):
    task = ["--task_name", "RTE", "--data_dir", data, "--max_seq_length", 32]
    return [str(word) for word in ("--model", model, *task, *more)]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def exported(request, data, tmp_path_factory):
    """The folder of a student with its export in it."""
    folder = save(tmp_path_factory.mktemp("students") / "student", request.param)
    main(command(folder, data, "--max_drop", 100))
    return folder


def test_one_file_with_named_axes_for_all_shapes(exported):
    assert {path.name for path in (exported / "onnx").iterdir()} == {
        *("model.onnx", "model_quantized.onnx", "config.json", "tokenizer.json", "tokenizer_config.json"),
        "export.json",
    }
    graph = onnx.load(exported / "onnx/model.onnx").graph
    axes = {
        value.name: [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    model = AutoModelForSequenceClassification.from_pretrained(exported).eval()
    typed = model.config.model_type != "distilbert"
    inputs = {"input_ids", "attention_mask"} | ({"token_type_ids"} if typed else set())
    assert axes == {name: ["batch", "sequence"] for name in inputs} | {"logits": ["batch", 2]}
    graph = graphs.open_graph(exported / "onnx/model.onnx")
    for rows_, length in ((1, 1), (5, 3), (2, 64)):
        given = graphs.made_up_inputs(model, sorted(inputs), rows_, length)
        with torch.no_grad():
            expected = model(**given).logits.numpy()
        np.testing.assert_allclose(graph(given), expected, atol=1e-5)


def test_what_it_says_of_itself(exported):
    said = json.loads((exported / "onnx/export.json").read_text())
    assert said["largest_difference"] < 1e-5 and said["task"] == "RTE" and said["max_seq_length"] == 32
    assert said["figures"]["torch"] == pytest.approx(said["figures"]["float"])
    assert said["figures"]["float"]["eval_student_agreement"] == 1
    assert said["figures"]["int8"]["eval_student_agreement"] > 0.7
    assert set(said["sha256"]) == {path.name for path in (exported / "onnx").iterdir()} - {"export.json"}
    assert said["megabytes"]["int8"] < said["megabytes"]["float"]
    assert set(said["milliseconds"]) == {"torch", "float", "int8"} and min(said["milliseconds"].values()) > 0
    assert str(exported.parent) not in said["command"]


def test_classes_and_probabilities_are_those_of_pytorch(exported):
    pairs = [(row[1], row[2]) for row in rows("RTE", "dev", 20)]
    classify = Classifier(exported / "onnx", file="model.onnx", threads=1)
    answers = classify(pairs, batch_size=3)
    model = AutoModelForSequenceClassification.from_pretrained(exported).eval()
    tokenizer = BertTokenizer.from_pretrained(exported)
    for pair, answer in zip(pairs, answers, strict=True):
        inputs = tokenizer(*pair, return_tensors="pt")
        if model.config.model_type == "distilbert":
            inputs.pop("token_type_ids", None)
        with torch.no_grad():
            expected = model(**inputs).logits.softmax(1)[0]
        assert [answer["probabilities"][name] for name in RTE] == pytest.approx(expected.tolist(), abs=1e-5)
        assert answer["label"] == RTE[int(expected.argmax())]


@pytest.mark.training
def test_a_run_s_student_knows_its_task_and_its_teacher(teacher, glue_dir, tmp_path, capsys):
    out = tmp_path / "student"
    shape = ["--student_layers", 1, "--student_width", 12, "--num_train_epochs", 1, "--max_seq_length", 32]
    argv = ["--teacher_model", teacher, *shape, "--task_name", "RTE", "--data_dir", glue_dir, "--output_dir", out]
    distil([str(word) for word in argv])
    trained = json.loads((out / "eval_results.json").read_text())
    main(["--model", str(out), "--data_dir", str(glue_dir), "--max_drop", "100"])
    said = json.loads((out / "onnx/export.json").read_text())
    for name in ("accuracy", "agreement", "divergence"):
        assert said["figures"]["float"][f"eval_{name}"] == pytest.approx(trained[f"eval_{name}"], abs=1e-5)
    assert (said["task"], said["max_seq_length"]) == ("RTE", 32)
    assert f"exported into {out / 'onnx'}: config.json, export.json, model.onnx" in capsys.readouterr().out
    figures = said["figures"]["int8"]
    card = (out / "README.md").read_text()
    assert card.count("## Exported") == 1 and card.index("## Exported to ONNX") < card.index("## How it was made")
    row = next(line for line in card.splitlines() if line.startswith("| `model_quantized.onnx` |"))
    assert f"| {figures['eval_accuracy']:.4f} |" in row and f"| {figures['eval_divergence']:.4f} |" in row
    assert f"| {said['megabytes']['int8']:.1f} | {said['milliseconds']['int8']:.2f} |" in row

    # Once more, and as an OpenVINO model: each has a section.
    main(["--model", str(out), "--data_dir", str(glue_dir), "--max_drop", "100"])
    main(["--model", str(out), "--data_dir", str(glue_dir), "--format", "openvino"])
    card = (out / "README.md").read_text()
    assert card.count("## Exported to ONNX") == card.count("## Exported to OpenVINO") == 1
    assert card.count("| `openvino_model.xml` |") == card.count("| `model_quantized.onnx` |") == 1
    assert card.count("## How it was made") == card.count("## Use") == 1
    in_torch, in_openvino = json.loads((out / "openvino/export.json").read_text())["figures"].values()
    assert in_torch == pytest.approx(in_openvino, abs=1e-5)
    pairs = [(row[1], row[2]) for row in rows("RTE", "dev", 12)]
    answers = [Classifier(out / folder, file)(pairs) for folder, file in (("onnx", "model.onnx"), ("openvino", None))]
    for ours, theirs in zip(*answers, strict=True):
        assert ours["probabilities"] == pytest.approx(theirs["probabilities"], abs=1e-5)


@pytest.fixture(scope="module")
def graph_of_bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("graph")
    student = AutoModelForSequenceClassification.from_pretrained(save(folder)).eval()
    names = ["input_ids", "attention_mask", "token_type_ids"]
    return folder / "model.onnx", exporting.write_onnx(student, names, folder / "model.onnx")


@pytest.fixture
def traced(graph_of_bert, monkeypatch):
    """Tracing takes seconds, and gives the same graph for each student of `save`."""
    path, opset = graph_of_bert
    monkeypatch.setattr(exporting, "write_onnx", lambda model, names, to: shutil.copy(path, to) and opset)


def figures_that_fall(monkeypatch, drops):
    """int8 loses so many points, one way after the other."""
    left, ways, quantize = list(drops), [], exporting.quantize
    monkeypatch.setattr(exporting, "_drop", lambda *_: left.pop(0))
    monkeypatch.setattr(exporting, "quantize", lambda *args: ways.append(args[2]) or quantize(*args))
    return ways


def test_finer_ways_are_tried_where_int8_loses_too_much(traced, data, tmp_path, monkeypatch, capsys):
    student = save(tmp_path / "student")
    ways = figures_that_fall(monkeypatch, [3, 2, 1])
    main(command(student, data))
    assert [(way.per_channel, way.kept) for way in ways] == [(False, False), (True, False), (True, True)]
    said = json.loads((student / "onnx/export.json").read_text())
    assert said["quantization"] == "a scale for each channel, embeddings and head in float"
    assert capsys.readouterr().err.count("accuracy falls by") == 2
    graph = onnx.load(student / "onnx/model_quantized.onnx").graph
    weights = {tensor.name: tensor.data_type for tensor in graph.initializer}
    (embeddings,) = (name for name in weights if name.endswith("word_embeddings.weight"))
    assert weights[embeddings] == onnx.TensorProto.FLOAT
    assert onnx.TensorProto.INT8 in weights.values()

    ways = figures_that_fall(monkeypatch, [3, 0])
    main(command(student, data, "--per_channel"))
    assert [(way.per_channel, way.kept) for way in ways] == [(True, False), (True, True)]


def test_where_int8_never_does_the_float_model_stays(traced, data, tmp_path, monkeypatch, capsys):
    student = save(tmp_path / "student")
    figures_that_fall(monkeypatch, [3, 2, 1.5])
    with pytest.raises(SystemExit) as exit_info:
        main(command(student, data))
    assert exit_info.value.code == 1
    assert "int8 loses too much in every way: only model.onnx is kept" in capsys.readouterr().err
    assert {"model.onnx", "config.json"} < {path.name for path in (student / "onnx").iterdir()}
    assert not (student / "onnx/model_quantized.onnx").exists()
    said = json.loads((student / "onnx/export.json").read_text())
    assert said["quantization"] is None and "int8" not in said["figures"]


BAD = {
    "no such folder": (["--model", "{w}/nothing"], "--output_dir is missing: {w}/nothing is no folder"),
    "no classifier": (["--model", "{w}/bare"], "--model {w}/bare: not a fine-tuned classifier"),
    "no dev set": (["--data_dir", "{w}/empty"], "{w}/empty/dev.tsv: no such file"),
    "other labels": (
        ["--task_name", "", "--validation_file", "{w}/other.csv", "--text_column", "text"],
        "its labels (maybe, surely) are not the model's classes (entailment, not_entailment)",
    ),
    "a training file": (["--train_file", "x.csv"], "--train_file and --test_file: have no place here"),
    "too long": (["--max_seq_length", "400"], "--max_seq_length 400: the model has only 66 positions"),
    "a folder that is no export": (["--output_dir", "{w}/empty"], "{w}/empty: is there already, and no export"),
    "a negative drop": (["--max_drop", "-1"], "--max_drop -1.0: must be 0 or more points"),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Models and files that a test may only look at."""
    folder = tmp_path_factory.mktemp("world")
    save(folder / "student")
    save_bert(folder / "bare", None)
    save(folder / "nameless", names=["LABEL_0", "LABEL_1"])
    (folder / "empty").mkdir()
    (folder / "other.csv").write_text("text,label\nthe cat,surely\nthe dog,maybe\n")
    return folder


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, world, data, exits_with_2):
    options, said = BAD[case]
    before = snapshot(world)
    words = [word.format(w=world) for word in options]
    line = exits_with_2(main, *command(world / "student", data), *words)
    assert said.format(w=world) in line
    assert snapshot(world) == before


def test_names_that_are_missing_and_given(traced, world, data, tmp_path, exits_with_2):
    rows_ = "".join(f"{text},{k}\n" for k, text in enumerate(["the cat", "the dog"]))
    (tmp_path / "dev.csv").write_text("text,label\n" + rows_)
    own = ["--model", world / "nameless", "--validation_file", tmp_path / "dev.csv", "--max_seq_length", 32]
    own += ["--output_dir", tmp_path / "onnx", "--max_drop", 100]
    assert "its classes have no names; give them in their order with --class_names" in exits_with_2(main, *own)
    (tmp_path / "dev.csv").write_text("text,label\nthe cat,bad\nthe dog,good\n")
    main([*map(str, own), "--class_names", "bad,good"])
    assert Classifier(tmp_path / "onnx").names == ["bad", "good"]


def test_what_is_remembered_of_a_training_fits_the_file(traced, world, tmp_path):
    """A delimiter is of .csv files, and this dev set is none; the precision of the training is no option here."""
    student = shutil.copytree(world / "student", tmp_path / "student")
    options = {"delimiter": ";", "text_column": "said", "label_column": "is", "max_seq_length": 24, "bf16": True}
    (student / "args.json").write_text(json.dumps({"options": options}))
    (tmp_path / "dev.tsv").write_text("is\tsaid\nentailment\tthe cat\nnot_entailment\tthe dog\n")
    main(["--model", str(student), "--validation_file", str(tmp_path / "dev.tsv"), "--max_drop", "100"])
    said = json.loads((student / "onnx/export.json").read_text())
    assert (said["max_seq_length"], said["text_columns"]) == (24, ["said"])


def test_a_model_that_reads_any_length_is_tried_with_one_that_it_can(traced, world, data, tmp_path, monkeypatch):
    """As XLNet, whose positions have no end."""
    tried = []
    monkeypatch.setattr(exporting, "longest_input", lambda model: sys.maxsize)
    monkeypatch.setattr(exporting, "check_length", lambda *_: None)
    monkeypatch.setattr(exporting, "largest_difference", lambda *args: tried.append(args[-1]) or 0.0)
    for length in (32, 600):
        more = "--max_seq_length", length, "--max_drop", 100, "--output_dir", tmp_path / f"{length}"
        main(command(world / "student", data, *more))
    assert tried == [512, 600]


def test_an_architecture_that_cannot_be_traced(world, data, monkeypatch, exits_with_2):
    def refused(*args, **kwargs):
        raise RuntimeError("an operator that nobody knows\nand much more")

    monkeypatch.setattr("torch.onnx.export", refused)
    line = exits_with_2(main, *command(world / "student", data))
    assert (
        "BertForSequenceClassification: cannot be traced to ONNX (an operator that nobody knows); students of" in line
    )


def test_a_graph_that_computes_something_else_is_not_written(traced, world, data, monkeypatch, exits_with_2):
    original = exporting.open_graph

    def wrong(path):
        graph = original(path)
        return lambda inputs: graph(inputs) + 2e-4

    monkeypatch.setattr(exporting, "open_graph", wrong)
    line = exits_with_2(main, *command(world / "student", data))
    assert "model.onnx: logits differ from PyTorch's by 2.0e-04, more than 1e-04" in line
    assert not (world / "student/onnx").exists()


def test_the_folder_appears_whole_or_not_at_all(traced, world, data, tmp_path, monkeypatch, exits_with_2, capsys):
    student = shutil.copytree(world / "student", tmp_path / "student")
    before, original = snapshot(student), exporting.quantize

    def on_a_full_disk(*args):
        with full_disk(1000):
            original(*args)

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(exporting, "quantize", on_a_full_disk)
    assert f"{student}/onnx: cannot be written: " in exits_with_2(main, *command(student, data))
    monkeypatch.setattr(exporting, "quantize", interrupted)
    with pytest.raises(SystemExit) as exit_info:
        main(command(student, data))
    assert exit_info.value.code == 130 and ": interrupted" in capsys.readouterr().err
    assert snapshot(student) == before

    # An export that is there stays until the next one is whole.
    monkeypatch.setattr(exporting, "quantize", original)
    main(command(student, data, "--max_drop", 100))
    whole = snapshot(student)
    monkeypatch.setattr(exporting, "quantize", interrupted)
    with pytest.raises(SystemExit):
        main(command(student, data))
    assert snapshot(student) == whole
    monkeypatch.setattr(exporting, "quantize", original)
    main(command(student, data, "--max_drop", 100))
    assert set(snapshot(student)) == set(whole)
