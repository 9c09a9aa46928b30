"""The options of fine-tuning, most of which distillation has too. Nothing here imports torch: --help needs them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from transformers.hf_argparser import HfArg

from bert_finetune.errors import InputError
from bert_finetune.glue import Task, get_task
from bert_finetune.option_rules import has_gpu
from bert_finetune.paths import ending
from bert_finetune.task_kinds import plain

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from bert_finetune.own_files import OwnFiles
    from bert_finetune.run_arguments import RunArguments
    from bert_finetune.soft_labels import SoftLabels


# Options that may differ when a run goes on: they decide where things lie, what is said, sent, measured beside, and on
# what machine it is computed, but none of its numbers. Of what the paths lead to, digests are compared.
MAY_CHANGE = """
    output_dir overwrite_output_dir resume_from_checkpoint data_dir train_file validation_file test_file agreement_file
    unlabeled_file corpus corpus_cache_dir dataset_name dataset_config train_split validation_split test_split
    model_name_or_path teacher_model student_model teacher_cache teacher_cache_dir teacher_cache_limit
    do_train do_eval do_predict probabilities
    per_device_train_batch_size per_device_eval_batch_size eval_accumulation_steps save_steps save_total_limit
    logging_dir logging_first_step logging_steps logging_strategy log_level log_level_replica log_on_each_node
    disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id trackio_static_space_id
    skip_memory_metrics include_num_input_tokens_seen use_cpu local_rank ddp_backend ddp_timeout
    ddp_bucket_cap_mb ddp_find_unused_parameters ddp_broadcast_buffers ddp_static_graph dataloader_num_workers
    dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
    dataloader_multiprocessing_context torch_empty_cache_steps push_to_hub hub_model_id hub_revision
    hub_private_repo hub_always_push hub_strategy hub_token evaluate_during_training
