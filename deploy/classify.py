"""Classify texts with an exported student: from the command line, a file of any size, or in Python.

    python deploy/classify.py --model model/SST-2/student/onnx "a gripping film"
    python deploy/classify.py --model model/QQP/student/onnx "How do I cook?" "What is a way to cook?"
    python deploy/classify.py --model my-small-classifier/onnx --input reviews.csv --output answers.csv
    cat lines.txt | python deploy/classify.py --model model/SST-2/student/onnx

Needs onnxruntime and tokenizers (pip install onnxruntime tokenizers), neither torch nor transformers, and no other file
of this project: copy it to where students serve. What was exported with --format openvino needs openvino in place of
onnxruntime. A line that is read from the terminal's stdin is a text, or the two of
a pair with a tab between them. A file is .csv, .tsv (without quoting) or .jsonl; its answers have a row for each of its
rows. In Python:

    from deploy.classify import Classifier
    classify = Classifier("model/SST-2/student/onnx")
    classify(["a gripping film"])        # [{"label": "positive", "probabilities": {"negative": 0.02, ...}}]

A student that gives a text several labels, or none, answers {"labels": ["funny", "sad"], "probabilities": {...}}: those
whose probability is above their threshold.
"""

import argparse
import contextlib
import csv
import importlib
import io
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Encoding, Tokenizer
from tqdm import tqdm  # comes with tokenizers

FILES = INT8, FLOAT, OPENVINO = "model_quantized.onnx", "model.onnx", "openvino_model.xml"
# So many batches are read at a time, and dealt out by length.
_BATCHES_AT_ONCE = 64
# Of broken lines that are skipped, so many are named one by one.
_MOST_NAMED = 10

Texts = tuple[str, ...]
"""A text, or the two of a pair."""


class WrongInput(Exception):
    """What a user gave is not usable; the message is one line."""


class OnnxGraph:
    """An ONNX file, run by onnxruntime: called with a batch's arrays by their names, which `inputs` lists, it gives the
    logits (texts, outputs). threads: None, one for each core. spin: whether threads wait for work by asking for it,
    which is the fastest where nothing else wants the cores."""

    def __init__(self, path: Path, threads: int | None = None, spin: bool = True):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spin)))
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.inputs = [found.name for found in self._session.get_inputs()]

    def __call__(self, batch: dict[str, np.ndarray]) -> np.ndarray:
        return self._session.run(["logits"], batch)[0]


class OpenVinoGraph:
    """The same of an OpenVINO model; its threads never wait so."""

    def __init__(self, path: Path, threads: int | None = None, spin: bool = True):
        import openvino

        # In full precision, also on a processor that computes faster in bfloat16.
        settings = {"INFERENCE_PRECISION_HINT": "f32"} | ({"INFERENCE_NUM_THREADS": threads} if threads else {})
        self._model = openvino.Core().compile_model(path, "CPU", settings)
        self.inputs = [found.any_name for found in self._model.inputs]

    def __call__(self, batch: dict[str, np.ndarray]) -> np.ndarray:
        return self._model(batch)["logits"]


def batch_of(graph: OnnxGraph | OpenVinoGraph, ids: np.ndarray) -> dict[str, np.ndarray]:
    """A batch (texts, tokens) without padding, of single texts."""
    batch = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    return {name: batch[name] for name in graph.inputs}


@dataclass(frozen=True)
class Engine:
    """What runs the files of one ending: a Python package, by its name, and how it opens them."""

    package: str
    open: type[OnnxGraph] | type[OpenVinoGraph]


ENGINES = {".onnx": Engine("onnxruntime", OnnxGraph), ".xml": Engine("openvino", OpenVinoGraph)}


def files_of(path: Path) -> list[Path]:
    """A model's file, and the one that an OpenVINO model has its weights in."""
    return [found for found in (path, path.with_suffix(".bin")) if found.is_file()]


