"""Soft labels in the user's own files: what some teacher, an ensemble, or several people said of each row."""

import json
import math
from dataclasses import dataclass

from bert_finetune.errors import InputError
from bert_finetune.processes import is_main_process
from bert_finetune.tables import Table
from bert_finetune.task_kinds import LARGEST_SCORE, TaskKind, number, plain

# A training row's soft label, as logits, in a dataset.
TEACHER_LOGITS = "teacher_logits"


@dataclass(frozen=True)
class SoftLabels:
    """The columns that hold soft labels: one for each output of a task, or a single one with a list of all.

    option: whose value the columns are, for messages. are_logits: whether they hold logits, not probabilities.
    """

    option: str
    columns: tuple[str, ...]
    are_logits: bool = False

    def are_in(self, table: Table) -> bool:
        """Whether a file has any of the columns."""
        return any(name in table.columns for name in self.columns)

    def read(self, table: Table, kind: TaskKind) -> list[list[float]]:
        """Each row's soft label as logits, in the order of the kind's outputs.

        Columns that are called as the outputs, with the same before each (p_good of good), are taken by name, others in
        the outputs' order.
        Raises InputError that names the row for values that are missing or cannot be soft labels.
        """
        positions = [table.column(name) for name in self.columns]
        order = self._order(kind)
        rows = []
        for k in range(len(table.rows)):
            try:
                values = self._row(table, k, positions)
                if len(values) != kind.outputs:
                    raise ValueError(f"{len(values)} values where the outputs are {kind.wanted}")
                values = [values[position] for position in order]
                rows.append(values if self.are_logits else kind.logits_of_probabilities(values))
            except (ValueError, RecursionError) as error:
                raise InputError(f"{table.place(k)}: {', '.join(self.columns)}: {error}") from error
        if is_main_process():
            names = [self.columns[position] for position in order] if len(self.columns) > 1 else self.columns
            of = "logits" if self.are_logits else "probabilities"
            print(f"{table.path}: {of} of {kind.wanted} in {', '.join(names)}")
        return rows

    def _row(self, table: Table, k: int, positions: list[int]) -> list[float]:
        row = table.rows[k]
        fields = [row[position] if position < len(row) else None for position in positions]
        if len(fields) == 1 and isinstance(fields[0], str) and fields[0].lstrip().startswith("["):
            fields = [json.loads(fields[0])]
        if len(fields) == 1 and isinstance(fields[0], list):
            fields = fields[0]
        return [_value(field) for field in fields]

    def _order(self, kind: TaskKind) -> list[int]:
        """order[k]: which value of a row is of the kind's output k."""
        as_they_are = list(range(kind.outputs))
        if len(self.columns) == 1:
            return as_they_are
        if len(self.columns) != kind.outputs:
            raise InputError(f"{self.option}: {len(self.columns)} columns where the outputs are {kind.wanted}")
        for spelled in (str, plain):  # names that differ by case only are told apart where they can be
            names, outputs = [[spelled(name) for name in some] for some in (self.columns, kind.output_names)]
            for output in outputs:
                wanted = [names[0].removesuffix(output) + each for each in outputs]
                if len(set(names)) == len(names) and sorted(wanted) == sorted(names):
                    return [names.index(name) for name in wanted]
        return as_they_are


def _value(field) -> float:
    if field is None or field == "" or (isinstance(field, float) and math.isnan(field)):
        raise ValueError("a value is missing")
    value = number(str(field))
    if value is None:
        raise ValueError(f"{field!r} is not a number")
    if abs(value) > LARGEST_SCORE:
        raise ValueError(f"{field!r} is too large for float32 and its square")
    return value
