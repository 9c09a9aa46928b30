import re

import pytest
from conftest import ROOT

from bert_finetune.files import read_toml
from experiments.published import AVERAGED, FILE, average, published_tables


def fidelity_rows() -> list[dict[str, str]]:
    """The table of published figures in docs/fidelity.md, by its header."""
    text = (ROOT / "docs" / "fidelity.md").read_text(encoding="utf-8").partition("## Published figures")[2]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    header = ["model", *lines[0][1:]]
    return [dict(zip(header, cells, strict=True)) for cells in lines[2:]]


def test_the_data_are_those_of_the_page():
    known = [row for row in read_toml(FILE)["rows"] if row["split"] != "dev"]
    shown = fidelity_rows()
    assert [row["model"] for row in known] == [row["model"] for row in shown] and len(known) == 12
    for data, cells in zip(known, shown, strict=True):
        figures = data["figures"]
        columns = {name.replace("MNLI-mm", "-mm"): f"{figures[name]:.1f}" for name in AVERAGED}
        assert cells == {"model": data["model"], "params": data.get("params", ""), **columns, "avg": cells["avg"]}
        assert f"{average(figures):.1f}" == cells["avg"]


def test_the_dev_figures_are_those_of_the_page():
    rows = read_toml(FILE)["rows"]
    (dev,) = [row["figures"] for row in rows if row["split"] == "dev"]
    page = " ".join((ROOT / "docs" / "fidelity.md").read_text(encoding="utf-8").split())
    found = re.search(r"on dev sets: MRPC best accuracy (\S+) and F1 (\S+); RTE best accuracy (\.\d+)", page).groups()
    assert [100 * float(text) for text in found] == pytest.approx([dev["MRPC accuracy"], dev["MRPC F1"], dev["RTE"]])


def test_each_split_has_a_table_of_its_own():
    server, dev = published_tables()
    assert server.title == "Published figures: test server" and dev.title == "Published figures: dev"
    assert server.header == ["model", "params", *AVERAGED, "average", "source"]
    assert dev.header == ["model", "MRPC accuracy", "MRPC F1", "RTE", "source"]
    assert str(server.rows[2][1]) == ""  # BERT-base: not given there
    assert any("arXiv 2008.05221" in note for note in server.notes)
    for table in (server, dev):
        sources = {note.split(":")[0] for note in table.notes}
        assert {row[-1] for row in table.rows} == sources
