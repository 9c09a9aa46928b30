"""The teacher's answers are kept, found again, and the same as without the cache."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import warm
from conftest import ROOT
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
from bert_emd.teacher_cache import caches_in, claim, surplus
from bert_finetune.errors import InputError

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
    # Those that look at less find what they look at.
    distil(teacher, glue_dir, tmp_path / "less", *more, "--use_att", False)
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
        (["--count_padding", "--pad_to_max_length", "--objective", "published"], "nothing is kept for padding"),
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


def keep_and_answer(folder: Path, number: int) -> None:
    """Keep answers that carry its number, as soon as the others are there too, and print what is kept in the end."""
    (folder / f"ready-{number}").touch()
    while len(list(folder.glob("ready-*"))) < 3:
        time.sleep(0.001)
    layout = Layout({"logits": (3,)}, 6)
    cache = TeacherCache(layout, [1] * 300, folder=folder / "kept")
    kept = []
    for k in range(300):
        if not cache.knows(torch.tensor([k])):
            logits = torch.full((1, 3), float(number))
            cache.keep(torch.tensor([k]), LayerOutputs(logits, None, None))
        kept.append(cache.answers(torch.tensor([k]), torch.ones(1, 1)).logits[0].tolist())
    print(json.dumps(kept))


@pytest.mark.slow
@pytest.mark.xdist_group("warm")
def test_processes_at_the_same_time_see_the_same_answers(tmp_path):
    processes = [warm.start(__file__, tmp_path, number) for number in (1, 2, 3)]
    kept = [json.loads(process.communicate(timeout=120)[0]) for process in processes]
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
    labelled = data.add_column("labels", [0, 1])
    assert teacher_answers._key(model, labelled, "a") in keys  # a teacher does not see them
    with torch.no_grad():
        next(changed.parameters())[0, 0] += 1
    keys.add(teacher_answers._key(changed, data, "a"))
    assert len(keys) == 4


def test_the_key_names_what_computes(model, monkeypatch):
    data = Dataset.from_dict({"input_ids": [[1, 2, 3]], "attention_mask": [[1, 1, 1]]})
    keys = [teacher_answers._key(model, data, "a")]
    for library in (torch, transformers):
        with monkeypatch.context() as patch:
            patch.setattr(library, "__version__", "99.0")
            keys.append(teacher_answers._key(model, data, "a"))
    monkeypatch.setattr(teacher_answers, "weights_digest", lambda model: "the same on every device")
    keys.append(teacher_answers._key(model, data, "a"))
    with monkeypatch.context() as patch:
        patch.setattr(type(model), "device", torch.device("cuda"))
        keys.append(teacher_answers._key(model, data, "a"))
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")  # as --tf32 does
        keys.append(teacher_answers._key(model, data, "a"))
    finally:
        torch.set_float32_matmul_precision(precision)
    assert len(set(keys)) == len(keys) == 6


SUBSETS = [set(parts) for size in (1, 2, 3) for parts in itertools.combinations(sorted(ALL), size)]


@pytest.mark.parametrize("parts", SUBSETS, ids=lambda parts: "+".join(sorted(parts)))
def test_a_cache_with_more_parts_is_a_hit(parts, model, tmp_path):
    everything, inputs = torch.arange(4), batch([0, 1, 2, 3])
    direct = ask(model, ALL, inputs)
    TeacherCache(Layout.of(model, ALL), LENGTHS, "float32", tmp_path).keep(everything, direct)
    files = sorted(tmp_path.iterdir())
    fewer = TeacherCache(Layout.of(model, frozenset(parts)), LENGTHS, "float32", tmp_path)
    assert fewer.knows(everything) and sorted(tmp_path.iterdir()) == files
    states = None
    if parts & {"embedding", "hidden"}:
        first, *others = direct.hidden_states
        states = (
            first if "embedding" in parts else None,
            *(others if "hidden" in parts else [None] * len(others)),
        )
    expected = LayerOutputs(
        direct.logits if "logits" in parts else None, states, direct.attention if "attention" in parts else None
    )
    kept = fewer.answers(everything, inputs["attention_mask"])
    assert_same(kept, expected, inputs["attention_mask"], rtol=0, atol=0)


def test_one_with_fewer_parts_grows_and_what_is_kept_stays(model, tmp_path):
    everything, inputs = torch.arange(4), batch([0, 1, 2, 3])
    direct = ask(model, ALL, inputs)
    fewer, more = (Layout.of(model, frozenset(parts)) for parts in ({"hidden"}, {"hidden", "logits"}))
    TeacherCache(fewer, LENGTHS, "float32", tmp_path).keep(everything, direct)
    grown = TeacherCache(more, LENGTHS, "float32", tmp_path)
    assert not grown.knows(torch.tensor([0]))
    changed = LayerOutputs(direct.logits, tuple(state + 1 for state in direct.hidden_states))
    grown.keep(everything, changed)
    kept = grown.answers(everything, inputs["attention_mask"])
    assert_same(
        kept,
        LayerOutputs(direct.logits, (None, *direct.hidden_states[1:])),
        inputs["attention_mask"],
        rtol=0,
        atol=0,
    )


def test_scores_and_their_factors_lie_side_by_side(teacher, tmp_path):
    attention, everything, inputs = frozenset({"attention"}), torch.arange(4), batch([0, 1, 2, 3])
    for longest in (LONGEST_SCORES, LONGEST_SCORES + 1):
        model = AutoModelForSequenceClassification.from_pretrained(teacher).eval()
        expose_attention(model, "--teacher_model", longest)
        cache = TeacherCache(Layout.of(model, attention), LENGTHS, "float32", tmp_path)
        assert not cache.knows(torch.tensor([0]))
        direct = ask(model, attention, inputs)
        cache.keep(everything, direct)
        kept = cache.answers(everything, inputs["attention_mask"])
        assert_same(kept, direct, inputs["attention_mask"], rtol=0, atol=0)
    assert len(list(tmp_path.glob("attention-*.checksums"))) == 2


def plan(model, folder, parts=ALL, choice="disk", tokens=3, limit=1.0, dtype="float32"):
    """For two examples whose tokens are numbered `tokens`; `limit` in MB."""
    data = Dataset.from_dict({"input_ids": [[tokens] * 400] * 2, "attention_mask": [[1] * 400] * 2})
    cpu = torch.device("cpu")
    return plan_cache(choice, dtype, folder, model, frozenset(parts), data, cpu, True, lasting=True, limit=limit * 1e6)


def test_a_plan_counts_what_is_there_part_by_part(model, tmp_path):
    parts = [{"logits"}, {"logits", "hidden"}, {"embedding"}]
    plans = [plan(model, tmp_path, each) for each in parts]
    assert len({each.folder for each in plans}) == 1 and not list(tmp_path.iterdir())
    assert all(each.missing == sum(each.sizes.values()) for each in plans)
    plans[1].open()
    assert [each.missing for each in plans] == [0, 0, plans[2].missing] and plans[2].missing > 0
    assert plan(model, tmp_path, parts[0], dtype="bfloat16").folder != plans[0].folder


# A cache of hidden states takes 2 x 400 tokens x 4 layers x 24 values x 4 bytes, about .31 MB.
HIDDEN = {"hidden"}


def use(model, folder, tokens, age=0, **more):
    """Make a cache, or use it again, `age` seconds ago. Returns its name and what is in use as long as it is held."""
    planned = plan(model, folder, HIDDEN, tokens=tokens, **more)
    cache = planned.open()
    then = (planned.folder / "used").stat().st_mtime - age
    os.utime(planned.folder / "used", (then, then))
    return planned.folder.name, cache


def names(folder):
    return [cache.path.name for cache in caches_in(folder)]


def test_the_least_recently_used_makes_room(model, tmp_path, capsys):
    (tmp_path / "my notes").mkdir()
    (tmp_path / "0123456789abcdef").mkdir()  # named like a cache, but none
    for kept in (tmp_path / "my notes/file", tmp_path / "0123456789abcdef/file"):
        kept.write_bytes(bytes(10**6))
    made = [use(model, tmp_path, k, age=100 - k)[0] for k in range(3)]
    assert names(tmp_path) == made and not capsys.readouterr().out
    use(model, tmp_path, 0)  # once more
    assert names(tmp_path) == [*made[1:], made[0]]
    new = use(model, tmp_path, 9)[0]
    assert names(tmp_path) == [made[2], made[0], new]
    printed = capsys.readouterr().out
    assert printed.startswith(f"teacher cache: removed {made[1]}, 0.00 GB, last used 20") and made[2] not in printed
    assert printed.endswith("; --teacher_cache_limit 0.001\n")
    assert len(list(tmp_path.rglob("file"))) == 2
    assert sum(cache.size for cache in caches_in(tmp_path)) <= 1e6


@pytest.mark.slow
def test_what_is_in_use_stays(model, tmp_path):
    oldest, held = use(model, tmp_path, 0, age=100)
    second, third = (use(model, tmp_path, k, age=50 - k)[0] for k in (1, 2))
    new = use(model, tmp_path, 3)[0]
    assert names(tmp_path) == [oldest, third, new]
    assert not caches_in(tmp_path)[0].remove() and [cache.in_use() for cache in caches_in(tmp_path)] == [1, 0, 0]
    assert second not in names(tmp_path)
    # What is in use leaves too little: nothing is kept, or the run that insists is refused; all stays as it was.
    before = names(tmp_path)
    assert plan(model, tmp_path, HIDDEN, "auto", tokens=4, limit=0.5) is None
    with pytest.raises(InputError) as refusal:
        plan(model, tmp_path, HIDDEN, tokens=4, limit=0.5)
    assert str(refusal.value).startswith("--teacher_cache_limit 0.0005: the teacher's answers need 0.0 GB, and what is")
    assert names(tmp_path) == before
    # A cache that is there whole is used whatever the limit, which its neighbours have to meet.
    assert plan(model, tmp_path, HIDDEN, "auto", tokens=0, limit=0.1).missing == 0
    del held
    assert plan(model, tmp_path, HIDDEN, "auto", tokens=4, limit=0.5) is not None


def test_what_gives_way_counts_as_free(model, tmp_path, monkeypatch):
    use(model, tmp_path, 0)
    monkeypatch.setattr(teacher_answers, "_free_disk", lambda folder: 1000)
    with pytest.raises(InputError, match="are free; use another place"):
        plan(model, tmp_path, HIDDEN, tokens=1)
    assert plan(model, tmp_path, HIDDEN, tokens=1, limit=0.4)


CLAIM = (
    "import sys; from pathlib import Path; from bert_emd.teacher_cache import claim; held = claim(Path(sys.argv[1]))"
)


def test_another_process_s_cache_is_in_use_until_it_ends_or_is_killed(tmp_path):
    folder = tmp_path / "0123456789abcdef"
    program = f"{CLAIM}; print('held', flush=True); sys.stdin.read()"
    process = subprocess.Popen(
        [sys.executable, "-c", program, folder], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"held\n"
    (cache,) = caches_in(tmp_path)
    assert cache.in_use() and not cache.remove() and surplus(tmp_path, -1) == []
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert surplus(tmp_path, -1) == [cache] and cache.remove() and not folder.exists()


@pytest.mark.slow
def test_a_folder_that_is_claimed_is_there_while_another_run_removes(tmp_path):
    """Another process claims it again and again, this one removes it as often as it can."""
    folder = tmp_path / "0123456789abcdef"
    program = f"""import time; {CLAIM}
