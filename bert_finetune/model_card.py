"""The README.md of an output folder: what the model is, what it does and costs, and how it was made."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from bert_finetune.files import write_atomically
from bert_finetune.footprint import Footprint
from bert_finetune.glue import Task
from bert_finetune.paths import command_for_others, for_others

_HOW = "## How it was made"
# How a card of ours is told from a README that the user wrote.
_MARK = "<!-- written at the end of a run; a README.md without this line is left alone -->"


@dataclass(frozen=True)
class CardRow:
    """A row of the card's table: a model, its dev figures (as the trainer names them), its footprint."""

    name: str
    model: PreTrainedModel
    figures: dict[str, float]
    footprint: Footprint


def write_model_card(
    folder: str | Path, task: Task, origin: str, models: list[CardRow], conditions: str, picture: str | None = None
) -> None:
    """Write `folder`/README.md, unless the user has put one there.

    origin: what the model was made from. models: the teacher where there is one, and, last, the model in `folder`, with
    the figures of what is saved. conditions: how times were taken. picture: file name of the flow between the layers of
    both. The command, seed and versions come from the run's args.json.
    """
    text = [origin, "", *_table(models), "", conditions, ""]
    if picture:
        text += [f"![Average flow between student and teacher layers]({picture})", ""]
        text += ["The share, in per cent, of all weight that moved between each student and teacher layer.", ""]
    text += ["## Use", "", "```python", "from transformers import pipeline", ""]
    text.append(f'classify = pipeline("text-classification", model="{for_others(folder)}")')
    example = '{"text": "...", "text_pair": "..."}' if len(task.columns) > 1 else '"..."'
    text += [f"classify({example})", "```", ""]
    text += [task.kind.use, ""] if task.kind.use else []
    _write(Path(folder), models[-1].model, "text-classification", _subject(task), text)


def write_encoder_card(folder: str | Path, origin: str, model: PreTrainedModel) -> None:
    """The same for a student that has learnt no task yet."""
    use = f'python bert_emd/emd_task_distill.py --student_model "{for_others(folder)}" --teacher_model ...'
    text = [origin, "", "## Use", "", "Distil a teacher of your task into it:", "", "```", use, "```", ""]
    _write(Path(folder), model, "feature-extraction", "distillation, without a task yet", text)


def _write(folder: Path, model: PreTrainedModel, pipeline: str, purpose: str, body: list[str]) -> None:
    path = folder / "README.md"
    if path.exists() and _MARK not in path.read_text(encoding="utf-8", errors="replace"):
        print(f"{path}: not written by a run, and left as it is; no model card")
        return
    run = json.loads((folder / "args.json").read_text(encoding="utf-8"))
    source = model.config.name_or_path
    text = ["---", "library_name: transformers", f"pipeline_tag: {pipeline}"]
    if source and not Path(source).exists():
        text.append(f"base_model: {source}")
    # A comment, since the hub checks that a licence is one it knows.
    text += ["# license: yours to fill in; those of the base model and of the training data apply", "---"]
    text += ["", f"# {model.config.num_hidden_layers}-layer {model.config.model_type} for {purpose}", "", *body]
    text += [_HOW, "", "```", command_for_others(run["command"]), "```", "", f"Seed {run['seed']}."]
    text += [
        "Versions: " + ", ".join(f"{name} {version}" for name, version in run["versions"].items()) + ".",
        "",
        _MARK,
    ]
    write_atomically(path, "\n".join(text) + "\n")


def name_in_card(folder: Path, name: str) -> None:
    """Let a card of ours load the model by its `name` on the hub, where it has named a folder."""
    path = folder / "README.md"
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    if _MARK in text:
        place = r'(pipeline\("text-classification", model=|emd_task_distill.py --student_model )"[^"]*"'
        write_atomically(path, re.sub(place, rf'\1"{name}"', text))


def put_section(folder: Path, title: str, lines: list[str]) -> bool:
    """Put a section into a card of ours, ahead of how the model was made, in place of one of that title. Returns
    whether there is such a card."""
    path = folder / "README.md"
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    if _MARK not in text or _HOW not in text:
        return False
    text = re.sub(rf"^## {re.escape(title)}\n.*?(?=^## )", "", text, flags=re.MULTILINE | re.DOTALL)
    before, how = text.split(_HOW, 1)
    section = "\n".join([f"## {title}", "", *lines, "", ""])
    write_atomically(path, before + section + _HOW + how)
    return True


def _subject(task: Task) -> str:
    return task.kind.subject if task.name == "custom" else f"{task.name} ({task.kind.subject})"


def _table(models: list[CardRow]) -> list[str]:
    figures = [key for key in models[-1].figures if not key.endswith("loss")]
    header = ["model", *(key.removeprefix("eval_") for key in figures)]
    header += ["layers x width", "parameters", "weights", "a sentence", "speed-up"]
    rows = [header, ["---"] * len(header)]
    for row in models:
        config, cost = row.model.config, row.footprint
        rows.append(
            [
                row.name,
                *(f"{row.figures[key]:.4f}" if key in row.figures else "" for key in figures),
                f"{config.num_hidden_layers} x {config.hidden_size}",
                f"{cost.parameters / 1e6:.1f}M",
                f"{cost.megabytes:.1f} MB",
                f"{cost.milliseconds:.2f} ms",
                f"{models[0].footprint.milliseconds / cost.milliseconds:.1f} x",
            ]
        )
    return ["| " + " | ".join(row) + " |" for row in rows]
