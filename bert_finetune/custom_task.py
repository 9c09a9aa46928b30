"""A task that the user brings as files: what its columns, its classes or its scores are is found from the data."""

import re
from collections.abc import Iterable

from transformers import PreTrainedConfig

from bert_finetune.checkpoints import class_names
from bert_finetune.errors import InputError
from bert_finetune.glue import Task
from bert_finetune.own_files import OwnFiles
from bert_finetune.paths import ending, several
from bert_finetune.processes import is_main_process
from bert_finetune.tables import NO_HEADER, Table, is_sentence
from bert_finetune.task_kinds import Classification, MultiLabel, Regression, number, plain

# More classes than this, each with hardly an example, are taken for a wrong column.
_MANY_CLASSES = 50
# A column without a name, and what pandas calls one: the numbers of the rows.
_NO_NAME = re.compile(r"(Unnamed: \d+|__index_level_\d+__)?")


def custom_task(
    files: dict[str, str],
    text_columns: tuple[str, ...],
    own_files: OwnFiles,
    regression: bool | None,
    model: PreTrainedConfig,
    fine_tuned: bool,
    unlabelled: bool = False,
) -> Task:
    """The task behind the user's own files, which is printed.

    files: split ("train", "dev", "test") -> path, for the splits there are; the first of them says what the task is. Of
        "train" it may be several paths (see `several`).
    text_columns: one or two; none means the only column beside the labels. own_files: how the files are read.
    regression: whether labels are scores to predict; None: if some are not whole, or as the fine-tuned model has it.
    model, fine_tuned: a fine-tuned model's own classes count, and the labels in the files are matched to them by name,
        or by number (label 1 is its class 1). Otherwise the classes are the different labels in the file.
    Raises InputError for columns that are not there, and labels that are not the model's.
    """
    _settle_several(own_files, regression, model, fine_tuned)
    label_names = own_files.label_names
    split, path = next(iter(files.items()))
    tables = [own_files.read(one) for one in (several("--train_file", path) if split == "train" else [path])]
    if unlabelled:
        tables = [table for table in tables if table.has(label_names)] or tables
    if "dev" in files and split == "train" and not _has_labels(tables, own_files, unlabelled):
        split, path = "dev", files["dev"]
        tables = [own_files.read(path)]
    table = tables[0]
    labelled = split != "test" and not (unlabelled and not table.has(label_names))
    for one in tables if labelled else ():
        for name in label_names:
            one.column(name)
    text_columns = text_columns or only_text_column(table, own_files)
    if len(text_columns) > 2:
        raise InputError(f"--text_column {','.join(text_columns)}: give one column, or two of a pair")
    for name in text_columns:
        table.column(name)
    labels = own_files.settle(tables) if labelled else []
    where = f"{path}, column{'s' * bool(own_files.label_columns)} {', '.join(label_names)}"
    if own_files.several:
        kind = _several_labels(own_files, labels, model, fine_tuned, where)
    elif _is_regression(own_files, labels, regression, model, fine_tuned):
        kind = Regression()
    else:
        classes = _classes_of_model(labels, model, where) if fine_tuned else _classes_of_data(labels, where)
        kind = Classification(classes, writes_names=True)
    if is_main_process():
        for one in tables:
            if ending(one.path) == ".tsv":
                _warn_of_quotes(one, text_columns)
        where = f"labels in {', '.join(label_names)}" if labelled else "no labels"
        print(f"{path}: text in {' and '.join(text_columns)}, {where}; {kind.described(labels)}")
    return Task(
        "custom",
        text_columns,
        kind,
        metric=kind.own_metric,
        figures=kind.own_figures,
        label_column=own_files.label_column,
        train=files.get("train"),
        dev={"dev": files["dev"]} if "dev" in files else {},
        test={"test": files["test"]} if "test" in files else {},
        submission={"test": "predictions.tsv"},
        own_files=own_files,
    )


def _settle_several(own_files: OwnFiles, regression: bool | None, model: PreTrainedConfig, fine_tuned: bool) -> None:
    """Find what is known of `own_files.several` without a look at the files. Raises InputError where the options and a
    fine-tuned model say different things."""
    trained_for = model.problem_type if fine_tuned else None
    one_label = regression or trained_for not in (None, MultiLabel.problem_type)
    if own_files.several and one_label:
        said = "--regression: scores are" if regression else f"the fine-tuned model ({trained_for}) gives"
        raise InputError(f"--label_separator and --label_columns are for several labels a text; {said} one a text")
    if trained_for == MultiLabel.problem_type:
        own_files.several = True
    elif one_label:
        own_files.several = False


def _is_regression(
    own_files: OwnFiles, labels: list[str], regression: bool | None, model: PreTrainedConfig, fine_tuned: bool
) -> bool:
    if fine_tuned:
        if regression is not None and regression != (model.num_labels == 1):
            raise InputError(f"--regression {regression}: the fine-tuned model has {model.num_labels} outputs")
        return model.num_labels == 1
    if regression is None:
        return own_files.numbers and not all(float(label).is_integer() for label in labels)
    return regression


