"""Named sets of defaults: `--recipe` chooses one, and an option given on the command line wins over it.

`recommended` is what we would run today, in bfloat16 where the hardware has it; docs/does-emd-help.md says which of its
values were chosen by measurement. `authors-2022` and `authors-2020` switch on everything that the published code did
then and that changes results (see docs/fidelity.md); under them β, T_emd, T and the learning rate come from the
authors' table of best-performing models, by the student's number of layers and the task.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class HyperParameters:
    """A cell of the authors' table: β (layer losses), T_emd (cost attention), T (prediction loss), learning rate."""

    beta: float
    T_emd: float
    T: float
    learning_rate: float


# The authors' table "for best-performing models" (their README, 2022); α is 1 in every cell.
BEST = {
    (4, "CoLA"): HyperParameters(0.001, 5, 1, 2e-5),
    (4, "MNLI"): HyperParameters(0.005, 1, 3, 5e-5),
    (4, "MRPC"): HyperParameters(0.001, 10, 1, 2e-5),
    (4, "QQP"): HyperParameters(0.005, 1, 3, 2e-5),
    (4, "QNLI"): HyperParameters(0.005, 1, 3, 2e-5),
    (4, "RTE"): HyperParameters(0.005, 1, 1, 2e-5),
    (4, "SST-2"): HyperParameters(0.001, 1, 1, 2e-5),
    (4, "STS-B"): HyperParameters(0.005, 1, 1, 3e-5),
    (6, "CoLA"): HyperParameters(0.001, 1, 7, 2e-5),
    (6, "MNLI"): HyperParameters(0.005, 1, 1, 5e-5),
    (6, "MRPC"): HyperParameters(0.005, 1, 1, 2e-5),
    (6, "QQP"): HyperParameters(0.005, 1, 1, 2e-5),
    (6, "QNLI"): HyperParameters(0.001, 1, 1, 5e-5),
    (6, "RTE"): HyperParameters(0.005, 1, 1, 2e-5),
    (6, "SST-2"): HyperParameters(0.001, 1, 1, 2e-5),
    (6, "STS-B"): HyperParameters(0.005, 1, 1, 3e-5),
}

# Of `recommended`, for any task: students cut from the teacher (--student_layers alone) need less than others.
CUT = {"alpha": 0.5, "beta": 1.0, "T": 1.0, "learning_rate": 1e-4, "num_train_epochs": 5}
OTHERS = {"alpha": 0.5, "beta": 10.0, "T": 1.0, "learning_rate": 3e-4, "num_train_epochs": 10}

# Sequence length per task, as the authors' code lists it; it then does not use it: see _AUTHORS.
LENGTHS = {"CoLA": 64, "SST-2": 64}  # all others 128

# What the authors' code does and `recommended` does not: see docs/fidelity.md for each.
_AUTHORS = {
    "objective": "published",
    "weight_momentum": 0.0,
    "teacher_mode": "train",
    "head": "relu",
    "projection": "shared",
    "optimizer": "bert_adam",
    "weight_decay": 0.01,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0.0,
    "pad_to_max_length": True,
    "count_padding": True,
    "max_seq_length": 64,
    "num_train_epochs": 10,
    "train_sampling_strategy": "random",
    "dataloader_drop_last": True,
    "eval_steps": 50,
}

# By which dev figure their code chooses the best checkpoint, where that is not the one GLUE reports.
AUTHORS_CHOOSE_BY = {"MRPC": "accuracy", "QQP": "accuracy", "STS-B": "corr"}

RECIPES = {
    "recommended": {},
    "authors-2022": _AUTHORS | {"cost_attention": "normalize"},
    "authors-2020": _AUTHORS | {"cost_attention": "softmax2"},
}


def has_bf16(use_cpu: bool) -> bool:
    """Whether the hardware multiplies bfloat16 numbers itself, which is what makes --bf16 faster."""
    import torch

    if use_cpu or not torch.accelerator.is_available():
        # An older torch cannot say.
        capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def recipe_defaults(recipe: str, student_layers: int, task: str, cut: bool = False, pred_distill: bool = False) -> dict:
    """Option defaults of `recipe` for a student on `task` (GLUE's name, or the user's own).

    cut: the student is the teacher's own layers, which `recommended` looks at. The authors' recipes look at the number
    of `student_layers` and the task: their table knows students of 4 and 6 layers, up to 4 use the column for 4, more
    the one for 6, and a task that is not in it, WNLI or the user's own, has RTE's values, which most tasks share. Their
    code has a learning-rate schedule only in the second of two stages (`pred_distill`).
    """
    if recipe == "recommended":
        return {"max_seq_length": LENGTHS.get(task, 128)} | (CUT if cut else OTHERS)
    size = 4 if student_layers <= 4 else 6
    defaults = vars(BEST.get((size, task), BEST[size, "RTE"])) | RECIPES[recipe]
    if task in AUTHORS_CHOOSE_BY:
        defaults["metric_for_best_model"] = AUTHORS_CHOOSE_BY[task]
    if pred_distill:
        defaults |= {"lr_scheduler_type": "linear", "warmup_steps": 0.1}
    return defaults
