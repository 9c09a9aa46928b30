"""The teacher's answers are kept, found again, and the same as without the cache."""

import json
import multiprocessing

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    MobileBertConfig,
    MobileBertForSequenceClassification,
)

from bert_emd import teacher_answers, teacher_cache
from bert_emd.attention_scores import LONGEST_SCORES, expose_attention
from bert_emd.emd_task_distill import main
from bert_emd.layer_outputs import LayerOutputs, layer_outputs
from bert_emd.teacher_answers import Layout, TeacherCache, plan_cache
from bert_emd.teacher_cache import caches_in, surplus

ALL = frozenset({"logits", "embedding", "hidden", "attention"})
LENGTHS = [5, 1, 7, 3]


@pytest.fixture(scope="module", params=[LONGEST_SCORES, LONGEST_SCORES + 1], ids=["scores", "factors"])
def model(teacher, request):
    model = AutoModelForSequenceClassification.from_pretrained(teacher).eval()
    expose_attention(model, "--teacher_model", request.param)
    return model


def batch(examples):
    """Padded inputs of some of the examples, whose tokens follow from their number."""
    longest = max(LENGTHS[k] for k in examples)
    ids, mask = torch.zeros(len(examples), longest, dtype=torch.long), torch.zeros(len(examples), longest).long()
    for row, k in enumerate(examples):
        ids[row, : LENGTHS[k]], mask[row, : LENGTHS[k]] = torch.arange(5, 5 + LENGTHS[k]) + k, 1
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def ask(model, parts, inputs):
    return layer_outputs(model, parts, **inputs)


def assert_same(kept, direct, mask, **tolerance):
    real = mask.bool()
    assert (kept.logits is None) == (direct.logits is None)
    if direct.logits is not None:
        torch.testing.assert_close(kept.logits, direct.logits)
    for ours, theirs in zip(kept.hidden_states or (), direct.hidden_states or (), strict=True):
        assert (ours is None) == (theirs is None)
        if theirs is not None:
            torch.testing.assert_close(ours[real].float(), theirs[real], **tolerance)
            assert not ours[~real].any()
    for ours, theirs in zip(kept.attention or (), direct.attention or (), strict=True):
        assert ours.shape == theirs.shape
        counted = real[:, None, :, None] & (real[:, None, None] if ours.dim() == 4 else True)
        torch.testing.assert_close(ours.float(), theirs * counted, **tolerance)


@pytest.mark.parametrize("dtype, tolerance", [("float32", {"rtol": 0, "atol": 0}), ("bfloat16", {})])
@pytest.mark.parametrize("parts", [ALL, {"logits"}, {"hidden"}, {"embedding", "attention"}], ids=sorted)
def test_answers_come_back_as_they_were(parts, dtype, tolerance, model, tmp_path):
    parts = frozenset(parts)
    tolerance = tolerance or {"rtol": 2**-8, "atol": 1e-6}
    for folder in (None, tmp_path):
        cache = TeacherCache(Layout.of(model, parts), LENGTHS, dtype, folder)
        for examples in ([2, 0], [3, 1]):
            numbers, inputs = torch.tensor(examples), batch(examples)
            assert not cache.knows(numbers)
            direct = ask(model, parts, inputs)
            cache.keep(numbers, direct)
            assert cache.knows(numbers)
            assert_same(cache.answers(numbers, inputs["attention_mask"]), direct, inputs["attention_mask"], **tolerance)
        # In other company, and padded to another length.
        inputs = batch([3, 0])
        kept = cache.answers(torch.tensor([3, 0]), inputs["attention_mask"])
        close = {"rtol": max(tolerance["rtol"], 1e-4), "atol": 1e-5}
        assert_same(kept, ask(model, parts, inputs), inputs["attention_mask"], **close)


