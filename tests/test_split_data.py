"""A task's labelled rows, split in three."""

import pytest
from glue_files import write_task

from bert_finetune.glue import get_task
from experiments.split_data import main, read_rows


def rows(path, task):
    return read_rows(path, get_task(task))[1]


@pytest.mark.parametrize("task", ["RTE", "CoLA"])
def test_no_row_is_in_two_places(task, tmp_path):
    write_task(tmp_path / "glue" / task, task, train=90, dev=60)
    command = ["--data_dir", tmp_path / "glue", "--tasks", task, "--choose_rows", 10, "--test_rows", 70]
    dev = rows(tmp_path / "glue" / task / "dev.tsv", task)
    all_rows = {*rows(tmp_path / "glue" / task / "train.tsv", task), *dev}
    for more in ([], ["--train_rows", 12]):
        out = tmp_path / f"out{len(more)}"
        main([*map(str, [*command, *more, "--output_dir", out])])
        folders = [out / part / task for part in ("choose", "test")]
        train, again = (rows(folder / "train.tsv", task) for folder in folders)
        choose, test = (rows(folder / "dev.tsv", task) for folder in folders)
        assert train == again and len(choose) == 10 and len(test) == 70 and set(dev) <= set(test)
        assert not set(train) & set(choose) and not set(train) & set(test) and not set(choose) & set(test)
        rest = [line for line in (folders[0] / "rest.txt").read_text().split("\n") if line]
        taken = {*train, *choose, *test}
        assert len(train) == (12 if more else len(all_rows) - 80)
        left = [row for row in all_rows if row not in taken]
        assert len(rest) == (len(left) * (2 if task == "RTE" else 1) if more else 0)
        assert all(any(text in row.split("\t") for row in left) for text in rest)


def test_too_few_rows(tmp_path, exits_with_2):
    write_task(tmp_path / "RTE", "RTE", train=20)
    line = exits_with_2(main, "--data_dir", tmp_path, "--tasks", "RTE", "--output_dir", tmp_path / "out")
    assert "rows are too few for --choose_rows" in line
