"""What a model's card says of its export: PyTorch, float and int8 side by side, and how to use them."""

from pathlib import Path

from bert_finetune.glue import Task
from bert_finetune.paths import for_others
from deploy.formats import Format


def card_section(form: Format, folder: Path, task: Task, said: dict) -> tuple[str, list[str]]:
    """Title and lines of the section on an export in `folder`, from what its export.json has `said`."""
    keys = [key for key in said["figures"]["torch"] if not key.endswith("loss")]
    header = ["", *(_heading(key) for key in keys), "MB", "ms a sentence", "speed-up"]
    rows = [header, ["---"] * len(header)]
    for what, figures in said["figures"].items():
        milliseconds = said["milliseconds"][what]
        rows.append(
            [
                f"`{said['files'][what]}`" if what in said["files"] else "PyTorch",
                *(f"{figures[key]:.4f}" for key in keys),
                f"{said['megabytes'][what]:.1f}",
                f"{milliseconds:.2f}",
                f"{said['milliseconds']['torch'] / milliseconds:.1f} x",
            ]
        )
    where, pair = for_others(folder), len(task.columns) > 1
    text = '("...", "...")' if pair else '"..."'
    return f"Exported to {form.called}", [
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
        f"Figures are of the dev set; times of a batch of {said['timed']}, in turns. `deploy/classify.py` runs the "
        f"graphs in `{folder.name}/` without PyTorch and transformers, in Python or from the command line:",
        "",
        "```python",
        "from deploy.classify import Classifier",
        "",
        f'classify = Classifier("{where}")',
        f"classify([{text}])",
        "```",
        "",
        "```",
        f"python deploy/classify.py --model {where} " + ('"..." "..."' if pair else '"..."'),
        "```",
        "",
        "The exports have the model's licence.",
    ]


def _heading(key: str) -> str:
    return (
        key.removeprefix("eval_")
        .replace("student_agreement", "as PyTorch")
        .replace("agreement", "as the teacher")
        .replace("_as", " as")
    )