def test_another_run_finds_what_is_on_disk_and_only_what_is_whole(model, tmp_path):
    layout, everything = Layout.of(model, ALL), torch.arange(4)
    inputs = batch([0, 1, 2, 3])
    direct = ask(model, ALL, inputs)
    TeacherCache(layout, LENGTHS, "float32", tmp_path).keep(everything, direct)
    again = TeacherCache(layout, LENGTHS, "float32", tmp_path)
    assert again.knows(everything)
    assert_same(again.answers(everything, inputs["attention_mask"]), direct, inputs["attention_mask"], rtol=0, atol=0)
    # A value of example 2 that was not written to the end.
    values = layout.size("hidden", 5) + layout.size("hidden", 1) + 100
    with open(tmp_path / layout.file("hidden"), "r+b") as file:
        file.seek(values * 4 + 3)
        file.write(b"\xff")
    again = TeacherCache(layout, LENGTHS, "float32", tmp_path)
    assert [again.knows(torch.tensor([k])) for k in range(4)] == [True, True, False, True]
    # Files cut short are begun anew.
    names = sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(tuple(ALL)))
    assert len(names) == 2 * len(ALL)
    for name in names:
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-1])
        again = TeacherCache(layout, LENGTHS, "float32", tmp_path)
        assert not again.knows(torch.tensor([3]))
        again.keep(everything, direct)
        assert TeacherCache(layout, LENGTHS, "float32", tmp_path).knows(everything)


def distil(teacher, glue_dir, out, *more):
    arguments = [
        *("--teacher_model", teacher, "--student_layers", 2, "--task_name", "RTE", "--data_dir", glue_dir),
        *("--output_dir", out, "--max_seq_length", 32, "--num_train_epochs", 3, "--train_batch_size", 8),
        *("--learning_rate", "1e-3", "--beta", 1, *more),
    ]
    main([str(argument) for argument in arguments])
    results = json.loads((out / "eval_results.json").read_text())
    with np.load(out / "flows.npz") as flows:
        return results["history"], {name: flows[name] for name in flows.files}


@pytest.fixture
def asked(monkeypatch):
    """How often the teacher itself was asked for a batch's answers."""
    calls = []
    compute = TeacherCache.keep
    monkeypatch.setattr(TeacherCache, "keep", lambda *args: calls.append(1) or compute(*args))
    return calls


@pytest.mark.training
@pytest.mark.parametrize("place", ["disk", "memory"])
def test_the_student_is_that_of_the_uncached_run(place, teacher, glue_dir, tmp_path, asked, capsys):
    history, flows = distil(teacher, glue_dir, tmp_path / "none", "--teacher_cache", "none")
    assert not asked and "teacher cache" not in capsys.readouterr().out
    for dtype, tolerance in (("float32", 1e-5), ("bfloat16", 2e-2)):
        out = tmp_path / dtype
        asked.clear()
        with_cache = distil(teacher, glue_dir, out, "--teacher_cache", place, "--teacher_cache_dtype", dtype)
        assert len(asked) == 3  # the batches of one epoch out of three
        for ours, theirs in zip(with_cache[0], history, strict=True):
            for name, value in theirs.items():
                assert ours[name] == pytest.approx(value, rel=tolerance, abs=tolerance), name
        if dtype == "float32":  # a flow is a vertex: a rounded cost can move it far
            for name, value in flows.items():
                np.testing.assert_allclose(with_cache[1][name], value, atol=tolerance)
        assert not (out / "teacher_cache").exists()
        printed = capsys.readouterr().out
        assert "teacher cache: 0.00 GB in" in printed and dtype in printed


@pytest.mark.training
def test_further_students_find_the_answers(teacher, glue_dir, tmp_path, asked):
    more = ["--teacher_cache_dir", tmp_path / "kept", "--teacher_cache", "disk", "--num_train_epochs", 1]
    distil(teacher, glue_dir, tmp_path / "first", *more)
    assert len(asked) == 3
    distil(teacher, glue_dir, tmp_path / "second", *more, "--seed", 7)
    assert len(asked) == 3 and len(list((tmp_path / "kept").iterdir())) == 1
    # Other inputs are kept beside them.
    distil(teacher, glue_dir, tmp_path / "third", *more, "--max_seq_length", 16)
    assert len(asked) == 6 and len(list((tmp_path / "kept").iterdir())) == 2


