"""Pack test predictions into a submission to GLUE, and check it as the server would.

    python -m bert_finetune.submission model/*/student                    # what --do_predict wrote -> submission.zip
    python -m bert_finetune.submission model/*/student --output emd.zip
    python -m bert_finetune.submission --check emd.zip                    # only check a zip

The server wants a file for every test set. One for which no folder has predictions is filled with a constant answer, as
BERT's authors did for WNLI: the task's most frequent class (for STS-B two scores in turn). Its score means nothing.
"""

import argparse
import io
import itertools
import posixpath
import sys
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from bert_finetune.errors import DAMAGE, ArgumentParser, InputError, reports_input_errors
from bert_finetune.files import replacing_file
from bert_finetune.glue import CORPORA, TASKS, Task

HEADER = "index\tprediction"
SHOWN = 3  # problems of one file

_ROWS = {file.path: file.rows for corpus in CORPORA for file in corpus.files}

# File name -> the task whose labels it holds, and its number of rows, that of the test file.
FILES: dict[str, tuple[Task, int]] = {
    task.submission[split]: (task, _ROWS[posixpath.normpath(f"{task.name}/{test}")])
    for task in TASKS.values()
    for split, test in task.test.items()
}


def as_file(predictions: Iterable[str]) -> str:
    """A file's text: the header, and a row `index<TAB>prediction` for each prediction."""
    return f"{HEADER}\n" + "".join(f"{index}\t{prediction}\n" for index, prediction in enumerate(predictions))


def filled(name: str) -> bytes:
    """The file `name` with an answer that looks at no text."""
    task, rows = FILES[name]
    return as_file(itertools.islice(itertools.cycle(task.filler), rows)).encode()


def problems(name: str, content: bytes) -> Iterator[str]:
    """What is wrong with the content of the file `name`, from its first line to its last."""
    task, count = FILES[name]
    header, *rows = content.decode("utf-8", "replace").removesuffix("\n").split("\n")
    if header != HEADER:
        yield f"line 1: {header[:60]!r} instead of the header {HEADER!r}"
    if len(rows) != count:
        yield f"{len(rows)} rows instead of {count}"
    for index, row in enumerate(rows):
        number, *prediction = row.split("\t")
        if len(prediction) != 1:
            yield f"line {index + 2}: {row[:60]!r} is not an index, a tab and a prediction"
        elif number != str(index):
            yield f"line {index + 2}: index {number[:60]!r} instead of {index}"
        elif not task.kind.accepts(prediction[0]):
            yield f"line {index + 2}: {prediction[0][:60]!r} is not {task.kind.allowed}"


def first_problems(contents: dict[str, bytes], where: dict[str, str | Path]) -> list[str]:
    """One text for each file of `contents` that is not right: the place that `where` gives, and its first problems."""
    texts = []
    for name, content in contents.items():
        found = list(itertools.islice(problems(name, content), SHOWN + 1))
        if found:
            texts.append(f"{where[name]}, " + ", ".join(found[:SHOWN]) + (", ..." if found[SHOWN:] else ""))
    return texts


def find_predictions(folders: list[str]) -> dict[str, Path]:
    """File name -> where it lies, for the prediction files in `folders`.

    Raises InputError for a folder that is missing or holds none, and for a file that two of them hold.
    """
    found = {}
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder")
        here = [name for name in FILES if (folder / name).is_file()]
        if not here:
            raise InputError(f"{folder}: holds no predictions ({', '.join(FILES)}); write them with --do_predict")
        for name in here:
            if name in found:
                raise InputError(f"{name} is both in {found[name].parent} and in {folder}; leave one of them out")
            found[name] = folder / name
    return found


def pack(folders: list[str], output: Path) -> None:
    """Write the zip `output` of all files, those that no folder holds filled in. An earlier zip is replaced at the end.

    Raises InputError for files that are not right, with what is wrong in each.
    """
    if output.is_dir() or not output.parent.is_dir():
        raise InputError(f"--output {output}: give the name of a zip, in a folder that is there")
    found = find_predictions(folders)
    contents = {name: path.read_bytes() for name, path in found.items()}
    if wrong := first_problems(contents, found):
        raise InputError("; ".join(wrong))
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in FILES:
            archive.writestr(name, contents[name] if name in found else filled(name))
    with replacing_file(output) as aside:
        aside.write_bytes(packed.getvalue())
    for name, (task, _) in FILES.items():
        print(f"{name}: {found.get(name, 'no predictions; filled with ' + ' and '.join(task.filler))}")
    if missing := [name for name in FILES if name not in found]:
        print(
            f"warning: {', '.join(missing)}: filled without a model; their scores, and an average over all tasks, mean "
            "nothing",
            file=sys.stderr,
        )
    print(f"{output}: {len(FILES)} files, as the server takes them")


def check_zip(path: Path) -> None:
    """Raise InputError for a zip that the server would not take, with what is wrong in each of its files."""
    with path.open("rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                names = archive.namelist()
                contents = {name: archive.read(name) for name in FILES if name in names}
        except DAMAGE as error:
            raise InputError(f"{path}: not a readable zip ({error})") from error
    missing = [name for name in FILES if name not in names]
    surplus = [name for name in names if name not in FILES or names.count(name) > 1]
    wrong = [f"{', '.join(missing)} not at its top level"] if missing else []
    wrong += [f"{', '.join(map(repr, surplus[:5]))} to be removed"] if surplus else []
    wrong += first_problems(contents, {name: name for name in FILES})
    if wrong:
        raise InputError(f"{path}: {'; '.join(wrong)}")
    print(f"{path}: {len(FILES)} files, as the server takes them")


@reports_input_errors
def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("folders", nargs="*", metavar="FOLDER", help="folder with files that --do_predict wrote")
    parser.add_argument("--output", default="submission.zip", metavar="ZIP", help="to write (default: %(default)s)")
    parser.add_argument("--check", metavar="ZIP", help="only check this one")
    options = parser.parse_args(argv)
    if bool(options.folders) == (options.check is not None):
        parser.error("give the folders whose predictions to pack, or --check and a zip")
    if options.folders:
        pack(options.folders, Path(options.output))
    else:
        check_zip(Path(options.check))


if __name__ == "__main__":
    main()