""".split()


@dataclass
class ModelArguments:
    """Which model to fine-tune, or to look at."""

    model_name_or_path: str = HfArg(help="Folder of a model, or its name on the hub.")
    model_type: str | None = HfArg(
        default=None, help="Expected architecture (bert, roberta, ...); a model of another one is refused."
    )


@dataclass
class TaskArguments:
    """Which task: one of GLUE's with the folder of its files, or your own files."""

    task_name: str | None = HfArg(
        default=None, help="GLUE task: CoLA, SST-2, MRPC, STS-B, QQP, MNLI, QNLI, RTE or WNLI (any case)."
    )
    data_dir: str | None = HfArg(
        default=None,
        help="Folder of the GLUE task's official files (train.tsv, dev.tsv, ...), or the folder that holds one such "
        "folder per task. MNLI's diagnostic set is looked for beside its folder (diagnostic/diagnostic.tsv).",
    )
    train_file: str | None = HfArg(
        default=None,
        help="Your own training data, and no --task_name; several files with commas between, a pattern "
        "(train-*.csv), or a folder of .parquet files: .csv, .tsv (without quoting), .jsonl or .json (an object a "
        "line, or one list of objects), .parquet; each also packed, with .gz or .zst behind that.",
    )
    validation_file: str | None = HfArg(default=None, help="Your own dev data, in any of these formats.")
    test_file: str | None = HfArg(
        default=None, help="Your own data to predict, in any of these formats; needs no labels."
    )
    dataset_name: str | None = HfArg(
        default=None,
        help="In place of files: a dataset of the Hugging Face hub, or a folder as the hub has them. Code that a "
        "dataset may have is never run.",
    )
    dataset_config: str | None = HfArg(default=None, help="Which of the dataset's configurations, if it has several.")
    train_split: str = HfArg(default="train", help="The dataset's split to train on.")
    validation_split: str = HfArg(default="validation", help="Its dev split.")
    test_split: str = HfArg(default="test", help="Its split to predict.")
    text_column: str | None = HfArg(
        default=None,
        help="Column of the text in your files, or both of a pair (premise,hypothesis); left out, the only one beside "
        "the labels.",
    )
    label_column: str = HfArg(
        default="label", help="Column of the labels in your files: class names, class numbers, or scores to predict."
    )
    label_separator: str | None = HfArg(
        default=None,
        help="Your texts may have several labels each, and this stands between them in --label_column (funny,sad), and "
        "in predictions (there a comma, if left out). Not needed where the labels are lists, as JSON and Parquet have "
        "them, or where a fine-tuned model gives several.",
    )
    label_columns: str | None = HfArg(
        default=None,
        help="In place of --label_column a column for each class (funny,sad,good), which holds 1 where the class "
        "applies to a text, else 0; several may.",
    )
    delimiter: str | None = HfArg(
        default=None, help="What stands between the fields of your .csv files; left out, found in their first lines."
    )
    decimal: Literal[".", ","] = HfArg(default=".", help="The sign before the decimals of the labels in your files.")
    merge_case: bool = HfArg(
        default=False, help="Labels in your files that differ by case only (Good, good) are one class."
    )
    regression: bool | None = HfArg(
        default=None,
        metadata={"nargs": "?", "const": True},
        help="Your labels are scores to predict, not classes; left out, they are if some are not whole numbers.",
    )
    class_names: str | None = HfArg(
        default=None,
        help="What the outputs of a fine-tuned model (a teacher) are called, in their order (negative,positive), where "
        "it calls them LABEL_0, LABEL_1, ... or otherwise than your data.",
    )
    max_seq_length: int = HfArg(
        default=128,
        help="Longest input in tokens, special tokens included; the longer sentence of a pair is cut first.",
    )
    do_lower_case: bool | None = HfArg(
        default=None,
        metadata={"nargs": "?", "const": True},
        help="Lower-case the text (False: do not); left out, the tokenizer's own setting counts.",
    )

    def __post_init__(self):
        files = any((self.train_file, self.validation_file, self.test_file))
        if [bool(self.task_name), files, bool(self.dataset_name)].count(True) != 1:
            raise InputError(
                "give --task_name with --data_dir, or --train_file, --validation_file and --test_file, or "
                "--dataset_name"
            )
        if self.dataset_config and not self.dataset_name:
            raise InputError("--dataset_config: of which dataset? Give --dataset_name")
        if self.task_name and not self.data_dir:
            raise InputError("--data_dir is missing: the folder of the task's files")
        names = [plain(name) for name in self.output_names]
        if self.class_names is not None and ("" in names or len(set(names)) < max(2, len(names))):
            raise InputError(f"--class_names {self.class_names}: give two or more names, all different")
        if self.task_name and (self.delimiter or self.decimal != "." or self.merge_case):
            raise InputError("--delimiter, --decimal and --merge_case are for your own files, and not GLUE's")
        if self.task_name and (self.label_separator or self.label_columns):
            raise InputError("--label_separator and --label_columns are for your own files, and not GLUE's")
        if self.label_separator == "":
            raise InputError("--label_separator: give what stands between the labels, such as ';'")
        if self.delimiter is not None:
            self.delimiter = {"\\t": "\t", "tab": "\t"}.get(self.delimiter, self.delimiter)
            if len(self.delimiter) != 1 or self.delimiter in '"\r\n':
                raise InputError(f"--delimiter {self.delimiter}: must be one character, such as ';', or tab")
            if not self._has_csv:
                raise InputError("--delimiter: none of your files is a .csv")

    @property
    def _own_files(self) -> dict[str, str]:
        if self.dataset_name:
            return {"train": self.train_split, "dev": self.validation_split, "test": self.test_split}
        files = {"train": self.train_file, "dev": self.validation_file, "test": self.test_file}
        return {split: path for split, path in files.items() if path}

    @property
    def _has_csv(self) -> bool:
        return any(ending(part.strip()) == ".csv" for paths in self._own_files.values() for part in paths.split(","))

    @property
    def name(self) -> str:
        """GLUE's name for the task, or "custom"."""
        return get_task(self.task_name).name if self.task_name else "custom"

    @property
    def output_names(self) -> list[str]:
        """What `class_names` says; empty where it is left out."""
        return [] if self.class_names is None else [name.strip() for name in self.class_names.split(",")]

    def load_task(
        self,
        model: "PreTrainedConfig",
        fine_tuned: bool,
        splits: list[str],
        unlabelled: bool = False,
        soft_labels: "SoftLabels | None" = None,
    ) -> Task:
        """The task; what the user's own files say of it is found with the help of the model it is for, and printed.

        `splits`: which of "train", "dev" and "test" the run reads. unlabelled: training rows need no labels.
        soft_labels: what training files of the user's own have of them.
        Raises InputError where there is no file for one.
        """
        if self.output_names and not fine_tuned:
            raise InputError("--class_names: is for a model that is fine-tuned already; leave it out for training")
        if self.task_name and soft_labels:
            raise InputError(f"{soft_labels.option}: is for your own files, and not GLUE's; give --train_file")
        if self.task_name:
            return get_task(self.task_name)
        from bert_finetune.checkpoints import name_outputs
        from bert_finetune.custom_task import custom_task

        for split, option in (("train", "--train_file"), ("dev", "--validation_file"), ("test", "--test_file")):
            if split in splits and split not in self._own_files:
                raise InputError(f"{option} is missing")
        if self.output_names:
            model = name_outputs(model, self.output_names)
        files = {split: path for split, path in self._own_files.items() if split in splits}
        if self.dataset_name:
            from bert_finetune.hub_datasets import dataset_file

            files = {
                split: str(dataset_file(self.dataset_name, self.dataset_config, name)) for split, name in files.items()
            }
        return custom_task(
            files,
            _names(self.text_column),
            self.reader(soft_labels),
            self.regression,
            model,
            fine_tuned,
            unlabelled,
        )

    def reader(self, soft_labels: "SoftLabels | None" = None) -> "OwnFiles":
        """How files of the user's own are read."""
        from bert_finetune.own_files import OwnFiles

        return OwnFiles(
            *(self.label_column.strip(), self.delimiter, self.decimal, self.merge_case, soft_labels),
            several=True if self.label_separator or self.label_columns else None,
            label_separator=self.label_separator or ",",
            label_columns=_names(self.label_columns),
        )

    @property
    def remembered(self) -> list[str]:
        """The options that a look at a finished model has from its training, as far as they have to do with these
        files. The model itself knows its classes and its tokenizer's case."""
        names = ["max_seq_length", "bf16", "fp16"]
        if self._own_files:
            names += ["text_column", "label_column", "label_separator", "label_columns", "decimal", "merge_case"]
        if self.dataset_name:
            names += ["dataset_config", "train_split", "validation_split", "test_split"]
        if self._has_csv:
            names.append("delimiter")
        return names

    def file(self, name: str) -> Path:
        """Where the task's file `name` lies: in `data_dir` or in its sub-folder for the task; a file of the user's own
        is where its name says. (Of training files there may be several: `several` finds them.)"""
        if not self.task_name:
            return Path(name)
        nested = Path(self.data_dir) / self.name / name
        return nested if nested.exists() else Path(self.data_dir) / name


