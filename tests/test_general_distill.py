"""General distillation by its script: what it leaves, its students, its published recipe, how it is resumed."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
import warm
from conftest import ROOT, save_bert
from datasets import Dataset
from safetensors.torch import load_file
from test_corpus import kept as kept_in
from test_corpus import pack, write_corpus
from test_run_checkpoints import stopped
from transformers import AutoModel, AutoTokenizer, RobertaConfig, RobertaModel

from bert_emd.attention_scores import expose_attention
from bert_emd.corpus import Corpus
from bert_emd.emd_task_distill import main as distil_for_task
from bert_emd.general_distill import main
from bert_finetune.samplers import Shuffled

SCRIPT = ROOT / "bert_emd/general_distill.py"
training = pytest.mark.training


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    write_corpus(path, documents=60)
    return path


def command(corpus, teacher, out, *more, student=("--student_config", "2x12")):
    return [
        *("--corpus", corpus, "--teacher_model", teacher, *student, "--output_dir", out, "--max_seq_length", 24),
        *("--train_batch_size", 8, "--gradient_accumulation_steps", 1, "--dev_share", 0.2, "--eval_steps", 4),
        *("--max_steps", 8, "--learning_rate", 1e-3, "--logging_steps", 2, "--bf16", False, "--use_cpu", *more),
    ]


def run(*words):
    main([str(word) for word in words])


def results(out):
    return json.loads((out / "eval_results.json").read_text())


@pytest.fixture(scope="module")
def whole(corpus, pretrained, tmp_path_factory):
    """A finished run."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    run(*command(corpus, pretrained, out, "--save_total_limit", 5))
    return out


# What a run leaves


