"""Models that are not what they seem: weights under other names, missing, left out or broken, classes unnamed."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import save_bert
from safetensors.torch import load_file, save_file
from transformers import (
    CONFIG_MAPPING,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForPreTraining,
    ElectraConfig,
    ElectraForPreTraining,
)

from bert_emd.emd_task_distill import main as distil
from bert_emd.student import stored_projections, student_from_teacher
from bert_finetune.checkpoints import (
    class_names,
    load_classifier,
    load_config,
    load_tokenizer,
    restore_weights,
    save_weights,
)
from bert_finetune.errors import InputError
from bert_finetune.glue import get_task
from bert_finetune.run_glue import main as run_glue

RTE = get_task("RTE")


def changed(model: Path, folder: Path, change) -> Path:
    """A copy of a model's folder whose weights are what `change` makes of them."""
    shutil.copytree(model, folder)
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors")
    return folder


def in_old_names(weights):
    names = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    renamed = {}
    for key, value in weights.items():
        for new, old in names.items():
            key = key.replace(new, old)
        renamed[key] = value
    assert any(key.endswith("gamma") for key in renamed)
    return renamed


def behind(prefix):
    return lambda weights: {f"{prefix}{key}": value for key, value in weights.items()}


def configured(folder: Path, **settings) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


def assert_same_weights(model, other):
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


# Old names


def test_old_names_are_read_and_not_written_again(teacher, tmp_path):
    control = load_classifier(str(teacher), RTE, "--x", fine_tuned=True)
    old = changed(teacher, tmp_path / "old", in_old_names)
    model = load_classifier(str(old), RTE, "--x", fine_tuned=True)
    assert_same_weights(model, control)
    save_weights(model, tmp_path / "saved")
    assert load_file(tmp_path / "saved/model.safetensors").keys() == model.state_dict().keys()
    # A checkpoint of a run that an earlier version began is gone on from.
    for folder in (old, tmp_path / "saved"):
        other = load_classifier(str(teacher), RTE, "--x", fine_tuned=True)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        restore_weights(other, folder)
        assert_same_weights(other, control)


@pytest.mark.parametrize("fault", ["missing", "unexpected", "of another shape"])
def test_weights_that_are_not_just_the_model_s_are_not_restored(fault, teacher, tmp_path):
    def change(weights):
        name = "bert.encoder.layer.1.output.LayerNorm.weight"
        value = weights.pop(name)
        return (
            weights
            | {"missing": {}, "unexpected": {name: value, "x": value + 1}, "of another shape": {name: value[1:]}}[fault]
        )

    folder = changed(teacher, tmp_path / "checkpoint", change)
    model = load_classifier(str(teacher), RTE, "--x", fine_tuned=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InputError, match=f"{folder}: "):
        restore_weights(model, folder)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "kind", ["modernbert", "nomic_bert", "gte", "jina_embeddings_v3", "deberta-v2", "eurobert", "esm"]
)
def test_other_renamings_lose_nothing(kind, tmp_path):
    sizes = {"vocab_size": 60, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 3, "sep_token_id": 4}
    config = CONFIG_MAPPING[kind](**sizes, intermediate_size=32, mask_token_id=5, **special)
    control = AutoModelForSequenceClassification.from_config(config)
    control.save_pretrained(tmp_path / "hub")  # under the names that the hub's models have
    model = load_classifier(str(tmp_path / "hub"), RTE, "--x", fine_tuned=True)
    student = student_from_teacher(model, [1, 3]) if kind != "esm" else model
    for number, saved in enumerate((model, student)):
        folder = tmp_path / str(number)
        save_weights(saved, folder)
        assert load_file(folder / "model.safetensors").keys() <= saved.state_dict().keys()
        assert_same_weights(load_classifier(str(folder), RTE, "--x", fine_tuned=True), saved)
        other = AutoModelForSequenceClassification.from_config(saved.config)
        restore_weights(other, folder)
        assert_same_weights(other, saved)
    restore_weights(other := AutoModelForSequenceClassification.from_config(config), tmp_path / "hub")
    assert_same_weights(other, control)


