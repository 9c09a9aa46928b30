import json

import pytest
import torch
from conftest import save_bert
from safetensors.torch import save_file
from transformers import (
    AutoModelForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from bert_finetune.checkpoints import (
    load_classifier,
    load_config,
    load_tokenizer,
    read_weights,
    reorder_classes,
    save_classifier,
)
from bert_finetune.errors import InputError
from bert_finetune.glue import get_task

IDS = torch.tensor([[2, 10, 11, 3]])
SIZES = {"vocab_size": 60, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 32}


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits[0]


def test_classes_are_matched_by_name(tmp_path):
    # A teacher from elsewhere, in the hub's order.
    folder = save_bert(tmp_path / "mnli", ["Entailment", "neutral", "CONTRADICTION"])
    theirs = logits(AutoModelForSequenceClassification.from_pretrained(folder))
    model = load_classifier(str(folder), get_task("MNLI"), "--teacher_model", fine_tuned=True)
    torch.testing.assert_close(logits(model), theirs[[2, 0, 1]])
    assert model.config.id2label == {0: "contradiction", 1: "entailment", 2: "neutral"}


def test_labels_as_the_files_write_them_are_names_too(tmp_path):
    folder = save_bert(tmp_path / "sst", ["1", "0"])
    theirs = logits(AutoModelForSequenceClassification.from_pretrained(folder))
    model = load_classifier(str(folder), get_task("SST-2"), "--teacher_model", fine_tuned=True)
    torch.testing.assert_close(logits(model), theirs[[1, 0]])
    assert model.config.label2id == {"negative": 0, "positive": 1}


def test_unnamed_classes_are_taken_in_order_and_said_so(tmp_path, capsys):
    folder = save_bert(tmp_path / "mnli", ["LABEL_0", "LABEL_1", "LABEL_2"])
    theirs = logits(AutoModelForSequenceClassification.from_pretrained(folder))
    model = load_classifier(str(folder), get_task("MNLI"), "--teacher_model", fine_tuned=True)
    torch.testing.assert_close(logits(model), theirs)
    assert "taken to be in the order contradiction, entailment, neutral" in capsys.readouterr().out


@pytest.mark.parametrize(
    "model",
    [
        RobertaForSequenceClassification(RobertaConfig(**SIZES, num_labels=3)),
        ElectraForSequenceClassification(ElectraConfig(**SIZES, num_labels=3)),
        DistilBertForSequenceClassification(
            DistilBertConfig(vocab_size=60, dim=24, n_layers=2, n_heads=3, hidden_dim=32, num_labels=3)
        ),
    ],
    ids=lambda model: type(model).__name__,
)
def test_every_architecture_s_head_is_reordered(model):
    before = logits(model)
    reorder_classes(model, [2, 0, 1])
    torch.testing.assert_close(logits(model), before[[2, 0, 1]])


@pytest.mark.parametrize(
    ("names", "task", "message"),
    [
        (["yes", "no"], "RTE", r"its labels \(yes, no\) are not RTE's \(entailment, not_entailment\)"),
        (["a", "b", "c"], "RTE", r"its 3 labels \(a, b, c\) do not fit RTE"),
        (["entailment", "not_entailment"], "STS-B", "do not fit STS-B .one regression score"),
        (["score"], "SST-2", "its 1 labels"),
    ],
)
def test_a_teacher_for_another_task_is_refused(tmp_path, names, task, message):
    folder = save_bert(tmp_path / "teacher", names)
    with pytest.raises(InputError, match=message) as error:
        load_classifier(str(folder), get_task(task), "--teacher_model", fine_tuned=True)
    assert str(error.value).startswith(f"--teacher_model {folder}")


def test_a_teacher_without_a_head_is_refused(pretrained):
    with pytest.raises(InputError, match=r"not a fine-tuned classifier, it has no weights for .*classifier.weight"):
        load_classifier(str(pretrained), get_task("RTE"), "--teacher_model", fine_tuned=True)


def test_a_new_head_is_made_and_said_so(pretrained, teacher, capsys):
    model = load_classifier(str(pretrained), get_task("MNLI"), "--model_name_or_path")
    assert logits(model).shape == (3,) and "new weights for classifier.bias" in capsys.readouterr().out
    regressor = load_classifier(str(teacher), get_task("STS-B"), "--model_name_or_path")  # from a two-class head
    assert logits(regressor).shape == (1,) and regressor.config.problem_type == "regression"
    assert "new weights for classifier" in capsys.readouterr().out


def test_saving_and_loading_gives_the_same_model(tmp_path, teacher):
    model = load_classifier(str(teacher), get_task("RTE"), "--teacher_model", fine_tuned=True)
    save_classifier(model, load_tokenizer(str(teacher), "--teacher_model"), tmp_path / "out")
    loaded, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert torch.equal(logits(loaded), logits(model))
    assert not list((tmp_path / "out").glob(".*"))


def test_nothing_there(tmp_path):
    with pytest.raises(InputError, match=f"--teacher_model {tmp_path}/no: no such folder"):
        load_config(f"{tmp_path}/no", "--teacher_model")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"--teacher_model .*empty: cannot be loaded"):
        load_config(str(tmp_path / "empty"), "--teacher_model")