for k in range(300):
    held.close()
    time.sleep(0.003)
    held = claim(Path(sys.argv[1]))
    (Path(sys.argv[1]) / "lock").write_text(str(k))
    time.sleep(0.001)
    assert (Path(sys.argv[1]) / "lock").read_text() == str(k)
"""
    process = subprocess.Popen([sys.executable, "-c", program, folder], cwd=ROOT, stderr=subprocess.PIPE)
    removed = 0
    while process.poll() is None:
        removed += sum(cache.remove() for cache in caches_in(tmp_path))
    assert process.communicate()[1] == b"" and process.returncode == 0
    assert removed > 10
    process = subprocess.run([sys.executable, "-c", CLAIM, __file__], cwd=ROOT, capture_output=True, timeout=60)
    assert b"FileExistsError" in process.stderr


def test_runs_that_look_at_the_same_time_do_not_take_each_other_for_users(tmp_path):
    claim(tmp_path / "0123456789abcdef").close()
    (cache,) = caches_in(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        assert not any(pool.map(lambda _: cache.in_use(), range(400)))
        assert sum(pool.map(lambda _: cache.remove(), range(20))) == 1


def test_listing_and_pruning(model, tmp_path, capsys, exits_with_2):
    older = use(model, tmp_path, 0, age=3600)[0]
    newer, held = use(model, tmp_path, 1)
    (tmp_path / "fedcba9876543210").mkdir()
    (tmp_path / "fedcba9876543210/lock").touch()  # as an earlier version left it
    os.utime(tmp_path / "fedcba9876543210/lock", (10**9, 10**9))
    teacher_cache.main([str(tmp_path)])
    first, second, third, total = capsys.readouterr().out.splitlines()
    assert first.startswith("fedcba9876543210, 0.00 GB, last used 2001-09-") and first.endswith(
        ": of an earlier version, or damaged"
    )
    about = f"{model.name_or_path}, 2 examples, float32, torch {torch.__version__}, cpu: hidden"
    assert second.startswith(f"{older}, 0.00 GB, last used 20") and second.endswith(about)
    assert third.startswith(newer) and third.endswith(f"{about} (in use)") and total == "3 caches, 0.00 GB"
    teacher_cache.main([str(tmp_path), "--prune", "1"])
    assert len(capsys.readouterr().out.splitlines()) == 4
    teacher_cache.main([str(tmp_path), "--prune", "0"])
    assert capsys.readouterr().out.splitlines() == [f"removed {first}", f"removed {second}", third, "1 cache, 0.00 GB"]
    assert names(tmp_path) == [newer]
    del held
    for more, reason in (
        ([tmp_path / "nothing"], f"{tmp_path / 'nothing'}: there is no such folder; give the --teacher_cache_dir"),
        ([tmp_path, "--prune", -1], "--prune -1.0: must be 0 or more"),
        ([tmp_path, "--prune", "nan"], "--prune nan: must be 0 or more"),
        ([tmp_path, "--prune", "much"], "argument --prune: invalid float value: 'much'"),
    ):
        assert reason in exits_with_2(teacher_cache.main, *more)
    assert names(tmp_path) == [newer]
    teacher_cache.main([str(tmp_path), "--prune", "0"])
    assert not list(tmp_path.iterdir())


def test_a_limit_below_what_is_possible_is_refused(exits_with_2, teacher, glue_dir, tmp_path):
    arguments = ["--task_name", "RTE", "--data_dir", glue_dir, "--student_layers", 2, "--teacher_model", teacher]
    for limit in ("0", "-1", "nan"):
        line = exits_with_2(main, *arguments, "--output_dir", tmp_path / "out", "--teacher_cache_limit", limit)
        assert f"--teacher_cache_limit {float(limit)}: must be above 0" in line
    assert not (tmp_path / "out").exists()


if __name__ == "__main__":
    keep_and_answer(Path(sys.argv[1]), int(sys.argv[2]))