def _names(listed: str | None) -> tuple[str, ...]:
    """Names of columns, with commas between."""
    return tuple(name.strip() for name in (listed or "").split(",") if name.strip())


def options_of_run(folder: str) -> dict:
    """All options that a finished model was trained with, from the `args.json` beside it; empty where it is none of
    these scripts'."""
    try:
        options = json.loads((Path(folder) / "args.json").read_text(encoding="utf-8"))["options"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return options if isinstance(options, dict) else {}


def defaults_of_run(folder: str, task_args: TaskArguments, run: "RunArguments", *more: str) -> dict:
    """How a finished model was trained, as far as it counts for looking at it in `run`: of its options those that
    `task_args` remembers, and `more`."""
    options = options_of_run(folder)
    found = {name: options[name] for name in (*task_args.remembered, *more) if name in options}
    if found.get("fp16") and not has_gpu(run):
        print(f"{folder}: trained in float16, which needs a GPU; looked at in float32")
        found["fp16"] = False
    return found


@dataclass
class RunOptions:
    """What this project says about options of transformers' `TrainingArguments`: its own defaults, the option names of
    the BERT-EMD scripts, and a few more. `bert_finetune.run_arguments.RunArguments` has them and all the others.

    A run evaluates on the dev set and saves a checkpoint at the end of each epoch, or every `eval_steps` steps, and
    ends with the checkpoint that was best by the task's GLUE metric.
    """

    output_dir: str = HfArg(default="trainer_output", help="Folder of the run: model, results, checkpoints.")
    do_train: bool = HfArg(default=False, help="Train.")
    fp16: bool = HfArg(default=False, help="Mixed precision in float16 (a GPU's).")
    do_eval: bool = HfArg(default=False, help="Evaluate on the dev set; after training that is done anyway.")
    do_predict: bool = HfArg(default=False, help="Write predictions for the test set, as the GLUE server wants them.")
    probabilities: bool = HfArg(
        default=False,
        help="With --do_predict, also write a .probabilities.csv: the test file's texts, its labels where it has them, "
        "and a column for each class, as --probability_columns takes them.",
    )

    per_device_train_batch_size: int = HfArg(
        default=32, aliases=["--per_gpu_train_batch_size", "--train_batch_size"], help="Training batch per device."
    )
    per_device_eval_batch_size: int = HfArg(
        default=64, aliases=["--per_gpu_eval_batch_size", "--eval_batch_size"], help="Evaluation batch per device."
    )
    warmup_steps: float = HfArg(
        default=0.1,
        aliases=["--warmup_proportion"],
        help="Linear warm-up from 0 to the learning rate: a number of steps, or a share of all steps if below 1.",
    )
    eval_steps: float | None = HfArg(
        default=None,
        aliases=["--eval_step"],
        help="Evaluate and save a checkpoint every so many steps, not at the end of each epoch.",
    )
    save_steps: float | None = HfArg(
        default=None, help="Same as --eval_steps, which wins where both are given: every evaluation saves."
    )
    evaluate_during_training: bool = HfArg(
        default=False, help="Evaluate and save every --save_steps steps (500 if not given)."
    )
    eval_strategy: str | None = HfArg(
        default=None, help="When to evaluate: epoch, steps or no; left out, steps if a number of steps is given."
    )
    save_strategy: str | None = HfArg(
        default=None, help="When to save a checkpoint: epoch, steps or no; left out, whenever there is an evaluation."
    )
    save_total_limit: int | None = HfArg(
        default=1, help="Checkpoints to keep in --output_dir beside the best one; the finished model lies beside them."
    )
    train_sampling_strategy: str = HfArg(
        default="group_by_length",
        help="Training batches of similar length (group_by_length), which wastes little on padding, or random.",
    )
    lr_scheduler_type: str = HfArg(
        default="linear",
        aliases=["--schedule"],
        help="Learning rate after the warm-up: linear (down to 0), constant_with_warmup, or another of "
        "transformers' schedules; constant has no warm-up.",
    )
    class_weights: Literal["none", "balanced"] = HfArg(
        default="none",
        help="balanced: in the labels' loss rare classes count as much as frequent ones. Of n rows and k classes, each "
        "of the n_c rows of class c counts n / (k n_c); where texts have several labels, (n - n_c) / n_c.",
    )
    dataloader_drop_last: bool = HfArg(
        default=False, help="Leave out each epoch's last training batch where it is smaller than the others."
    )
    metric_for_best_model: str | None = HfArg(
        default=None, help="Dev figure that chooses the best checkpoint; left out, the task's GLUE metric."
    )
    load_best_model_at_end: bool = HfArg(
        default=True, help="End with the checkpoint that was best on the dev set, by the task's GLUE metric."
    )
    torch_compile: bool = HfArg(
        default=False,
        help="Compile what gains by it, once for all lengths: on a GPU the models, and in distillation on a CPU the "
        "comparison of layers (the models gain nothing there). Takes a minute at the start and needs a C++ compiler.",
    )
    use_cpu: bool = HfArg(default=False, aliases=["--no_cuda"], help="Run on the CPU even where there is a GPU.")
    resume_from_checkpoint: str | None = HfArg(
        default=None,
        metadata={"nargs": "?", "const": "last"},
        help="Go on from this checkpoint folder; without a value, from the last complete one in --output_dir (from "
        "the start where there is none). The run must be the same; --num_train_epochs and --max_steps may be larger, "
        f"and these may differ: {', '.join(MAY_CHANGE)}.",
    )
    overwrite_output_dir: bool = HfArg(default=False, help="Replace the run that --output_dir already holds.")
    report_to: str | None = HfArg(default="tensorboard", help="Where to log: tensorboard, wandb, ..., or none.")
    logging_steps: float = HfArg(default=50, help="Log the losses every so many steps.")
    dataloader_pin_memory: bool | None = HfArg(
        default=None,
        metadata={"nargs": "?", "const": True},
        help="Pin batches in host memory, which speeds up the copy to a GPU; left out, where there is one.",
    )
    push_to_hub: bool = HfArg(
        default=False,
        help="At the end, send the model in --output_dir with its card, figures, args.json and log to the hub, as "
        "--hub_model_id (public, but with --hub_private_repo True or where an organisation's rule says otherwise); "
        "HF_TOKEN must be a token that may write.",
    )
    hub_strategy: str = HfArg(default="end", help="Nothing else than the finished folder is sent: end.")
    hub_token: str | None = HfArg(
        default=None, help="Refused, since the command is kept in args.json and the model card: set HF_TOKEN."
    )
    # Both are this project's business: a NaN stops the run, and its datasets hold nothing but model inputs.
    logging_nan_inf_filter: bool = HfArg(default=False, help="Leave NaN losses out of the log; here they end the run.")
    remove_unused_columns: bool = HfArg(default=False, help="Drop data columns that the model does not take.")