def test_damaged_weights(tmp_path, teacher):
    folder = save_bert(tmp_path / "teacher", ["entailment", "not_entailment"])
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"--teacher_model .*cannot be loaded"):
        load_classifier(str(folder), get_task("RTE"), "--teacher_model", fine_tuned=True)
    (folder / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"--teacher_model .*cannot be loaded"):
        load_config(str(folder), "--teacher_model")


@pytest.mark.parametrize("files", [["model.safetensors"], ["pytorch_model.bin"], ["a.safetensors", "b.safetensors"]])
def test_reading_some_weights(files, tmp_path):
    weights = {"x.weight": torch.ones(2), "x.bias": torch.zeros(2), "y.weight": torch.full((3,), 2.0)}
    parts = [weights] if len(files) == 1 else [{"x.weight": weights.pop("x.weight")}, weights]
    for name, part in zip(files, parts, strict=True):
        (torch.save if name.endswith(".bin") else save_file)(part, tmp_path / name)
    if len(files) > 1:
        index = {key: name for name, part in zip(files, parts, strict=True) for key in part}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    read = read_weights(str(tmp_path), lambda key: key.endswith("weight"))
    assert {key: value.tolist() for key, value in read.items()} == {"x.weight": [1, 1], "y.weight": [2, 2, 2]}
    assert read_weights(str(tmp_path), lambda key: key == "z") == {}


def test_a_model_without_a_vocabulary(tmp_path):
    # transformers reads it with the special tokens alone, and every word would be unknown.
    folder = save_bert(tmp_path / "model", None)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"--x .*model: has no vocabulary; it needs a tokenizer.json or vocab.txt"):
        load_tokenizer(str(folder), "--x")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"hidden_size": "wide"}, "Validation error for field 'hidden_size'"),
        ({"hidden_act": "unheard-of"}, "KeyError: 'unheard-of'"),
        ({"dtype": "unheard-of"}, "has no attribute 'unheard-of'"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "Loading an AWQ quantized model requires"),
    ],
)
def test_a_configuration_that_makes_no_model(tmp_path, settings, reason):
    folder = save_bert(tmp_path / "model", None)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))
    with pytest.raises(InputError, match=f"--x {folder}: cannot be loaded: .*{reason}"):
        load_classifier(str(folder), get_task("RTE"), "--x")


def test_lower_casing_follows_the_option(tmp_path):
    folder = save_bert(tmp_path / "cased", None, vocabulary=["Cat", "cat"])
    assert load_tokenizer(str(folder), "--x").tokenize("Cat") == ["cat"]
    assert load_tokenizer(str(folder), "--x", do_lower_case=False).tokenize("Cat") == ["Cat"]
    load_tokenizer(str(folder), "--x", do_lower_case=False).save_pretrained(tmp_path / "saved")
    assert load_tokenizer(str(tmp_path / "saved"), "--x").tokenize("Cat") == ["Cat"]


def test_label_names_are_saved(tmp_path, teacher):
    model = load_classifier(str(teacher), get_task("RTE"), "--teacher_model", fine_tuned=True)
    save_classifier(model, load_tokenizer(str(teacher), "--teacher_model"), tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["id2label"] == {
        "0": "entailment",
        "1": "not_entailment",
    }