class Classifier:
    """An exported student.

    folder: the one that deploy/export_student.py has written. file: one of its models; left out, the first that is
    there of model_quantized.onnx, model.onnx and openvino_model.xml. threads: of a batch; left out, one for each core.
    """

    def __init__(self, folder: str | Path, file: str | None = None, threads: int | None = None):
        folder = Path(folder)
        path = folder / (file or next((name for name in FILES if (folder / name).is_file()), FLOAT))
        config, export = _read_json(folder / "config.json"), _read_json(folder / "export.json")
        self.names = [config["id2label"][key] for key in sorted(config["id2label"], key=int)]
        self.has_several = config.get("problem_type") == "multi_label_classification"
        self.thresholds = np.array(config.get("thresholds") or [0.5] * len(self.names))
        self.max_seq_length = export["max_seq_length"]
        self.text_columns = export.get("text_columns", [])
        self.file = path.name
        engine = ENGINES.get(path.suffix)
        if engine is None:
            raise WrongInput(f"{path}: no model of an export; these end in {' or '.join(ENGINES)}")
        try:
            importlib.import_module(engine.package)
        except ImportError as error:
            raise WrongInput(f"{path}: needs {engine.package}: pip install {engine.package}") from error
        try:
            self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            self._graph = engine.open(path, threads)
        except Exception as error:  # all raise plain ones
            raise WrongInput(f"{folder}: cannot be loaded: {str(error).splitlines()[0]}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    @property
    def is_regression(self) -> bool:
        """Whether answers are scores, and not classes."""
        return len(self.names) == 1

    def __call__(self, texts: Iterable[str | Texts], batch_size: int = 32) -> list[dict]:
        """An answer for each text, or pair of texts: `{"label": ..., "probabilities": {name: ...}}`, of a regression
        `{"score": ...}`; where texts have several labels, `{"labels": [...], "probabilities": {name: ...}}`."""
        pairs = [(text,) if isinstance(text, str) else tuple(text) for text in texts]
        if len({len(pair) for pair in pairs}) > 1:
            raise WrongInput("give all texts, or all pairs")
        return [self.answer(logits) for logits in self.logits(pairs, batch_size)]

    def answer(self, logits: np.ndarray) -> dict:
        """Of one text, from its logits (outputs,)."""
        if self.is_regression:
            return {"score": float(logits[0])}
        if self.has_several:
            chances = np.exp(-np.logaddexp(0, -logits.astype(np.float64)))
            labels = [name for name, applies in zip(self.names, chances > self.thresholds, strict=True) if applies]
            return {"labels": labels, "probabilities": dict(zip(self.names, chances.tolist(), strict=True))}
        shares = np.exp(logits.astype(np.float64) - logits.max())
        shares /= shares.sum()
        probabilities = dict(zip(self.names, shares.tolist(), strict=True))
        return {"label": self.names[int(logits.argmax())], "probabilities": probabilities}

    def logits(self, pairs: list[Texts], batch_size: int = 32) -> np.ndarray:
        """(texts, outputs), in their order; batches are of similar length."""
        encodings = self.encode(pairs)
        order = sorted(range(len(pairs)), key=lambda k: len(encodings[k].ids))
        found = np.zeros((len(pairs), len(self.names)), np.float32)
        for begin in range(0, len(order), batch_size):
            rows = order[begin : begin + batch_size]
            found[rows] = self._graph(self._batch([encodings[k] for k in rows]))
        return found

    def encode(self, pairs: list[Texts]) -> list[Encoding]:
        """As in training (bert_finetune/data.py, `tokenize`): of a pair that is too long the longer text is cut first,
        and of an odd total the first keeps the extra token."""
        columns = [list(texts) for texts in zip(*pairs, strict=True)]
        room = self.max_seq_length - self._tokenizer.num_special_tokens_to_add(len(columns) == 2)
        tokens = [self._tokenizer.encode_batch(texts, add_special_tokens=False) for texts in columns]
        encodings = []
        for first, *second in zip(*tokens, strict=True):
            for text in second:
                text.truncate(min(len(text.ids), max(room // 2, room - len(first.ids))))
            first.truncate(room - sum(len(text.ids) for text in second))
            encodings.append(self._tokenizer.post_process(first, *second))
        return encodings

    def _batch(self, encodings: list[Encoding]) -> dict[str, np.ndarray]:
        parts = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
        shape = len(encodings), max(len(encoding.ids) for encoding in encodings)
        batch = {name: np.zeros(shape, np.int64) for name in self._graph.inputs}
        for name, array in batch.items():
            for row, encoding in zip(array, encodings, strict=True):
                row[: len(encoding.ids)] = getattr(encoding, parts[name])
        return batch


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise WrongInput(f"{path}: {reason}; give the folder that deploy/export_student.py has written") from error


@dataclass(frozen=True)
class Line:
    """A line of the input: its `texts`, or (None) the `fault` for which it has none."""

    number: int
    texts: Texts | None
    fault: str = ""


def read_lines(file: Iterable[str]) -> Iterator[Line]:
    """Plain lines: a text each, or two with a tab between them, as in the first line."""
    width = None
    for number, line in enumerate(file, start=1):
        texts = tuple(line.rstrip("\r\n").split("\t"))
        width = width or min(len(texts), 2)
        yield _line(number, texts if len(texts) == width else f"{len(texts)} texts where there should be {width}")


def read_tsv(file: Iterable[str], columns: list[str]) -> Iterator[Line]:
    """Fields between tabs, without quoting, below a header."""
    return _below_header(((k, line.rstrip("\r\n").split("\t")) for k, line in enumerate(file, start=1)), columns)


def read_csv(file: Iterable[str], columns: list[str], delimiter: str = ",") -> Iterator[Line]:
    """Fields between commas, below a header. A blank line is a row only where there is one column."""
    reader = csv.reader(file, delimiter=delimiter, strict=True)

    def rows() -> Iterator[tuple[int, list[str] | str]]:
        while True:
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                row = f"not CSV: {error}"
            yield reader.line_num, row

    return _below_header(rows(), columns)


def _below_header(rows: Iterator[tuple[int, list[str] | str]], columns: list[str]) -> Iterator[Line]:
    header = next(rows, (1, []))[1]
    places = _places(header, columns)
    for number, row in rows:
        if row == [] and len(header) > 1:
            continue
        row = row or [""]
        if isinstance(row, str):
            yield _line(number, row)
        elif len(row) != len(header):
            yield _line(number, f"{len(row)} fields where the header has {len(header)}")
        else:
            yield _line(number, tuple(row[place] for place in places))


def _places(header: list[str] | str, columns: list[str]) -> list[int]:
    names = [name.strip() for name in header] if isinstance(header, list) else []
    if not columns and len(names) == 1:
        return [0]
    missing = [name for name in columns if name not in names]
    if missing or not columns:
        what = f"there is no column {missing[0]}" if missing else "--text_column is missing"
        raise WrongInput(f"{what}; the columns are {', '.join(names) or 'none'}")
    return [names.index(name) for name in columns]


def read_jsonl(file: Iterable[str], columns: list[str]) -> Iterator[Line]:
    """An object a line. The first one says what columns there are."""
    known = False
    for number, line in enumerate(file, start=1):
        try:
            found = json.loads(line)
        except ValueError as error:
            yield _line(number, f"not JSON: {error}")
            continue
        if not isinstance(found, dict):
            yield _line(number, "no object")
            continue
        if not known:
            _places(list(found), columns)
            columns, known = columns or list(found), True
        texts = tuple(found.get(name) for name in columns)
        good = all(isinstance(text, str) for text in texts)
        yield _line(number, texts if good else f"no text in {' or '.join(columns)}")


def _line(number: int, found: Texts | str) -> Line:
    if isinstance(found, str):
        return Line(number, None, found)
    if any("\udc80" <= sign <= "\udcff" for text in found for sign in text):  # see `_open`
        return Line(number, None, "not UTF-8")
    return Line(number, found)


READERS: dict[str, Callable[[Iterable[str], list[str]], Iterator[Line]]] = {
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".jsonl": read_jsonl,
}


def _open(path: Path) -> io.TextIOWrapper:
    # What is no UTF-8 becomes signs that no text has, so that the line it is in can be named.
    newline = "" if _is_csv(path) else None
    return open(path, encoding="utf-8-sig", errors="surrogateescape", newline=newline)


def _is_csv(path: Path) -> bool:
    return path.suffix.lower() == ".csv"


def chunks(lines: Iterator[Line], size: int) -> Iterator[list[Line]]:
    """All lines, so many at a time."""
    while chunk := list(itertools.islice(lines, size)):
        yield chunk


class BrokenLine(WrongInput):
    """A line that has no text, and that is not to be skipped."""


def classified(
    classifier: Classifier, lines: Iterator[Line], batch_size: int, skip: Callable[[Line], None]
) -> Iterator[dict | None]:
    """An answer for each line, None for one without texts, for which `skip` is called before; the memory this takes
    does not grow with the lines."""
    for chunk in chunks(lines, batch_size * _BATCHES_AT_ONCE):
        broken = next((k for k, line in enumerate(chunk) if line.texts is None), len(chunk))
        try:
            for line in chunk[broken:]:
                if line.texts is None:
                    skip(line)
        except BrokenLine:  # what came before it is still answered
            yield from _answers(classifier, chunk[:broken], batch_size)
            raise
        yield from _answers(classifier, chunk, batch_size)


def _answers(classifier: Classifier, lines: list[Line], batch_size: int) -> Iterator[dict | None]:
    logits = iter(classifier.logits([line.texts for line in lines if line.texts is not None], batch_size))
    for line in lines:
        yield None if line.texts is None else classifier.answer(next(logits))


# How answers are written: made with the file and the classifier, called with each answer.


def _labels(answer: dict) -> list[str]:
    return answer["labels"] if "labels" in answer else [answer["label"]]


def _plain(file: io.TextIOBase, classifier: Classifier) -> Callable[[dict | None], None]:
    """The label and its probability with a tab between them, of several labels with commas between these; or the score.
    An empty line for no answer."""

    def write(answer: dict | None) -> None:
        if answer is None:
            file.write("\n")
        elif "score" in answer:
            file.write(f"{answer['score']:.4f}\n")
        else:
            shares = (f"{answer['probabilities'][label]:.4f}" for label in _labels(answer))
            file.write(f"{','.join(_labels(answer))}\t{','.join(shares)}\n")

    return write


def _table(delimiter: str) -> Callable[[io.TextIOBase, Classifier], Callable[[dict | None], None]]:
    """A row for each answer: the label, or several with commas between, and the probability of each class; or the
    score."""

    def begin(file: io.TextIOBase, classifier: Classifier) -> Callable[[dict | None], None]:
        writer, names = csv.writer(file, delimiter=delimiter, lineterminator="\n"), classifier.names
        header = ["score"] if classifier.is_regression else ["labels" if classifier.has_several else "label", *names]
        writer.writerow(header)

        def write(answer: dict | None) -> None:
            if answer is None:
                writer.writerow([""] * len(header))
            elif "score" in answer:
                writer.writerow([f"{answer['score']:.6f}"])
            else:
                shares = (f"{answer['probabilities'][name]:.6f}" for name in names)
                writer.writerow([",".join(_labels(answer)), *shares])

        return write

    return begin


def _json_lines(file: io.TextIOBase, classifier: Classifier) -> Callable[[dict | None], None]:
    return lambda answer: file.write(json.dumps(answer, ensure_ascii=False) + "\n")


WRITERS = {".csv": _table(","), ".tsv": _table("\t"), ".jsonl": _json_lines}


def main(argv: list[str] | None = None) -> None:
    options = read_options(argv)
    try:
        classify(options)
    except (WrongInput, OSError) as error:
        if isinstance(error, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        said = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else error
        print(f"classify.py: error: {said}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("classify.py: interrupted", file=sys.stderr)
        sys.exit(130)


def read_options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="the onnx folder of an exported student")
    parser.add_argument("text", nargs="*", help="a text, or the two of a pair; without it and --input, stdin is read")
    parser.add_argument("--input", type=Path, help=f"a file: {', '.join(READERS)}")
    parser.add_argument(
        "--text_column", default="", help="its column of the text, or both of a pair (premise,hypothesis)"
    )
    parser.add_argument("--delimiter", help="what stands between the fields of a .csv file (a comma)")
    parser.add_argument("--output", type=Path, help=f"where the answers go: {', '.join(WRITERS)} (default: stdout)")
    parser.add_argument(
        "--file", help=f"which model of the folder (default: the first there of {INT8}, {FLOAT}, {OPENVINO})"
    )
    parser.add_argument("--batch_size", type=int, default=32, help="texts at a time (32)")
    parser.add_argument("--threads", type=int, help="of a batch (default: one for each core)")
    parser.add_argument("--skip_bad_lines", action="store_true", help="go on past broken lines; their answer is empty")
    options = parser.parse_args(argv)
    if len(options.text) > 2 or (options.text and options.input):
        parser.error("give one text, the two of a pair, or --input")
    if options.batch_size < 1 or (options.threads is not None and options.threads < 1):
        parser.error("--batch_size and --threads: give 1 or more")
    if options.delimiter and not (len(options.delimiter) == 1 and options.input and _is_csv(options.input)):
        parser.error("--delimiter: give one character, and a .csv file as --input")
    if options.output and options.input and options.output.exists() and options.output.samefile(options.input):
        parser.error(f"{options.output}: would replace the --input")
    for path, known in ((options.input, READERS), (options.output, WRITERS)):
        if path and path.suffix.lower() not in known:
            parser.error(f"{path}: must be one of {', '.join(known)}")
    return options


def classify(options: argparse.Namespace) -> None:
    """All that the options ask for."""
    classifier = Classifier(options.model, options.file, options.threads)
    columns = [name.strip() for name in options.text_column.split(",") if name.strip()]
    skipped = []

    def skip(line: Line) -> None:
        where = f"{options.input or 'stdin'}, line {line.number}: {line.fault}"
        if not options.skip_bad_lines:
            raise BrokenLine(f"{where}; what is before it is answered, and --skip_bad_lines goes on past it")
        skipped.append(line.number)
        if len(skipped) <= _MOST_NAMED:
            tqdm.write(f"{where}; skipped", file=sys.stderr)

    with contextlib.ExitStack() as stack:
        if options.text:
            lines = iter([Line(1, tuple(options.text))])
        elif options.input:
            file = stack.enter_context(_open(options.input))
            size = options.input.stat().st_size
            bar = stack.enter_context(tqdm(total=size, unit="B", unit_scale=True, disable=None))
            read = READERS[options.input.suffix.lower()]
            more = {"delimiter": options.delimiter} if options.delimiter else {}
            lines = _of(options.input, read(_watched(file, bar), columns or classifier.text_columns, **more))
            lines = itertools.chain(list(itertools.islice(lines, 1)), lines)  # wrong columns show before output begins
        else:
            stdin = io.TextIOWrapper(sys.stdin.buffer, encoding="utf-8", errors="surrogateescape")
            lines = read_lines(stdin)
        out, begin = sys.stdout, _plain
        if options.output:
            out = stack.enter_context(open(options.output, "w", encoding="utf-8", newline=""))
            begin = WRITERS[options.output.suffix.lower()]
        write = begin(out, classifier)
        for answer in classified(classifier, lines, options.batch_size, skip):
            write(answer)
        out.flush()
    if skipped:
        print(f"{len(skipped)} broken lines skipped", file=sys.stderr)


def _of(path: Path, lines: Iterator[Line]) -> Iterator[Line]:
    try:
        yield from lines
    except WrongInput as error:
        raise WrongInput(f"{path}: {error}") from error


def _watched(file: io.TextIOWrapper, bar: tqdm) -> Iterator[str]:
    for line in file:
        bar.update(len(line.encode("utf-8", "surrogateescape")))
        yield line


if __name__ == "__main__":
    main()
