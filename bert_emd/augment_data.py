r"""Make more training rows, for a teacher to answer: the rows as they are, and copies with some words replaced.

    python bert_emd/augment_data.py --task_name RTE --data_dir glue_data --masked_lm bert-base-uncased \
        --output train_aug.tsv
    python bert_emd/augment_data.py --train_file train.csv --text_column premise,hypothesis --label_column answer \
        --masked_lm bert-base-uncased --word_vectors glove.42B.300d.txt --output train_aug.csv

This is TinyBERT's augmentation (Jiao et al., Findings of EMNLP 2020), for each row of a task's training file. All other
columns, labels too, are copied. A run that was cut goes on when the same command is given again.
"""

import argparse
from pathlib import Path

from bert_finetune.arguments import TaskArguments
from bert_finetune.errors import ArgumentParser, InputError, reports_input_errors

SUFFIXES = (".tsv", ".csv", ".jsonl")


@reports_input_errors
def main(argv: list[str] | None = None) -> None:
    options = parser().parse_args(argv)
    task = _checked(options)

    from bert_emd.augmentation import augment

    augment(options, task)


def parser() -> ArgumentParser:
    """The script's options."""
    options = ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = options.add_argument
    add("--task_name", help="GLUE task; its training file is augmented")
    add("--data_dir", help="folder of the task's official files, or of all tasks' folders")
    add("--train_file", help="your own files in place of these, as the training scripts take them, plain text too")
    add("--text_column", help="column of the text, or both of a pair; left out, the only one beside the labels")
    add("--label_column", default="label", help="column of the labels, if there is one (default: %(default)s)")
    add("--label_columns", help="in its place one a class, of several labels a text, with commas between")
    add("--delimiter", help="what stands between the fields of your .csv files; left out, it is found")
    add("--masked_lm", metavar="MODEL", help="masked language model that finds candidates: a folder or a hub name")
    add(
        "--word_vectors",
        metavar="FILE_OR_MODEL",
        help="candidates for words of several pieces: a file in GloVe's format, of which the first 100,000 lines are "
        "read, or a model whose word embeddings are the vectors; for all words where --masked_lm is left out",
    )
    add("--output", type=Path, required=True, metavar="FILE", help=f"to write: {', '.join(SUFFIXES)}; GLUE's .tsv")
    add("--overwrite", action="store_true", help="replace this file if it is there")
    add("--copies", type=int, help="copies of a row, at most (default: TinyBERT's for the task, 10 to 30; else 20)")
    add("--candidates", type=int, default=15, help="candidates for a word (default: %(default)s)")
    add("--probability", type=float, default=0.4, help="of a word being replaced in a copy (default: %(default)s)")
    add(
        "--faithful",
        action="store_true",
        help="TinyBERT's candidates, a word hidden at a time, its order for pairs",
    )
    add("--batch_size", type=int, default=100, help="sentences in a forward pass (default: %(default)s)")
    add("--seed", type=int, default=42, help="of what is drawn (default: %(default)s)")
    return options


def _checked(options: argparse.Namespace) -> TaskArguments:
    """The task that the options say. Raises InputError for options that cannot be."""
    if bool(options.task_name) == bool(options.train_file):
        raise InputError("give --task_name with --data_dir, or --train_file")
    if not (options.masked_lm or options.word_vectors):
        raise InputError("give --masked_lm, a masked language model that finds candidates, or --word_vectors, or both")
    for name, least in (("copies", 1), ("candidates", 1), ("batch_size", 1), ("seed", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise InputError(f"--{name} {value}: must be {least} or more")
    if not 0 < options.probability <= 1:
        raise InputError(f"--probability {options.probability}: must be above 0 and at most 1")
    if options.output.suffix.lower() not in (SUFFIXES[:1] if options.task_name else SUFFIXES):
        raise InputError(
            f"--output {options.output}: must end in "
            + (".tsv, the format of GLUE's files" if options.task_name else " or ".join(SUFFIXES))
        )
    if options.output.exists() and not (options.overwrite and options.output.is_file()):
        raise InputError(f"--output {options.output}: is there already; give another name, or --overwrite")
    names = ("task_name", "data_dir", "train_file", "text_column", "label_column", "label_columns", "delimiter")
    return TaskArguments(**{name: getattr(options, name) for name in names})


if __name__ == "__main__":
    main()