def _several_labels(
    own_files: OwnFiles, labels: list[tuple[str, ...]], model: PreTrainedConfig, fine_tuned: bool, where: str
) -> MultiLabel:
    names = own_files.label_columns or [name for some in labels for name in some]
    if fine_tuned:
        known = set(map(_alike, class_names(model)))
        # A name among others that no class has is reported with its row, where labels are read.
        some_known = [name for name in names if _alike(name) in known]
        classes = _classes_of_model(names if own_files.label_columns else some_known or names, model, where)
        if own_files.label_columns and len(names) < len(classes):
            missing = ", ".join(name for label, name in classes.items() if label not in names)
            raise InputError(f"--label_columns {','.join(names)}: has no column for the model's {missing}")
    elif own_files.label_columns:
        classes = {name: name for name in names}
    else:
        classes = _classes_of_data(names, where)
    if len(classes) < 2:
        raise InputError(f"{where}: several labels a text need two or more classes, and there is {', '.join(classes)}")
    separator = own_files.label_separator
    for name in classes.values():
        if separator in name:
            raise InputError(
                f"{where}: the class {name!r} has in its name what stands between labels, {separator!r}; give another "
                "--label_separator"
            )
    kind = MultiLabel(classes, separator=separator)
    return kind.configured(model.to_dict()) if fine_tuned else kind


def _has_labels(tables: list[Table], own_files: OwnFiles, unlabelled: bool) -> bool:
    """Whether training files say what labels there are. Raises InputError where they lack the labels' column, if they
    may not."""
    if unlabelled and not tables[0].has(own_files.label_names):
        return False
    return any(label is not None for table in tables for label in own_files.labels(table))


def only_text_column(table: Table, own_files: OwnFiles) -> tuple[str, ...]:
    soft = own_files.soft_labels.columns if own_files.soft_labels else ()
    others = [name for name in table.columns if name not in (*own_files.label_names, *soft)]
    named = [name for name in others if not _NO_NAME.fullmatch(name)]
    if len(named) != 1:
        raise InputError(
            f"--text_column is missing: {table.path} has the columns {', '.join(filter(None, table.columns))}; name "
            "the text's, or both of a pair with a comma between them"
        )
    # Where there are labels, their column's name has shown that there is a header.
    if not table.has(own_files.label_names) and is_sentence(named[0]):
        raise InputError(f"{table.path}: {NO_HEADER} (or give this one as --text_column)")
    if len(named) < len(others):
        own_files.say(table, "a column without a name, an index of the rows, is left out")
    return tuple(named)


def _classes_of_data(labels: Iterable[str], where: str) -> dict[str, str]:
    """The different labels, whole numbers by size, others by name."""
    found = set(labels)
    if len(found) < 2:
        raise InputError(f"{where}: needs at least two classes, found {', '.join(found) or 'none'}")
    if len(found) > _MANY_CLASSES and len(labels) < 2 * len(found):
        raise InputError(
            f"{where}: {len(found)} different labels in {len(labels)} rows; is it the right --label_column? Scores "
            "that are whole numbers need --regression"
        )
    numeric = all(number(label) is not None for label in found)
    return {label: label for label in sorted(found, key=(lambda label: (number(label), label)) if numeric else None)}


def _classes_of_model(labels: Iterable[str], model: PreTrainedConfig, where: str) -> dict[str, str]:
    """What the file writes -> the fine-tuned model's class, for all classes in the model's order."""
    names = class_names(model)
    found = set(labels)
    alike = {
        name: [
            label for label in sorted(found) if label == name or (label not in names and _alike(label) == _alike(name))
        ]
        for name in names
    }
    for name, spellings in alike.items():
        if len(spellings) > 1:
            raise InputError(
                f"{where}: {' and '.join(spellings)} both look like the class {name}; write it in one way"
                " (where only the case differs, --merge_case does)"
            )
    by_name = {(alike[name] or [name])[0]: name for name in names}
    if found <= set(by_name):
        return by_name
    by_number = {str(k): name for k, name in enumerate(names)}
    # Numbers that are also names could mean either; and without a 0 they may well be counted from 1.
    if found <= set(by_number) and not found & set(by_name):
        if "0" in found:
            return by_number
        raise InputError(f"{where}: class numbers count from 0, which does not occur; write names: {', '.join(names)}")
    raise InputError(
        f"{where}: its labels ({', '.join(sorted(found)[:8])}) are not the model's classes ({', '.join(names)}); if "
        "they mean the same, say with --class_names what the model's are called in your data, in its order"
    )


def _alike(label: str) -> str:
    """What the spellings of a class have in common."""
    value = number(label)
    return str(int(value)) if value is not None and value.is_integer() else plain(label)


def _warn_of_quotes(table: Table, text_columns: tuple[str, ...]) -> None:
    positions = [table.column(name) for name in text_columns]
    texts = [row[k] for row in table.rows for k in positions if k < len(row)]
    quoted = sum(len(text) > 1 and text[0] == text[-1] == '"' for text in texts)
    if quoted:
        print(
            f"{table.path}: {quoted} of {len(texts)} texts stand in double quotes, which are kept: TSV is read without "
            "quoting, as GLUE's; if they are not part of the text, save the table as .csv"
        )