@pytest.mark.training
def test_auto_keeps_what_is_read_twice_and_fits(teacher, glue_dir, tmp_path, asked, monkeypatch, exits_with_2):
    distil(teacher, glue_dir, tmp_path / "a")
    assert len(asked) == 3
    asked.clear()
    distil(teacher, glue_dir, tmp_path / "b", "--num_train_epochs", 1)
    distil(teacher, glue_dir, tmp_path / "c", "--max_steps", 3)
    distil(teacher, glue_dir, tmp_path / "d", "--teacher_mode", "train")
    distil(teacher, glue_dir, tmp_path / "e", "--recipe", "authors-2022")
    monkeypatch.setattr(teacher_answers, "_free_disk", lambda folder: 1000)
    distil(teacher, glue_dir, tmp_path / "f")
    assert not asked
    arguments = ["--task_name", "RTE", "--data_dir", glue_dir, "--student_layers", 2, "--teacher_cache", "disk"]
    arguments += ["--teacher_model", teacher, "--output_dir", tmp_path / "g", "--max_seq_length", 32]
    assert "need 0.0 GB, and 0.0 GB are free" in exits_with_2(main, *arguments)
    for more, reason in (
        (["--teacher_mode", "train"], "the teacher's answers change from epoch to epoch"),
        (["--count_padding", "--pad_to_max_length"], "nothing is kept for padding"),
    ):
        assert f"--teacher_cache disk: {reason}" in exits_with_2(main, *arguments, *more)
    more = "--teacher_cache", "memory", "--teacher_cache_dir", tmp_path / "kept"
    assert "--teacher_cache_dir: nothing lasts with --teacher_cache memory" in exits_with_2(main, *arguments, *more)


@pytest.mark.training
def test_a_cache_that_does_not_fit_costs_no_earlier_run(teacher, glue_dir, tmp_path, monkeypatch, exits_with_2):
    out = tmp_path / "out"
    distil(teacher, glue_dir, out)
    before = (out / "model.safetensors").read_bytes()
    monkeypatch.setattr(teacher_answers, "_free_memory", lambda device: 1000)
    arguments = ["--task_name", "RTE", "--data_dir", glue_dir, "--student_layers", 2, "--teacher_cache", "memory"]
    arguments += ["--teacher_model", teacher, "--output_dir", out, "--overwrite_output_dir", "--max_seq_length", 32]
    assert "are free; use another place" in exits_with_2(main, *arguments)
    assert (out / "model.safetensors").read_bytes() == before


@pytest.mark.training
def test_a_folder_of_the_user_s_stays_and_counts_as_room(teacher, glue_dir, tmp_path, asked, monkeypatch):
    out = tmp_path / "out"
    kept = out / "teacher_cache"
    distil(teacher, glue_dir, out, "--teacher_cache_dir", kept, "--teacher_cache", "disk")
    assert len(asked) == 3 and len(list(kept.iterdir())) == 1
    monkeypatch.setattr(teacher_answers, "_free_disk", lambda folder: 1000)
    distil(teacher, glue_dir, tmp_path / "second", "--teacher_cache_dir", kept, "--teacher_cache", "disk")
    assert len(asked) == 3


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_folder_that_stays_is_used_beside_any_device(model, tmp_path, device):
    data = Dataset.from_dict({"input_ids": [[1, 2, 3]], "attention_mask": [[1, 1, 1]]})
    arguments = "auto", "float32", tmp_path, model, ALL, data, torch.device(device)
    assert plan_cache(*arguments, worthwhile=False, lasting=True).folder.parent == tmp_path
    assert plan_cache(*arguments, worthwhile=False) is None


