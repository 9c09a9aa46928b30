"""Split a task's labelled rows in three: to train on, to choose options by, and to test what was chosen.

    python experiments/split_data.py --data_dir glue_data --tasks CoLA,STS-B --output_dir model/splits

writes `choose/<task>/` and `test/<task>/`, two folders in the task's own format with the same training file. In
`choose` the dev set is a slice of the training rows that training does not see; in `test` it is the official dev set,
enlarged by further training rows where it is small (--test_rows). Which row goes where depends on its text alone. Texts
of rows that --train_rows leaves out go into `rest.txt` of both, a text a line with empty lines between: text without
labels.
"""

import argparse
import hashlib
from pathlib import Path

from bert_finetune.errors import ArgumentParser, InputError, reading, reports_input_errors
from bert_finetune.files import write_atomically
from bert_finetune.glue import TASKS, Task, get_task


@reports_input_errors
def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, default=Path("glue_data"), help="where the tasks' folders lie")
    parser.add_argument("--tasks", default="CoLA,STS-B", help=f"of {', '.join(TASKS)} (default CoLA,STS-B)")
    parser.add_argument("--choose_rows", type=int, default=1000, help="rows to choose by (default 1000)")
    parser.add_argument("--test_rows", type=int, default=0, help="rows to test on, at least the dev set's (default)")
    parser.add_argument("--train_rows", type=int, help="most rows to train on (default: all that are left)")
    parser.add_argument("--output_dir", type=Path, required=True, help="where choose/ and test/ go")
    options = parser.parse_args(argv)
    for name in options.tasks.split(","):
        split_task(get_task(name.strip()), options)


def split_task(task: Task, options: argparse.Namespace) -> None:
    """Write one task's two folders. Raises InputError where there are too few rows."""
    if len(task.dev) > 1:
        raise InputError(f"--tasks {task.name}: has {len(task.dev)} dev sets; choose a task with one")
    source = options.data_dir / task.name
    (dev_name,) = task.dev.values()
    header, rows = read_rows(source / task.train, task)
    _, test = read_rows(source / dev_name, task)
    rows.sort(key=lambda row: hashlib.sha256(row.encode()).digest())
    more = max(0, options.test_rows - len(test))
    test, choose, train = (
        test + rows[:more],
        rows[more : more + options.choose_rows],
        rows[more + options.choose_rows :],
    )
    train, rest = train[: options.train_rows], train[options.train_rows :] if options.train_rows else []
    columns = task.headerless or header[0].split("\t")
    texts = [row.split("\t")[columns.index(name)] for row in rest for name in task.columns]
    if not train:
        raise InputError(f"{source / task.train}: {len(rows)} rows are too few for --choose_rows and --test_rows")
    for folder, dev in (("choose", choose), ("test", test)):
        target = options.output_dir / folder / task.name
        target.mkdir(parents=True, exist_ok=True)
        write_atomically(target / task.train, "\n".join([*header, *train, ""]))
        write_atomically(target / dev_name, "\n".join([*header, *dev, ""]))
        write_atomically(target / "rest.txt", "\n\n".join([*texts, ""]))
    print(f"{task.name}: {len(train)} rows to train on, {len(choose)} to choose by, {len(test)} to test on")


def read_rows(path: Path, task: Task) -> tuple[list[str], list[str]]:
    """The header's line, if the task's files have one, and the others, as they stand."""
    with reading(str(path)):
        lines = path.read_text(encoding="utf-8-sig").replace("\r\n", "\n").split("\n")
    lines = [line for line in lines if line]
    return ([], lines) if task.headerless else (lines[:1], lines[1:])


if __name__ == "__main__":
    main()
