"""The user's own files: how they are read, and how the labels in them are spelled, in all files of a run alike."""

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from bert_finetune.errors import InputError
from bert_finetune.processes import is_main_process
from bert_finetune.soft_labels import SoftLabels
from bert_finetune.tables import Table, read_table
from bert_finetune.task_kinds import number

# What programs write where a label is missing, in lower case; the second only among numbers, since a class may be
# called so.
_MISSING = {"", "nan", "<na>"}
_MISSING_NUMBER = {"na", "n/a", "#n/a", "null", "none", "-", "?"}
# What a column of its own holds for a class, in lower case.
_APPLIES, _APPLIES_NOT = ("1", "1.0", "true"), ("0", "0.0", "false")
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_WITH_COMMA = re.compile(r"[+-]?\d*,\d+")
_WHOLE = re.compile(r"([+-]?\d+)\.0*")
# How many pairs of names a message lists.
_LISTED = 10


@dataclass
class OwnFiles:
    """How the user's own files are read; what is found out there is printed, once for each file.

    label_column: of the files that have labels. delimiter: between the fields of CSV files, None: found in each.
    decimal: the sign in front of a label's decimals, "." or ",". merge_case: class names that differ by case only are
    one class. soft_labels: of training files that have such. several: whether a row may have several labels; None: if
    the first label is a list, which `settle` finds. label_separator: between such labels where they are no lists.
    label_columns: in place of `label_column` one a class, which holds 1 where the class applies, else 0.
    """

    label_column: str = "label"
    delimiter: str | None = None
    decimal: str = "."
    merge_case: bool = False
    soft_labels: SoftLabels | None = None
    several: bool | None = None
    label_separator: str = ","
    label_columns: tuple[str, ...] = ()
    # Whether labels are numbers; found by `settle`, as is how names are spelled: in lower case -> as a class is called.
    numbers: bool = field(default=False, init=False)
    _spelling: dict[str, str] = field(default_factory=dict, init=False)
    _said: set[str] = field(default_factory=set, init=False)

    def read(self, path: str | Path) -> Table:
        """A file as it is."""
        table = read_table(path, self.delimiter)
        for note in table.notes:
            self.say(table, note)
        return table

    @property
    def label_names(self) -> tuple[str, ...]:
        """The columns of the labels."""
        return self.label_columns or (self.label_column,)

    def settle(self, tables: list[Table]) -> list[str] | list[tuple[str, ...]]:
        """Find from the first split with labels, its files, how they are spelled in all files. Returns its labels."""
        if self.several is None:
            self.several = isinstance(next(iter(self._known(tables)), None), tuple)
        if self.several:
            self._settle_case(tables[0], Counter(label for labels in self._known(tables) for label in labels))
            return self._known(tables)
        table, found = tables[0], Counter(self._known(tables))
        # None of these once they are known to be numbers.
        real = [label for label in found if label.lower() not in _MISSING_NUMBER]
        self.numbers = bool(real) and all(map(_is_number, real))
        if real and all(_WITH_COMMA.fullmatch(label) or _is_number(label) for label in real) and not self.numbers:
            example = next(label for label in real if "," in label)
            self.say(table, f"warning: labels such as {example} look like numbers with a decimal comma: --decimal ,")
        self._settle_case(table, found)
        return self._known(tables)

    def _known(self, tables: list[Table]) -> list:
        return [label for table in tables for label in self.labels(table) if label is not None]

    def _settle_case(self, table: Table, found: Counter) -> None:
        alike = {}
        for label in found:
            alike.setdefault(label.casefold(), []).append(label)
        several = [" and ".join(sorted(labels)) for labels in alike.values() if len(labels) > 1]
        if several:
            listed = ", ".join(several[:_LISTED]) + (", ..." if len(several) > _LISTED else "")
            fate = "one class each" if self.merge_case else "classes of their own; --merge_case makes them one"
            warning = "" if self.merge_case else "warning: "
            self.say(table, f"{warning}labels that differ by case only ({listed}) are {fate}")
        if self.merge_case:
            self._spelling = {folded: max(labels, key=found.get) for folded, labels in alike.items()}

    def texts(self, table: Table, name: str) -> list[str | None]:
        """The texts of a column; None where there is none. Halves of characters (of an emoji, mostly), which no
        tokenizer takes, are replaced."""
        position, texts, broken = table.column(name), [], []
        for k in range(len(table.rows)):
            text = table.text(k, position)
            if text is not None and _LONE_SURROGATE.search(text):
                text = _LONE_SURROGATE.sub("\ufffd", text)
                broken.append(str(table.numbers[k]))
            texts.append(text)
        if broken:
            where = f"{table.unit} {broken[0]}" if len(broken) == 1 else f"{table.unit}s {', '.join(broken[:5])}"
            more = ", ..." if len(broken) > 5 else ""
            self.say(
                table,
                f"{len(broken)} texts hold half a character, a lone surrogate, which is replaced by \ufffd "
                f"({where}{more})",
            )
        return texts

    def fields(self, table: Table, name: str) -> list[str | None]:
        """A column of texts or labels as a CSV file has it; a list of no labels is the separator alone."""
        if self.label_columns or name != self.label_column or not self.several:
            return self.texts(table, name)
        return [
            labels if labels is None else self.label_separator.join(labels) or self.label_separator
            for labels in self.labels(table)
        ]

    def labels(self, table: Table) -> list[str | tuple[str, ...] | None]:
        """The labels, spelled as `settle` has found; None where there is none. Several are a tuple, which may be empty:
        none of them applies."""
        if self.label_columns:
            return self._marked(table)
        position, labels, trimmed = table.column(self.label_column), [], 0
        for k in range(len(table.rows)):
            entries = None if self.several is False else table.entries(k, position)
            text = None if entries is not None else table.text(k, position)
            if self.several and text is not None and text.strip().lower() not in _MISSING:
                entries = [entry for entry in text.split(self.label_separator) if entry.strip()]
            if entries is not None:
                labels.append(self._tuple(table, k, entries))
                continue
            if text is not None:
                label = _without_blanks(table, k, text)
                trimmed += label != text
                text = self._spelled(self._with_point(table, k, label) if table.rows[k][position] == text else label)
            labels.append(text)
        if trimmed:
            self.say(table, f"{trimmed} labels have blanks around them, which are left out")
        return labels

    def _tuple(self, table: Table, k: int, entries: list[str | None]) -> tuple[str, ...]:
        labels = tuple(self._spelled(_without_blanks(table, k, entry or "")) for entry in entries)
        if None in labels:
            raise InputError(f"{table.place(k)}: one of the labels in column {self.label_column!r} has no name")
        return labels

    def _marked(self, table: Table) -> list[tuple[str, ...] | None]:
        """The names of the `label_columns` that hold 1 in each row; None where all are empty."""
        positions, labels = [table.column(name) for name in self.label_columns], []
        for k in range(len(table.rows)):
            fields = [(table.text(k, position) or "").strip().lower() for position in positions]
            if _MISSING.issuperset(fields):
                labels.append(None)
                continue
            marks = dict(zip(self.label_columns, fields, strict=True))
            for name, mark in marks.items():
                if mark not in (*_APPLIES, *_APPLIES_NOT):
                    raise InputError(f"{table.place(k)}: column {name!r} holds {mark!r}, and must hold 1 or 0")
            labels.append(tuple(name for name, mark in marks.items() if mark in _APPLIES))
        return labels

    def _with_point(self, table: Table, k: int, label: str) -> str:
        if self.decimal == ".":
            return label
        if "." in label and _is_number(label):
            raise InputError(f"{table.place(k)}: {label} has a point, which --decimal , does not allow in numbers")
        return label.replace(",", ".") if _is_number(label.replace(",", ".")) else label

    def _spelled(self, label: str) -> str | None:
        if label.lower() in _MISSING or (self.numbers and label.lower() in _MISSING_NUMBER):
            return None
        if self.numbers and (whole := _WHOLE.fullmatch(label)):
            return str(int(whole[1]))
        return self._spelling.get(label.casefold(), label)

    def say(self, table: Table, finding: str) -> None:
        """Print a finding about a file, in the main process and only once."""
        line = f"{table.path}: {finding}"
        if line not in self._said and is_main_process():
            print(line)
        self._said.add(line)


def _without_blanks(table: Table, k: int, label: str) -> str:
    if _LONE_SURROGATE.search(label):
        raise InputError(f"{table.place(k)}: the label {label!r} holds half a character, a lone surrogate; mend it")
    return " ".join(label.strip("\ufeff\u200b").split())


def _is_number(text: str) -> bool:
    """Whether it is meant as a number, and be it an infinite one."""
    return number(text) is not None or re.fullmatch(r"[+-]?inf(inity)?", text.lower()) is not None