def test_two_runs_at_the_same_time_see_the_same_answers(model, tmp_path):
    caches = [TeacherCache(Layout.of(model, ALL), LENGTHS, folder=tmp_path) for _ in range(2)]
    assert not any(cache.knows(torch.arange(4)) for cache in caches)
    inputs = batch([0, 1, 2, 3])
    direct = ask(model, ALL, inputs)
    for cache in caches:
        cache.keep(torch.arange(4), direct)
        direct.logits.add_(1)  # as rounding would, in another batch
    first, second = (cache.answers(torch.arange(4), inputs["attention_mask"]) for cache in caches)
    torch.testing.assert_close(first.logits, second.logits, rtol=0, atol=0)
    assert TeacherCache(Layout.of(model, ALL), LENGTHS, folder=tmp_path).knows(torch.arange(4))


def _keep_and_answer(folder, number, layout, start, results):
    """In a process of its own: keep answers that carry its number, and report what is kept in the end."""
    torch.set_num_threads(1)
    start.wait()
    cache = TeacherCache(layout, [1] * 300, folder=folder)
    kept = []
    for k in range(300):
        if not cache.knows(torch.tensor([k])):
            logits = torch.full((1, 3), float(number))
            cache.keep(torch.tensor([k]), LayerOutputs(logits, None, None))
        kept.append(cache.answers(torch.tensor([k]), torch.ones(1, 1)).logits[0].tolist())
    results.put(kept)


def test_processes_at_the_same_time_see_the_same_answers(tmp_path):
    context = multiprocessing.get_context("spawn")
    start, results = context.Event(), context.Queue()
    layout = Layout({"logits": (3,)}, 6)
    processes = []
    for number in (1, 2, 3):
        processes.append(context.Process(target=_keep_and_answer, args=(tmp_path, number, layout, start, results)))
        processes[-1].start()
    start.set()
    kept = [results.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    assert kept[0] == kept[1] == kept[2]
    assert all(len(set(row)) == 1 for row in kept[0])


def test_what_is_kept_stays(model):
    cache = TeacherCache(Layout.of(model, ALL), LENGTHS)
    first, both = batch([1]), batch([1, 2])
    cache.keep(torch.tensor([1]), ask(model, ALL, first))
    before = cache.answers(torch.tensor([1]), first["attention_mask"])
    changed = ask(model, ALL, both)
    changed.logits.add_(1)
    cache.keep(torch.tensor([1, 2]), changed)
    after = cache.answers(torch.tensor([1, 2]), both["attention_mask"])
    torch.testing.assert_close(after.logits[:1], before.logits, rtol=0, atol=0)
    torch.testing.assert_close(after.logits[1:], changed.logits[1:])


def test_widths_are_the_model_s_own(tmp_path):
    """A model whose attention is narrower than its hidden states."""
    config = MobileBertConfig(
        vocab_size=50, hidden_size=24, embedding_size=16, true_hidden_size=12, intra_bottleneck_size=12,
        num_hidden_layers=2, num_attention_heads=3, intermediate_size=24,
    )  # fmt: skip
    torch.manual_seed(0)
    mobile = MobileBertForSequenceClassification(config).eval()
    expose_attention(mobile, "--teacher_model", 512)
    inputs = batch([2, 0])
    direct = ask(mobile, ALL, inputs)
    cache = TeacherCache(Layout.of(mobile, ALL), LENGTHS, "float32")
    cache.keep(torch.tensor([2, 0]), direct)
    kept = cache.answers(torch.tensor([2, 0]), inputs["attention_mask"])
    assert_same(kept, direct, inputs["attention_mask"], rtol=0, atol=0)


def test_the_key_names_teacher_and_data(model, teacher):
    data = Dataset.from_dict({"input_ids": [[1, 2, 3], [4, 5]], "attention_mask": [[1, 1, 1], [1, 1]]})
    keys = {teacher_answers._key(model, data, "a")}
    keys.add(teacher_answers._key(model, data, "b"))
    keys.add(teacher_answers._key(model, data.select([1, 0]), "a"))
    changed = AutoModelForSequenceClassification.from_pretrained(teacher)
    assert teacher_answers._key(changed, data, "a") in keys
    with torch.no_grad():
        next(changed.parameters())[0, 0] += 1
    keys.add(teacher_answers._key(changed, data, "a"))
    assert len(keys) == 4