def test_a_layer_keeps_what_it_looks_at():
    sizes = {"vocab_size": 60, "hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 4}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 3, "sep_token_id": 4}
    config = CONFIG_MAPPING["modernbert"](**sizes, intermediate_size=32, **special)
    teacher = AutoModelForSequenceClassification.from_config(config)
    student = student_from_teacher(teacher, [1, 4])
    assert student.config.layer_types == [teacher.config.layer_types[k] for k in (0, 3)]
    with pytest.raises(InputError, match=r"--student_layers 2,4: the layers of ModernBert.* are not all alike"):
        student_from_teacher(teacher, [2, 4])


# Runs. The first checkpoint is the best one: at this rate, far too high, all rows get one answer, and the figure stays.

FEW = ["--max_seq_length", "32", "--train_batch_size", "8", "--max_steps", "4", "--eval_steps", "2", "--no_cuda"]
FEW += ["--learning_rate", "3e-2", "--save_total_limit", "5", "--report_to", "none"]
FEW += ["--lr_scheduler_type", "constant", "--warmup_steps", "0"]


def fine_tuned(model, glue_dir, out, *more):
    command = ["--model_name_or_path", model, "--task_name", "RTE", "--data_dir", glue_dir, "--do_train"]
    run_glue([str(part) for part in (*command, "--output_dir", out, *FEW, *more)])


def distilled(model, glue_dir, out, *more):
    command = ["--teacher_model", model, "--student_model", model, "--task_name", "RTE", "--data_dir", glue_dir]
    distil([str(part) for part in (*command, "--output_dir", out, *FEW, *more)])


@pytest.mark.training
@pytest.mark.parametrize("run", [fine_tuned, distilled])
def test_a_run_with_old_names_is_as_one_with_new_names(run, teacher, glue_dir, tmp_path):
    old = changed(teacher, tmp_path / "old", in_old_names)
    run(teacher, glue_dir, tmp_path / "control")
    run(old, glue_dir, tmp_path / "whole")
    # As if it had been killed after the first checkpoint.
    shutil.copytree(tmp_path / "whole/checkpoint-2", tmp_path / "resumed/checkpoint-2")
    run(old, glue_dir, tmp_path / "resumed", "--resume_from_checkpoint")
    control = json.loads((tmp_path / "control/eval_results.json").read_text())
    assert control["global_step"] == 2 and [entry["step"] for entry in control["history"]] == [2, 4]
    for name in ("whole", "resumed"):
        results = json.loads((tmp_path / name / "eval_results.json").read_text())
        assert results["history"] == control["history"] and results["eval_loss"] == control["eval_loss"]
        for file in ("model.safetensors", "checkpoint-2/model.safetensors", "checkpoint-4/model.safetensors"):
            ours, theirs = load_file(tmp_path / name / file), load_file(tmp_path / "control" / file)
            assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


# A prefix, and what else hides the weights


@pytest.mark.parametrize("prefix", ["module.", "model.", "_orig_mod.", "model.module."])
@pytest.mark.parametrize("fine_tuned", [True, False])
def test_one_prefix_before_all_names_is_left_out(prefix, fine_tuned, teacher, tmp_path, capsys):
    control = load_classifier(str(teacher), RTE, "--x", fine_tuned=True)
    folder = changed(teacher, tmp_path / "wrapped", behind(prefix))
    capsys.readouterr()
    model = load_classifier(str(folder), RTE, "--x", fine_tuned=fine_tuned)
    assert_same_weights(model, control)
    assert capsys.readouterr().out == f"{folder}: '{prefix}' before the names of all its weights is left out\n"
    assert model.config.name_or_path == str(folder)
    save_weights(model, tmp_path / "saved")
    assert load_file(tmp_path / "saved/model.safetensors").keys() == model.state_dict().keys()


def test_a_prefix_before_a_bare_encoder_with_old_names(pretrained, tmp_path, capsys):
    folder = changed(pretrained, tmp_path / "wrapped", lambda weights: behind("encoder.")(in_old_names(weights)))
    torch.manual_seed(0)
    model = load_classifier(str(folder), RTE, "--x")
    control = load_classifier(str(pretrained), RTE, "--x")
    assert_same_weights(model.bert, control.bert)
    assert "'encoder.' before the names" in capsys.readouterr().out


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "model."])
def test_the_weights_in_a_training_framework_s_checkpoint(key, prefix, teacher, tmp_path):
    control = load_classifier(str(teacher), RTE, "--x", fine_tuned=True)
    folder = tmp_path / "framework"
    shutil.copytree(teacher, folder)
    (folder / "model.safetensors").unlink()
    weights = {f"{prefix}{name}": value for name, value in control.state_dict().items()}
    weights |= {f"{prefix}fit_dense.weight": torch.ones(36, 24), f"{prefix}fit_dense.bias": torch.ones(36)}
    torch.save({key: weights, "epoch": 3, "optimizer": {"lr": 0.1}}, folder / "pytorch_model.bin")
    assert_same_weights(load_classifier(str(folder), RTE, "--x", fine_tuned=True), control)
    assert stored_projections(str(folder), 36).tinybert[1].sum() == 36


