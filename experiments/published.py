"""Published figures, out of `published.toml`: one table for each split, never in one with what was measured here."""

from pathlib import Path

from bert_finetune.files import read_toml
from experiments.tables_out import Number, ResultTable, number_cell

FILE = Path(__file__).with_name("published.toml")

# The average of the published tables is the mean of these.
AVERAGED = ("MNLI-m", "MNLI-mm", "QQP F1", "QNLI", "SST-2", "CoLA MCC", "STS-B ρ", "MRPC F1", "RTE")


def published_tables() -> list[ResultTable]:
    """A table for each split, its rows and columns in the order of the file, its sources as notes."""
    known = read_toml(FILE)
    rows = known["rows"]
    tables = []
    for split in dict.fromkeys(row["split"] for row in rows):
        here = [row for row in rows if row["split"] == split]
        columns = list(dict.fromkeys(name for row in here for name in row["figures"]))
        cells = [
            [
                row["model"],
                _parameters(row.get("params")),
                *(number_cell(row["figures"].get(name)) for name in columns),
                number_cell(average(row["figures"])),
                row["source"],
            ]
            for row in here
        ]
        notes = [f"{name}: {known['sources'][name]}." for name in dict.fromkeys(row["source"] for row in here)]
        table = ResultTable(
            f"Published figures: {split}", ["model", "params", *columns, "average", "source"], cells, tuple(notes)
        )
        tables.append(table.without_empty_columns())
    return tables


def average(figures: dict[str, float]) -> float | None:
    """The mean of the nine columns; None where one is not known."""
    return sum(figures[name] for name in AVERAGED) / len(AVERAGED) if figures.keys() >= {*AVERAGED} else None


def _parameters(text: str | None) -> Number | str:
    return Number(text, float(text.removesuffix("M"))) if text else ""
