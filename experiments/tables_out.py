"""A table of results as Markdown and LaTeX; `experiments/report.py` has the third form, HTML."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Number:
    """A cell that shows `text` and is sorted by `value`."""

    text: str
    value: float

    def __str__(self) -> str:
        return self.text


def number_cell(value: float | None, form: str = ".1f", unit: str = "") -> Number | str:
    """A number as a cell shows it; "" for one that is not known."""
    return "" if value is None else Number(f"{value:{form}}{unit}", value)


@dataclass(frozen=True)
class ResultTable:
    """Rows of cells (`str` or `Number`, "" for unknown) under a header; notes: sentences that belong under it."""

    title: str
    header: list[str]
    rows: list[list]
    notes: tuple[str, ...] = ()

    def without_empty_columns(self) -> "ResultTable":
        kept = [k for k in range(len(self.header)) if any(str(row[k]) for row in self.rows)]
        rows = [[row[k] for k in kept] for row in self.rows]
        return ResultTable(self.title, [self.header[k] for k in kept], rows, self.notes)


def markdown(table: ResultTable) -> str:
    """A heading, the table, its notes. Numbers stand on the right."""
    lines = [f"## {markdown_text(table.title)}", ""]
    sides = ["---:" if _is_numeric(table, k) else "---" for k in range(len(table.header))]
    for cells in (table.header, sides, *table.rows):
        lines.append("| " + " | ".join(markdown_text(str(cell)) for cell in cells) + " |")
    for note in table.notes:
        lines += ["", markdown_text(note)]
    return "\n".join(lines) + "\n"


def markdown_page(title: str, notes: list[str], tables: list[ResultTable]) -> str:
    return "\n".join([f"# {title}", "", *(f"- {markdown_text(note)}" for note in notes), "", *map(markdown, tables)])


def latex(table: ResultTable) -> str:
    """A `table` environment with booktabs' rules, shrunk to the line where it is wider (graphicx), its notes in small
    print under it."""
    columns = "".join("r" if _is_numeric(table, k) else "l" for k in range(len(table.header)))
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{latex_text(table.title)}}}",
        r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
        rf"\begin{{tabular}}{{{columns}}}",
    ]
    rows = [" & ".join(latex_text(str(cell)) for cell in cells) + r" \\" for cells in (table.header, *table.rows)]
    lines += [r"\toprule", rows[0], r"\midrule", *rows[1:], r"\bottomrule", r"\end{tabular}}"]
    if table.notes:
        lines += ["", rf"\smallskip{{\footnotesize {latex_text(' '.join(table.notes))}}}"]
    return "\n".join([*lines, r"\end{table}"]) + "\n"


def latex_page(tables: list[ResultTable]) -> str:
    return "\n".join(["% needs booktabs and graphicx", *map(latex, tables)])


_LATEX = {character: f"\\{character}" for character in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "±": r"$\pm$",
    "ρ": r"$\rho$",
    "β": r"$\beta$",
}


def latex_text(text: str) -> str:
    """Any text as LaTeX shows it; a minus sign before a number is set as one."""
    escaped = "".join(_LATEX.get(character, character) for character in text)
    return re.sub(r"(?<![\w.-])-(?=[\d.])", "$-$", escaped)


def markdown_text(text: str) -> str:
    """Any text as Markdown shows it, in one line."""
    return re.sub(r"([\\|*`]|(?<!\w)_|_(?!\w)|<(?=[a-zA-Z/!?]))", r"\\\1", " ".join(text.split()))


def _is_numeric(table: ResultTable, column: int) -> bool:
    cells = [row[column] for row in table.rows if str(row[column])]
    return bool(cells) and all(isinstance(cell, Number) for cell in cells)