@training
def test_outputs(corpus, pretrained, tmp_path, capsys):
    out = tmp_path / "out"
    run(*command(corpus, pretrained, out))
    printed = capsys.readouterr().out
    found = results(out)
    assert "recipe recommended" in printed and "--bf16 False" in printed and "corpus: train: " in printed
    assert "\n8 sequences a step\n" in printed
    lines = [line for line in printed.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == ["4/8", "8/8"]
    assert all(" tokens/s, 0:00:" in line and line.endswith(" left") for line in lines)
    end = f"step 8  dev loss {found['eval_loss']:.4f}, at the start {found['start_eval_loss']:.4f}"
    assert printed.splitlines()[-1] == f"saved in {out}, {end}"
    assert found["eval_loss"] < found["start_eval_loss"] and found["global_step"] == 8
    assert [entry["step"] for entry in found["history"]] == [4, 8]
    terms = [found[f"eval_{name}_loss"] for name in ("attention", "hidden", "embedding")]
    assert found["eval_loss"] == pytest.approx(sum(terms), rel=1e-6)  # under the relative objective with θ = 1
    assert found["history"][-1]["attention_loss"] > 0
    with np.load(out / "flows.npz") as flows:
        assert flows["hidden_flow"].shape == (4, 2, 4)
    with open(out / "layer_weights.csv", newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["2", "4", "6", "8"]
    assert json.loads((out / "args.json").read_text())["options"]["student_config"] == "2x12"
    assert not (out / ".packed-corpus").exists()
    card = (out / "README.md").read_text()
    assert "pipeline_tag: feature-extraction" in card and "\n# 2-layer bert for distillation, without a task" in card
    assert f"from the layers of `{pretrained.name}`." in card and '--student_model "out" --teacher_model' in card
    model, info = AutoModel.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    assert (model.config.num_hidden_layers, model.config.hidden_size, model.config.intermediate_size) == (2, 12, 24)
    assert AutoTokenizer.from_pretrained(out).get_vocab() == AutoTokenizer.from_pretrained(pretrained).get_vocab()


@training
@pytest.mark.parametrize(
    ("projection", "names"),
    [("per_layer", ["fit_denses.0", "fit_denses.1", "fit_denses.2"]), ("shared", ["share_fit_dense"])],
)
def test_its_folder_is_a_student_for_a_task(
    projection, names, corpus, pretrained, teacher, glue_dir, tmp_path, monkeypatch
):
    general, out = tmp_path / "general", tmp_path / "out"
    run(*command(corpus, pretrained, general, "--projection", projection))
    maps = load_file(general / "projections.safetensors")
    assert sorted(maps) == sorted(f"{name}.{kind}" for name in names for kind in ("weight", "bias"))
    started = []

    def train(trainer, **kwargs):
        started.append(trainer.distillation)
        raise KeyboardInterrupt

    monkeypatch.setattr("bert_finetune.run_trainer.RunTrainer.train", train)
    options = ["--teacher_model", teacher, "--student_model", general, "--task_name", "RTE", "--output_dir", out]
    with pytest.raises(SystemExit):
        distil_for_task([str(word) for word in [*options, "--data_dir", glue_dir, "--max_seq_length", 32, "--use_cpu"]])
    (distillation,) = started
    assert len(distillation.projections) == len(names)
    for name, linear in zip(names, distillation.projections, strict=True):
        assert torch.equal(linear.weight, maps[f"{name}.weight"]) and torch.equal(linear.bias, maps[f"{name}.bias"])
    mine = AutoModel.from_pretrained(general).state_dict()
    assert all(torch.equal(value, mine[name]) for name, value in distillation.student.bert.state_dict().items())


@training
def test_the_best_student_comes_with_its_own_projections(corpus, pretrained, tmp_path):
    """At a rate that destroys it, from its first checkpoint on."""
    out = tmp_path / "out"
    run(*command(corpus, pretrained, out, "--learning_rate", 0.5, "--warmup_steps", 0, "--eval_steps", 1))
    found = results(out)
    best = min(found["history"], key=lambda entry: entry["eval_loss"])
    assert found["global_step"] == best["step"] < 8
    assert found["eval_loss"] == pytest.approx(best["eval_loss"], rel=1e-6)
    saved = load_file(out / f"checkpoint-{best['step']}" / "distillation.safetensors")
    maps = load_file(out / "projections.safetensors")
    for k in range(3):
        assert torch.equal(maps[f"fit_denses.{k}.weight"], saved[f"projections.{k}.weight"])


@training
def test_figures_come_after_the_maps(whole, corpus, pretrained, tmp_path, monkeypatch):
    """Of a run that is interrupted in between neither those of an earlier one stand beside its model."""

    def interrupt(*written):
        raise KeyboardInterrupt

    out = shutil.copytree(whole, tmp_path / "out")
    (out / "projections.safetensors").write_text("of an earlier run")
    monkeypatch.setattr("bert_emd.general_distillation.write_run", interrupt)
    with pytest.raises(SystemExit):
        run(*command(corpus, pretrained, out, "--save_total_limit", 5, "--resume_from_checkpoint"))
    name = "projections.safetensors"
    assert (out / name).read_bytes() == (whole / name).read_bytes() and not list(out.glob("eval_results*"))


@training
def test_a_push_that_fails_says_what_to_do(whole, corpus, pretrained, tmp_path, exits_with_2, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("the hub is away")

    def named(args, model):
        args.hub_model_id = "me/small"

    monkeypatch.setattr("bert_finetune.push.create_commit", refuse)
    monkeypatch.setattr("bert_emd.general_distillation.open_repository", named)
    out = stopped(whole, tmp_path / "out", 8)
    words = command(corpus, pretrained, out, "--save_total_limit", 5, "--resume_from_checkpoint")
    line = exits_with_2(main, *words, "--push_to_hub", "--hub_model_id", "small")
    assert f"the model is in {out}, and `hf upload me/small {out} . --exclude 'checkpoint-*'" in line
    assert '--student_model "me/small" ' in (out / "README.md").read_text()


# Students


@training
@pytest.mark.parametrize(
    ("student", "shape"),
    [
        (("--student_config", "5x12x20"), (5, 12, 20)),
        (("--student_config", "{folder}"), (2, 12, 24)),
        (("--student_config", "{folder}/config.json"), (2, 12, 24)),
        (("--student_layers", 2), (2, 24, 48)),
        (("--student_layers", "1,4", "--student_width", 12), (2, 12, 24)),
        (("--student_layers", 3, "--student_width", 12, "--student_start", "embeddings"), (3, 12, 24)),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value[0], str) else "",
)
def test_students(student, shape, corpus, teacher, small_student, tmp_path):
    """Of a fine-tuned teacher, whose classes are none of the student's."""
    out, student = tmp_path / "out", [str(word).format(folder=small_student) for word in student]
    run(*command(corpus, teacher, out, "--max_steps", 2, "--eval_steps", 2, student=student))
    model, info = AutoModel.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    config = model.config
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == shape
    assert config.id2label == {0: "LABEL_0", 1: "LABEL_1"}
    if student[0] == "--student_layers":  # it starts nearer than a student with new weights
        random = tmp_path / "random"
        run(*command(corpus, teacher, random, "--max_steps", 1, "--eval_steps", 1))
        assert results(out)["start_eval_embedding_loss"] < 0.7 < results(random)["start_eval_embedding_loss"]


@training
def test_a_teacher_of_another_architecture_and_without_a_pooler(corpus, pretrained, tmp_path):
    sizes = {"hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 48, "num_hidden_layers": 4}
    tokenizer = AutoTokenizer.from_pretrained(pretrained)
    config = RobertaConfig(vocab_size=len(tokenizer), pad_token_id=0, max_position_embeddings=64, **sizes)
    RobertaModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    run(*command(corpus, tmp_path / "teacher", tmp_path / "out", "--layer_mapping", "uniform"))
    assert results(tmp_path / "out")["eval_loss"] < results(tmp_path / "out")["start_eval_loss"]
    assert not any(AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)[1].values())


# Recipes and objectives


@training
def test_tinybert(corpus, pretrained, small_student, tmp_path, capsys):
    """Its loss, by hand: the sum over pairs of layers, and over hidden states with the embedding output."""
    out, student = tmp_path / "out", ("--student_config", small_student / "config.json")
    words = command(corpus, pretrained, out, "--recipe", "tinybert", "--eval_batch_size", 1000, student=student)
    words[words.index("--learning_rate") : words.index("--learning_rate") + 2] = ["--max_grad_norm", 1.0]
    run(*words)
    printed, found = capsys.readouterr().out, results(out)
    for said in ("--theta 2.0", "--learning_rate 5e-05", "--optimizer bert_adam", "--short_seq_prob 0.1"):
        assert said in printed
    assert "layer mapping, student-teacher: 1-2, 2-4" in printed
    tokenizer = AutoTokenizer.from_pretrained(out)
    dev = pack(Corpus((corpus,), None, 24, 0.1, 0.2, 42), tokenizer, tmp_path / "cache").dev
    batch = tokenizer.pad(dev[:], return_tensors="pt")
    models = [AutoModel.from_pretrained(path).eval() for path in (out, pretrained)]
    for model in models:
        expose_attention(model, "", 24)
    with torch.no_grad():
        student, teacher = (model(**batch, output_hidden_states=True, output_attentions=True) for model in models)
    maps = load_file(out / "projections.safetensors")
    mask = batch["attention_mask"].double()
    pairs, total = mask[:, None, :, None] * mask[:, None, None, :], 0.0
    for ours, theirs in ((1, 2), (2, 4)):
        error = student.attentions[ours - 1].double() - teacher.attentions[theirs - 1].double()
        total += (error.square() * pairs).sum() / (mask.sum() * 3 * 24)
    for ours, theirs in ((0, 0), (1, 2), (2, 4)):
        projected = student.hidden_states[ours] @ maps["share_fit_dense.weight"].T + maps["share_fit_dense.bias"]
        error = projected.double() - teacher.hidden_states[theirs].double()
        total += (error.square() * mask[:, :, None]).sum() / (mask.sum() * 24)
    assert found["eval_loss"] == pytest.approx(total.item(), rel=1e-4)


@pytest.mark.parametrize(
    ("batch", "processes", "parts"), [(32, 1, 8), (64, 1, 4), (32, 4, 2), (512, 1, 1), (48, 1, 5), (96, 1, 3)]
)
def test_a_step_has_about_256_sequences(batch, processes, parts, monkeypatch):
    from bert_emd.general_arguments import read_options

    monkeypatch.setenv("WORLD_SIZE", str(processes))
    monkeypatch.setattr("bert_finetune.command_line.Parser.parse", lambda parser, argv: pytest.fail("read"))
    seen = {}
    monkeypatch.setattr("bert_finetune.command_line.Parser.set_defaults", lambda parser, **given: seen.update(given))
    argv = ["--corpus", "a", "--teacher_model", "b", "--student_config", "4x312", "--train_batch_size", str(batch)]
    with pytest.raises(pytest.fail.Exception):
        read_options(argv, "")
    assert seen["gradient_accumulation_steps"] == parts


@training
@pytest.mark.parametrize("options", [["--dev_share", 0], ["--use_att", False, "--use_embedding", False]])
def test_less(options, corpus, pretrained, tmp_path):
    out = tmp_path / "out"
    run(*command(corpus, pretrained, out, *options))
    found = results(out)
    if options[0] == "--dev_share":
        assert not any("eval" in name for name in found) and found["history"] == []
    else:
        assert found["eval_loss"] == found["eval_hidden_loss"] and "eval_attention_loss" not in found
    assert (out / "checkpoint-8").is_dir() and (out / "model.safetensors").is_file()


@training
def test_a_dataset(corpus, pretrained, tmp_path):
    texts = corpus.read_text().split("\n\n")
    Dataset.from_dict({"text": texts, "number": range(len(texts))}).to_parquet(tmp_path / "data" / "train.parquet")
    same = [*command(corpus, pretrained, tmp_path / "files")]
    run(*same)
    same[same.index("--corpus") : same.index("--corpus") + 2] = ["--dataset_name", tmp_path / "data"]
    same[same.index("--output_dir") + 1] = tmp_path / "dataset"
    run(*same, "--text_column", "text")
    kept = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("files", "dataset")]
    assert kept[0] == kept[1]


# Resuming, and several processes


def kept(out):
    found = {name: value for name, value in results(out).items() if name != "train_seconds"}
    return {
        name: (out / name).read_bytes()
        for name in ("model.safetensors", "projections.safetensors", "flows.npz", "layer_weights.csv")
    }, found


@training
@pytest.mark.parametrize("more", [[], ["--overwrite_output_dir"]], ids=["resumed", "again"])
def test_resumed_bit_for_bit(more, whole, corpus, pretrained, tmp_path):
    """And a folder of the user's own stays."""
    out = stopped(whole, tmp_path / "out", 4)
    (out / "corpus").mkdir()
    (out / "corpus/text.txt").write_text("mine")
    run(*command(corpus, pretrained, out, "--save_total_limit", 5, *(more or ["--resume_from_checkpoint"])))
    assert kept(out) == kept(whole)
    assert (out / "corpus/text.txt").read_text() == "mine"


@training
def test_each_epoch_has_an_order_of_its_own(corpus, pretrained, tmp_path, monkeypatch):
    orders, original = [], Shuffled.__iter__

    def shuffled(sampler):
        orders.append(list(original(sampler)))
        return iter(orders[-1])

    monkeypatch.setattr(Shuffled, "__iter__", shuffled)
    run(*command(corpus, pretrained, tmp_path / "out", "--max_steps", -1, "--num_train_epochs", 2))
    first, second = orders
    assert first != second and sorted(first) == sorted(second)


@training
def test_another_corpus_is_another_experiment(whole, pretrained, tmp_path, exits_with_2):
    out, other = stopped(whole, tmp_path / "out", 4), tmp_path / "other.txt"
    write_corpus(other, documents=60, seed=1)
    line = exits_with_2(main, *command(other, pretrained, out, "--save_total_limit", 5, "--resume_from_checkpoint"))
    assert "is of another experiment: the corpus was" in line


@training
@pytest.mark.xdist_group("warm")
def test_two_processes_equal_one(corpus, pretrained, tmp_path):
    """With the same sequences in a step, and in an evaluation's batch, both with fewer at the end."""
    sizes = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "hidden_size": 12, "num_hidden_layers": 2}
    student, outs = save_bert(tmp_path / "student", None, intermediate_size=24, **sizes), []
    for processes in (2, 1):
        outs.insert(0, tmp_path / f"of-{processes}")
        words = command(corpus, pretrained, outs[0], student=("--student_config", student))
        words += ["--train_batch_size", 8 // processes, "--eval_batch_size", 6 // processes, "--max_steps", -1]
        words += ["--num_train_epochs", 2, "--overwrite_output_dir"]
        if processes == 2:
            pair, printed = warm.start_pair(SCRIPT, *words, "--ddp_backend", "gloo"), ""
        else:
            run(*words)
    for process in pair:
        said, error = process.communicate(timeout=300)
        assert process.returncode == 0, error[-3000:]
        printed += said
    assert printed.count("saved in ") == 1
    one, two = (load_file(out / "model.safetensors") | load_file(out / "projections.safetensors") for out in outs)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5)
    histories = [[(entry["step"], entry["eval_loss"]) for entry in results(out)["history"]] for out in outs]
    assert len(histories[0]) > 2
    np.testing.assert_allclose(*histories, rtol=1e-5)
    before = [results(out)["start_eval_loss"] for out in outs]
    assert before[0] == pytest.approx(before[1], rel=1e-6)


@training
def test_the_dev_loss_does_not_depend_on_other_rows_order_or_dropout(whole, corpus, pretrained, tmp_path):
    """Two runs from one start measure the same; the second from a corpus that is kept."""
    losses = []
    for name in ("one", "two"):
        cache = ["--corpus_cache_dir", tmp_path / "cache"]
        run(*command(corpus, pretrained, tmp_path / name, "--max_steps", 1, "--eval_steps", 1, *cache))
        losses.append(results(tmp_path / name)["start_eval_loss"])
    assert losses[0] == losses[1] == results(whole)["start_eval_loss"]
    assert len(kept_in(tmp_path / "cache")) == 1


# What cannot be used


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--corpus", "gone.txt"], "--corpus gone.txt: no such file"),
        (["--corpus", None], "give --corpus, files of text, or --dataset_name"),
        (["--dataset_name", "wiki"], "give --corpus, files of text, or --dataset_name"),
        (["--dataset_config", "en"], "--dataset_config: of which dataset?"),
        (["--teacher_model", None], "--teacher_model is missing"),
        (["--teacher_model", "./gone"], "--teacher_model ./gone: no such folder"),
        (["--student_config", None], "give --student_config, for a student with new weights, or --student_layers"),
        (["--student_layers", 2], "give --student_config, for a student with new weights, or --student_layers"),
        (["--student_width", 12], "--student_width: is for --student_layers"),
        (["--student_start", "random"], "--student_start: is for --student_layers"),
        (["--student_config", "2x13"], "--student_config 2x13: --student_width 13: 3 attention heads do not divide it"),
        (["--student_config", "./gone"], "--student_config ./gone: no such folder"),
        (["--student_config", "{other_heads}"], "the student has 2 attention heads and the teacher 3"),
        (["--student_config", "{few_words}"], "has a vocab_size of 20, and the teacher's tokenizer needs 54"),
        (["--student_config", "{one_type}"], "has a type_vocab_size of 1, and the teacher's tokenizer needs 2"),
        (["--teacher_model", "{one_type}"], "the tokenizer numbers the texts of a pair, and the model knows one text"),
        (["--dev_share", 1], "--dev_share 1.0: must be from 0 to below 1"),
        (["--short_seq_prob", -0.1], "--short_seq_prob -0.1: must be from 0 to below 1"),
        (["--do_predict"], "--do_predict: there is no task here yet; leave it out"),
        (["--metric_for_best_model", "accuracy"], "--metric_for_best_model: there is no task here yet"),
        (
            ["--dev_share", 0, "--eval_strategy", "epoch"],
            "--eval_strategy epoch: nothing is held out with --dev_share 0",
        ),
        (["--train_sampling_strategy", "group_by_length"], "--train_sampling_strategy group_by_length"),
        (["--max_seq_length", 65], "--max_seq_length 65: the model has only 64 positions"),
        (["--layer_mapping", "none"], "no loss is left to train with"),
        (["--projection", "none"], "--projection none: the student is 12 wide, the teacher 24"),
        (["--weight_momentum", 1], "--weight_momentum 1.0: must be from 0 to below 1"),
        (["--neftune_noise_alpha", 5], "--neftune_noise_alpha: is not supported in distillation"),
        (["--corpus_cache_dir", "{file}"], "is a file, not a folder"),
        (["--corpus", "{file}"], "holds one document only, and none can be held out"),
        (["--corpus", "{models}/*"], "no file has such a name, only folders"),
        (["--dev_share", 0.999999], "no text is left to train on; give another --dev_share"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_bad_input(change, said, corpus, pretrained, tmp_path, exits_with_2):
    """One line; and a finished run in the output folder stays as it is."""
    out, file = tmp_path / "out", tmp_path / "one.txt"
    out.mkdir()
    (out / "model.safetensors").write_text("of a finished run")
    file.write_text("one\ntwo\n")
    sizes = {"hidden_size": 12, "num_hidden_layers": 2}
    models = {
        "other_heads": save_bert(tmp_path / "heads", None, num_attention_heads=2, **sizes),
        "few_words": save_bert(tmp_path / "words", None, vocab_size=20, **sizes),
        "one_type": save_bert(tmp_path / "types", None, type_vocab_size=1, **sizes),
    }
    words = command(corpus, pretrained, out, "--overwrite_output_dir")
    models["models"] = tmp_path / "folders"
    (tmp_path / "folders/empty").mkdir(parents=True)
    name, *values = [word.format(file=file, **models) if isinstance(word, str) else word for word in change]
    if name in words and values:
        position = words.index(name)
        words[position : position + 2] = [] if values[0] is None else [name, values[0]]
        words += values[1:]
    else:
        words += [name, *values]
    assert said in exits_with_2(main, *words)
    assert [path.name for path in out.iterdir()] == ["model.safetensors"]
    assert (out / "model.safetensors").read_text() == "of a finished run"


@pytest.mark.parametrize("option", ["--corpus", "--dataset_name"])
def test_a_corpus_in_the_output_folder_stays(option, corpus, pretrained, tmp_path, exits_with_2):
    text = tmp_path / "out/corpus/text.txt"
    text.parent.mkdir(parents=True)
    shutil.copy(corpus, text)
    words = command(text, pretrained, tmp_path / "out", "--overwrite_output_dir")
    words[:2] = [option, text.parent]
    assert f"{text.parent}" in (line := exits_with_2(main, *words)) and "is also read from" in line
    assert text.read_bytes() == corpus.read_bytes()


def test_a_damaged_encoder_is_no_teacher(corpus, pretrained, tmp_path, exits_with_2):
    from safetensors.torch import save_file

    folder = shutil.copytree(pretrained, tmp_path / "teacher")
    weights = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in weights.items() if "layer.3" not in name}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    line = exits_with_2(main, *command(corpus, folder, tmp_path / "out"))
    assert "has no weights for encoder.layer.3.attention" in line


@training
def test_a_run_that_diverges_stops(corpus, pretrained, tmp_path, exits_with_2):
    line = exits_with_2(
        main, *command(corpus, pretrained, tmp_path / "out", "--learning_rate", 1e30, "--warmup_steps", 0)
    )
    assert "nothing was saved after it" in line and not (tmp_path / "out" / "model.safetensors").exists()
