"""Made-up rows in the official format of each GLUE task."""

import random
from pathlib import Path

WORDS = """
    the a an cat dog house bird man woman child red blue green old new big small runs sleeps eats sings jumps sees knows
    is was not and or in on under over near far very quite today tomorrow film book song good bad dull bright . , ?
""".split()

_MNLI_ORIGIN = ["promptID", "pairID", "genre"]
_PARSES = ["sentence1_binary_parse", "sentence2_binary_parse", "sentence1_parse", "sentence2_parse"]
_MNLI = ["index", *_MNLI_ORIGIN, *_PARSES, "sentence1", "sentence2"]
_MNLI_LABELS = ["contradiction", "entailment", "neutral"]
_STS = ["index", "genre", "filename", "year", "old_index", "source1", "source2", "sentence1", "sentence2"]
_PAIR = ["index", "sentence1", "sentence2"]

# Per task: columns of train and dev (None: no header line), columns of test, label values.
FORMATS = {
    "CoLA": (None, ["index", "sentence"], ["0", "1"]),
    "SST-2": (["sentence", "label"], ["index", "sentence"], ["0", "1"]),
    "MRPC": (
        ["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"],
        ["index", "#1 ID", "#2 ID", "#1 String", "#2 String"],
        ["0", "1"],
    ),
    "STS-B": ([*_STS, "score"], _STS, ["0.000", "1.250", "2.600", "4.000", "5.000"]),
    "QQP": (
        ["id", "qid1", "qid2", "question1", "question2", "is_duplicate"],
        ["id", "question1", "question2"],
        ["0", "1"],
    ),
    "MNLI": ([*_MNLI, "label1", "gold_label"], _MNLI, _MNLI_LABELS),
    "QNLI": (
        ["index", "question", "sentence", "label"],
        ["index", "question", "sentence"],
        ["entailment", "not_entailment"],
    ),
    "RTE": ([*_PAIR, "label"], _PAIR, ["entailment", "not_entailment"]),
    "WNLI": ([*_PAIR, "label"], _PAIR, ["0", "1"]),
}
_TEXT = {"sentence", "sentence1", "sentence2", "question", "question1", "question2", "#1 String", "#2 String"}
_LABEL = {"label", "score", "Quality", "is_duplicate", "gold_label"}


def sentence(rng: random.Random, words: int = 9) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(3, words)))


def rows(task: str, split: str, count: int, seed: int = 0) -> list[list[str]]:
    """Made-up rows, header left out; labels go round, and a sentence's first word tells a little about the label."""
    labelled, unlabelled, labels = FORMATS[task]
    rng = random.Random(f"{task} {split} {seed}")
    columns = (labelled or ["source", "label", "mark", "sentence"]) if split != "test" else unlabelled
    made = []
    for index in range(count):
        label = labels[index % len(labels)]
        row = []
        for column in columns:
            if column in _TEXT:
                row.append(f"{WORDS[labels.index(label) * 7]} {sentence(rng)}")
            else:
                row.append(label if column in _LABEL else str(index))
        made.append(row)
    return made


def write_tsv(path: Path, header: list[str] | None, lines: list[list[str]], bom: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join("\t".join(line) + "\n" for line in ([header] if header else []) + lines)
    path.write_text(("\ufeff" if bom else "") + text, encoding="utf-8", newline="")


def write_task(folder: Path, task: str, train: int = 24, dev: int = 12, test: int = 6, seed: int = 0) -> Path:
    """All files of a task; for MNLI also those of the diagnostic set, beside its folder."""
    labelled, unlabelled, _ = FORMATS[task]
    parts = ["matched", "mismatched"] if task == "MNLI" else [""]
    write_tsv(folder / "train.tsv", labelled, rows(task, "train", train, seed), bom=task == "MRPC")
    for part in parts:
        suffix = f"_{part}" if part else ""
        write_tsv(folder / f"dev{suffix}.tsv", labelled, rows(task, f"dev{part}", dev, seed), bom=task == "MRPC")
        write_tsv(folder / f"test{suffix}.tsv", unlabelled, rows(task, "test", test, seed))
    if task == "MNLI":
        write_tsv(folder.parent / "diagnostic" / "diagnostic.tsv", FORMATS["RTE"][1], rows("RTE", "test", test, seed))
    return folder
