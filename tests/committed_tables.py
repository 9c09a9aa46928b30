"""The tables of results that are committed, made anew by the code from the runs that lie beside them.

    python tests/committed_tables.py            # writes them anew
    python tests/committed_tables.py --check    # says which are not what the code gives; exit code 1 where one is not

tests/data/comparison holds runs that are made up; results/ holds what `make results` has kept of its runs, without
their models, so that sizes and times are not in its tables. All paths are seen from the root.
"""

import contextlib
import io
import os
import sys
import tempfile
from pathlib import Path

from bert_finetune.files import write_atomically
from experiments.compare_results import main

ROOT = Path(__file__).resolve().parents[1]
MADE_UP = Path("tests/data/comparison")
RESULTS = Path("results")
MORE_TEXT = Path("results/more-text")
FILES = ("results.md", "results.tex", "results.csv", "summary.csv")


def tables_of_made_up_runs() -> dict[Path, str]:
    """File -> its content, by the script, from the runs that are committed."""
    return _tables(MADE_UP, "--equivalence", "4")


def tables_of_results() -> dict[Path, str]:
    """The same of results/, compared as the Makefile does it, and of results/more-text."""
    figures = "--figure", "divergence", "agreement", "score"
    return _tables(RESULTS, *figures) | _tables(MORE_TEXT, *figures)


def _tables(place: Path, *options: str) -> dict[Path, str]:
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        main([str(place / "runs"), "--output_dir", folder, "--no_speed", *options])
        return {place / name: Path(folder, name).read_text(encoding="utf-8") for name in FILES}


def stale(tables: dict[Path, str]) -> list[Path]:
    """The files that are not what the code gives."""
    return [path for path, text in tables.items() if not path.exists() or path.read_text(encoding="utf-8") != text]


if __name__ == "__main__":
    os.chdir(ROOT)
    tables = tables_of_made_up_runs() | tables_of_results()
    if sys.argv[1:] == ["--check"]:
        print(*stale(tables), sep="\n")
        sys.exit(bool(stale(tables)))
    for path, content in tables.items():
        write_atomically(path, content)