def test_weights_that_no_prefix_explains_are_refused(pretrained, glue_dir, tmp_path, exits_with_2):
    def change(weights):
        return behind("encoder.")(weights) | {"loss.weight": torch.ones(2)}

    folder = changed(pretrained, tmp_path / "wrapped", change)
    options = ["--model_name_or_path", folder, "--task_name", "RTE", "--data_dir", glue_dir, "--do_train"]
    line = exits_with_2(run_glue, *options, "--output_dir", tmp_path / "out", "--max_seq_length", 32)
    assert f"--model_name_or_path {folder}: has no weights for bert.embeddings.LayerNorm.bias, " in line
    assert "; under other names it has encoder.embeddings.LayerNorm.bias, " in line and len(line) < 900
    assert not (tmp_path / "out").exists()


def test_an_encoder_that_is_not_whole_is_refused(pretrained, tmp_path):
    gone = "encoder.layer.2.output.dense.weight"
    folder = changed(pretrained, tmp_path / "part", lambda weights: {k: v for k, v in weights.items() if k != gone})
    with pytest.raises(InputError, match=f"--x {folder}: has no weights for bert.{gone}, which BertForSequence"):
        load_classifier(str(folder), RTE, "--x")


def test_an_encoder_without_its_pooler_is_not_refused(pretrained, tmp_path, capsys):
    def change(weights):
        return {key: value for key, value in weights.items() if not key.startswith("pooler")}

    load_classifier(str(changed(pretrained, tmp_path / "masked", change)), RTE, "--x")
    assert "new weights for bert.pooler.dense.bias, bert.pooler" in capsys.readouterr().out


# What the architecture leaves out

RELATIVE = {f"bert.encoder.layer.{k}.attention.self.distance_embedding.weight": torch.ones(127, 8) for k in range(4)}


def test_weights_without_a_place_are_refused_in_a_teacher_and_said_of_a_student(teacher, tmp_path, capsys):
    folder = changed(teacher, tmp_path / "relative", lambda weights: weights | RELATIVE)
    configured(folder, position_embedding_type="relative_key")
    with pytest.raises(
        InputError, match=r"no place for its weights .*0\.attention\.self\.distance_embedding\.weight, "
    ):
        load_classifier(str(folder), RTE, "--teacher_model", fine_tuned=True)
    capsys.readouterr()
    load_classifier(str(folder), RTE, "--student_model")
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{folder}: not used, BertForSequenceClassification has no place for bert.encoder.layer.0.")


@pytest.mark.parametrize(
    "others",
    [
        {
            "fit_dense.weight": torch.ones(36, 24),
            "fit_denses.0.bias": torch.ones(36),
            "share_fit_dense.bias": torch.ones(1),
        },
        {"bert.embeddings.position_ids": torch.arange(64)},
        {"cls.predictions.bias": torch.ones(3), "lm_head.bias": torch.ones(3), "qa_outputs.bias": torch.ones(2)},
    ],
)
def test_other_heads_are_no_fault_of_a_teacher(others, teacher, tmp_path, capsys):
    folder = changed(teacher, tmp_path / "more", lambda weights: weights | others)
    load_classifier(str(folder), RTE, "--teacher_model", fine_tuned=True)
    assert not capsys.readouterr().out


