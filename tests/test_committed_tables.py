"""Tables that are committed are what the code writes; after a change of either: python tests/committed_tables.py"""

import pytest
from committed_tables import MADE_UP, RESULTS, read_comparison, stale, tables_of_made_up_runs, tables_of_results
from conftest import ROOT

from experiments.comparison import corrected


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


def test_tables_of_results():
    assert stale(tables_of_results()) == []


def test_a_change_of_text_is_noticed(monkeypatch):
    monkeypatch.setattr("committed_tables.TITLE", "Figures on the dev set")
    assert stale(tables_of_results()) == [RESULTS / "results.md"]


def test_p_values_of_results_are_corrected():
    comparison, _ = read_comparison()
    for figure in comparison.figures:
        here = [summary for summary in comparison.summaries if summary.figure == figure]
        for summary, anew in zip(here, corrected(here), strict=True):
            assert anew.holm_p == pytest.approx(summary.holm_p, abs=1e-5)


def test_the_page_shows_the_figures_of_results():
    """docs/suites.md's table is the first columns of results.md's first."""
    rows = (RESULTS / "results.md").read_text(encoding="utf-8").partition("## CoLA")[0].splitlines()
    page = (ROOT / "docs/suites.md").read_text(encoding="utf-8").partition("## The ablations")[2]
    shown = [line.removesuffix("|") for line in page.splitlines() if line.startswith("| ")]
    assert len(shown) == 11
    for line in shown:
        assert any(row.startswith(line) for row in rows), line
