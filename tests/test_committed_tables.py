"""Tables that are committed are what the code writes; after a change of either: python tests/committed_tables.py"""

import pytest
from committed_tables import MADE_UP, MORE_TEXT, RESULTS, stale, tables_of_made_up_runs, tables_of_results
from conftest import ROOT


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_tables_of_made_up_runs():
    assert stale(tables_of_made_up_runs()) == []
    assert sum(path.stat().st_size for path in MADE_UP.rglob("*") if path.is_file()) < 200_000


def test_the_made_up_runs_show_everything_that_tables_say():
    text = (MADE_UP / "results.md").read_text(encoding="utf-8")
    for words in (
        "better",
        "not equal",
        "equal within 4",
        "cannot tell",
        "one teacher",
        "a teacher of its own",
        "(failed)",
    ):
        assert words in text, words


@pytest.fixture(scope="module")
def results():
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return tables_of_results()


@pytest.mark.slow
def test_tables_of_results(results):
    assert stale(results) == []


@pytest.mark.slow
def test_a_change_of_text_is_noticed(results):
    text = results[RESULTS / "results.md"]
    changed = results | {RESULTS / "results.md": text.replace("Results on the dev set", "Figures on the dev set")}
    assert stale(changed) == [RESULTS / "results.md"]


def test_the_page_shows_the_figures_of_results():
    """docs/does-emd-help.md's tables of results are rows of what the runs give."""
    rows = [line for place in (RESULTS, MORE_TEXT) for line in (place / "results.md").read_text("utf-8").splitlines()]
    page = (ROOT / "docs/does-emd-help.md").read_text(encoding="utf-8").partition("## What came out")[2]
    shown = [line for line in page.splitlines() if line.startswith("| ") and "±" in line]
    assert len(shown) >= 6
    for line in shown:
        assert any(row.startswith(line.removesuffix("|")) for row in rows), line