@pytest.mark.parametrize("kind", ["bert", "electra"])
def test_pre_trained_models_come_without_a_word_on_their_heads(kind, tmp_path, capsys):
    sizes = {"vocab_size": 60, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
    classes = {"bert": (BertConfig, BertForPreTraining), "electra": (ElectraConfig, ElectraForPreTraining)}
    config, model = classes[kind]
    model(config(**sizes, intermediate_size=32)).save_pretrained(tmp_path / "model")
    load_classifier(str(tmp_path / "model"), RTE, "--x")
    (line,) = capsys.readouterr().out.splitlines()
    assert ": new weights for classifier." in line


# Another kind of task


@pytest.mark.parametrize(
    ("kind", "names", "task"),
    [
        ("multi_label_classification", ["entailment", "not_entailment"], "RTE"),
        ("multi_label_classification", ["toxic"], "STS-B"),
        ("regression", ["LABEL_0", "LABEL_1"], "RTE"),
    ],
)
def test_a_teacher_of_another_kind_is_refused_by_name(kind, names, task, tmp_path):
    folder = save_bert(tmp_path / "teacher", names, problem_type=kind)
    with pytest.raises(InputError, match=f"--teacher_model {folder}: was trained for .* its problem_type is {kind}; "):
        load_classifier(str(folder), get_task(task), "--teacher_model", fine_tuned=True)
    load_classifier(str(folder), get_task(task), "--student_model")  # whose head learns anew


# Names of classes


@pytest.mark.parametrize(
    "written",
    [["negative", "positive"], {"negative": 0, "positive": 1}, {"0": "negative", "1": "positive"}],
)
def test_class_names_in_other_forms_are_read(written, tmp_path):
    folder = configured(save_bert(tmp_path / "model", ["a", "b"]), id2label=written)
    assert class_names(load_config(str(folder), "--x")) == ["negative", "positive"]
    assert load_config(str(folder), "--x").name_or_path == str(folder)
    model = load_classifier(str(folder), get_task("SST-2"), "--x", fine_tuned=True)
    assert model.config.name_or_path == str(folder)
    assert load_tokenizer(str(folder), "--x").tokenize("cat")


@pytest.mark.parametrize(
    "written",
    [
        {"1": "negative", "2": "positive"},
        {"negative": "0", "positive": "1"},
        {"a": 0, "b": 2},
        {"a": 0, "b": 0},
        "a,b",
        2,
    ],
)
def test_class_names_that_cannot_be_read_are_named(written, tmp_path):
    folder = configured(save_bert(tmp_path / "model", ["a", "b"]), id2label=written)
    with pytest.raises(InputError, match=f"--x {folder}: id2label of its config.json is .*; it must say a name"):
        load_config(str(folder), "--x")


def own_files(folder: Path) -> list:
    rows = [("a good film", "positive"), ("a bad film", "negative")] * 8
    for name in ("train.csv", "dev.csv"):
        (folder / name).write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
    return ["--train_file", folder / "train.csv", "--validation_file", folder / "dev.csv", "--max_seq_length", 16]


@pytest.mark.training
def test_names_for_a_teacher_s_classes_are_the_student_s(tmp_path):
    teacher = save_bert(tmp_path / "teacher", ["LABEL_0", "LABEL_1"])
    command = ["--teacher_model", teacher, "--student_layers", 2, "--class_names", "negative, positive", "--no_cuda"]
    command += [*own_files(tmp_path), "--max_steps", 1, "--output_dir", tmp_path / "out", "--report_to", "none"]
    distil([str(part) for part in command])
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["id2label"] == {"0": "negative", "1": "positive"}
    assert config["label2id"] == {"negative": 0, "positive": 1}


def test_a_glue_task_s_classes_in_the_model_s_order(tmp_path):
    folder = save_bert(tmp_path / "teacher", ["LABEL_0", "LABEL_1", "LABEL_2"])
    theirs = AutoModelForSequenceClassification.from_pretrained(folder).classifier.weight
    names = ["entailment", "neutral", "contradiction"]
    model = load_classifier(str(folder), get_task("MNLI"), "--teacher_model", fine_tuned=True, output_names=names)
    assert torch.equal(model.classifier.weight, theirs[[2, 0, 1]])


@pytest.mark.parametrize(
    ("named", "names", "message"),
    [
        (["LABEL_0", "LABEL_1"], "negative", "give two or more names, all different"),
        (["LABEL_0", "LABEL_1"], "negative,,positive", "give two or more names, all different"),
        (["LABEL_0", "LABEL_1"], "negative,Negative", "give two or more names, all different"),
        (
            ["LABEL_0", "LABEL_1"],
            "negative,neutral,positive",
            r"gives 3 names, the model has 2 outputs (LABEL_0, LABEL_1)",
        ),
        (
            ["positive", "negative"],
            "negative,positive",
            "the model itself has these names in another order: positive, n",
        ),
        (["LABEL_0", "LABEL_1"], "bad,good", "its labels (negative, positive) are not the model's classes (bad, good)"),
        (["score"], "negative,positive", "gives 2 names, the model has 1 outputs"),
    ],
)
def test_names_that_cannot_be_the_model_s(named, names, message, tmp_path, exits_with_2):
    teacher = save_bert(tmp_path / "teacher", named)
    command = ["--teacher_model", teacher, "--student_layers", 2, "--class_names", names, *own_files(tmp_path)]
    assert message in exits_with_2(distil, *command, "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_yet_to_be_trained_has_no_classes_to_name(pretrained, tmp_path, exits_with_2):
    command = ["--model_name_or_path", pretrained, "--do_train", "--class_names", "a,b", *own_files(tmp_path)]
    assert "--class_names" in exits_with_2(run_glue, *command, "--output_dir", tmp_path / "out")


# Broken files

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 440449768\n"


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_git_lfs_pointer_in_place_of_weights(name, teacher, tmp_path):
    shutil.copytree(teacher, tmp_path / "model")
    (tmp_path / "model/model.safetensors").unlink()
    (tmp_path / "model" / name).write_text(POINTER)
    with pytest.raises(InputError) as error:
        load_classifier(str(tmp_path / "model"), RTE, "--teacher_model", fine_tuned=True)
    said = f"{name} is a Git LFS pointer, the weights were not fetched (git lfs pull)"
    assert str(error.value) == f"--teacher_model {tmp_path / 'model'}: {said}"


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.txt"])
def test_a_git_lfs_pointer_in_place_of_a_vocabulary(name, teacher, tmp_path):
    shutil.copytree(teacher, tmp_path / "model")
    (tmp_path / "model/tokenizer.json").unlink()
    (tmp_path / "model" / name).write_text(POINTER)
    with pytest.raises(InputError, match=f"its tokenizer: {name} is a Git LFS pointer, it was not fetched"):
        load_tokenizer(str(tmp_path / "model"), "--x")


def test_a_pointer_that_nobody_reads_does_no_harm(teacher, tmp_path):
    shutil.copytree(teacher, tmp_path / "model")
    (tmp_path / "model/pytorch_model.bin").write_text(POINTER)
    load_classifier(str(tmp_path / "model"), RTE, "--x", fine_tuned=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("fine_tuned", [True, False])
def test_weights_that_are_no_numbers_are_refused(value, fine_tuned, teacher, tmp_path):
    name = "bert.encoder.layer.2.output.dense.bias"

    def change(weights):
        weights[name][5] = value
        return weights

    folder = changed(teacher, tmp_path / "model", change)
    with pytest.raises(InputError, match=f"--x {folder}: its weights {name} hold NaN or infinity"):
        load_classifier(str(folder), RTE, "--x", fine_tuned=fine_tuned)


def test_projections_that_are_no_numbers_are_refused(small_student, tmp_path):
    maps = {"fit_dense.weight": torch.full((24, 12), torch.nan), "fit_dense.bias": torch.zeros(24)}
    folder = changed(small_student, tmp_path / "student", lambda weights: weights | maps)
    with pytest.raises(InputError, match=r"its weights fit_dense\.weight hold NaN or infinity"):
        stored_projections(str(folder), 24)
