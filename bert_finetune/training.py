"""transformers' Trainer for one task: its figures, batches of similar length, a stop at NaN."""

import copy
import errno
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import DataLoader, Sampler
from tqdm.auto import tqdm
from transformers import DataCollatorWithPadding, EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase, Trainer
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import PredictionOutput

from bert_finetune.checkpoints import restore_weights, save_weights
from bert_finetune.errors import InputError, reading, writing
from bert_finetune.files import remove
from bert_finetune.glue import Task
from bert_finetune.outputs import forget_replaced_run
from bert_finetune.processes import share_of_step
from bert_finetune.run_arguments import RunArguments
from bert_finetune.run_checkpoints import (
    begin,
    checkpoint_name,
    checkpoints,
    complete,
    keep,
    last_checkpoint,
    seconds_at,
)
from bert_finetune.samplers import LengthGroupedBatches, longest_first, share_batches
from bert_finetune.task_kinds import SMALLER_IS_BETTER
from bert_finetune.training_log import Means, QuietProgress, evaluation_line, is_figure

# Devices on which compiled models gain nothing. On 2 CPU cores a forward pass of BERT-base (32 x 128) took 5.8 s
# compiled and 6.5 s as it is, a training step of a 4 x 312 student 1.9 and 1.5 s; both took a minute to compile.
_NOT_COMPILED = ("cpu",)


def check_batch(args: RunArguments, train_dataset: Dataset) -> None:
    """Raise InputError where no training batch would be left."""
    batch = args.train_batch_size * args.world_size
    if args.dataloader_drop_last and len(train_dataset) < batch:
        raise InputError(
            f"--dataloader_drop_last: the training file has {len(train_dataset)} rows, fewer than a batch of {batch}"
        )


@dataclass(frozen=True)
class Answers:
    """A model's `logits` (examples, outputs) for a dataset, in the order of its file, and, where there are such, the
    `labels` and a teacher's logits."""

    logits: np.ndarray
    labels: np.ndarray | None
    teacher_logits: np.ndarray | None


@dataclass(frozen=True)
class Measurement:
    """What a model gives: `figures` as the trainer names them, and its answers for each dataset, by what the names of
    the set's figures begin with."""

    figures: dict[str, float]
    answers: dict[str, Answers]


# What is used of transformers' private parts, for want of public ones: `_get_train_sampler` and `_get_eval_sampler`,
# to order the examples; `_save_checkpoint`, `_get_output_dir`, `_load_best_model`, `_load_from_checkpoint`,
# `_load_optimizer_and_scheduler` and `_load_rng_state`, to have checkpoints written whole, found, read, and named where
# they are damaged; `TrainingArguments._n_gpu`; `PreTrainedModel._supports_attention_backend`;
# `PreTrainedConfig._attn_implementation`.
class TaskTrainer(Trainer):
    """A Trainer for one task.

    `dev`: dev split name -> dataset; with more than one (MNLI) every figure carries the split's name. `held_out`: one
    more dataset, with labels or without, for `measure` alone; its figures are called `test_...`. `teacher_logits`: a
    teacher's answers for these datasets, by what the names of their figures begin with; with them, the figures of
    `TaskKind.agreement` are measured too. `experiment`: what the run is, for its checkpoints. The losses that a step
    computes go to the log and, as means since the last evaluation, into the evaluation's line.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        args: RunArguments,
        task: Task,
        tokenizer: PreTrainedTokenizerBase,
        train_dataset: Dataset | None = None,
        dev: dict[str, Dataset] | None = None,
        experiment: dict | None = None,
        held_out: Dataset | None = None,
        teacher_logits: dict[str, np.ndarray] | None = None,
        **kwargs,
    ):
        args = copy.copy(args)
        # Checkpoints are written, found and removed by `bert_finetune.run_checkpoints`.
        self._folder, self._limit, args.save_total_limit = Path(args.output_dir), args.save_total_limit, None
        self._saving_into: Path | None = None
        self._experiment = experiment or {}
        self._begun = self._seconds = self._seconds_before = 0.0
        args.label_names = ["labels"]
        if train_dataset is None:
            args.report_to = []  # an evaluation by itself leaves no log
        args.push_to_hub = False  # done by the script, once all is finished
        args.metric_for_best_model = task.dev_figure(args.metric_for_best_model or task.metric)
        args.greater_is_better = not args.metric_for_best_model.endswith(SMALLER_IS_BETTER)
        args._n_gpu = min(args.n_gpu, 1)  # several GPUs: one process each, by torchrun or accelerate
        # Compiled by `compile_model`, and not by accelerate anew for several lengths.
        self._compiler, args.torch_compile_backend = args.torch_compile_backend, None
        self.task, self.dev = task, dev or {}
        self.measured = {task.dev_prefixes[split]: dataset for split, dataset in self.dev.items()}
        self.measured |= {} if held_out is None else {"test": held_out}
        self._teacher_logits = teacher_logits or {}
        super().__init__(
            model,
            args,
            data_collator=kwargs.pop("data_collator", None) or DataCollatorWithPadding(tokenizer),
            train_dataset=train_dataset,
            eval_dataset=next(iter(self.dev.values())) if len(self.dev) == 1 else dev,
            processing_class=tokenizer,
            compute_metrics=self._measure_answers,
            **kwargs,
        )
        self.compile_model(self.classifier)
        self.model_accepts_loss_kwargs = False  # every loss here is a mean over its batch
        self._since_log, self._since_evaluation = Means(), Means()
        # Both would print a dictionary at every log, where an evaluation has its line.
        self.pop_callback(PrinterCallback)
        if self.pop_callback(ProgressCallback):
            self.add_callback(QuietProgress)

    @property
    def classifier(self) -> PreTrainedModel:
        """The plain transformers model that is being trained."""
        return self.accelerator.unwrap_model(self.model)

    @property
    def saved_step(self) -> int:
        """The step whose weights the model has once `train` is through."""
        best = self.state.best_global_step if self.args.load_best_model_at_end else None
        return best or self.state.global_step

    @property
    def train_seconds(self) -> float:
        """How long the run has trained, in all of its starts."""
        return self._seconds_before + (time.monotonic() - self._begun if self.is_in_train else self._seconds)

    def compile_model(self, model: PreTrainedModel) -> None:
        """Compile a model in place where `--torch_compile` asks for it and it may gain by it."""
        if self.args.torch_compile and self.args.device.type not in _NOT_COMPILED:
            model.compile(dynamic=True, backend=self._compiler)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return LengthGroupedBatches(
            self.args.train_batch_size * self.args.world_size,
            train_dataset or self.train_dataset,
            seed,
            epoch=lambda: int(self.state.epoch or 0),
        )

    def get_train_dataloader(self) -> DataLoader:
        loader = super().get_train_dataloader()
        share_batches(loader)
        return loader

    # Evaluation goes from the longest example to the shortest, which wastes little on padding; no figure depends on
    # the order, and `predict` puts its rows back into the dataset's.

    def _get_eval_sampler(self, eval_dataset: Dataset) -> list[int]:
        return longest_first(eval_dataset)

    def predict(self, test_dataset: Dataset, *args, **kwargs) -> PredictionOutput:
        output = super().predict(test_dataset, *args, **kwargs)
        back = np.argsort(longest_first(test_dataset))
        labels = None if output.label_ids is None else output.label_ids[back]
        return PredictionOutput(output.predictions[back], labels, output.metrics)

    # The Trainer would drop a dev or test set's last rows as it drops the training set's.

    def get_eval_dataloader(self, eval_dataset: Dataset | str | None = None) -> DataLoader:
        return self._all_rows(super().get_eval_dataloader, eval_dataset)

    def get_test_dataloader(self, test_dataset: Dataset) -> DataLoader:
        return self._all_rows(super().get_test_dataloader, test_dataset)

    def _all_rows(self, make_loader, dataset) -> DataLoader:
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return make_loader(dataset)
        finally:
            self.args.dataloader_drop_last = drop_last

    def train(self, resume_from_checkpoint: str | None = None, **kwargs):
        if resume_from_checkpoint is not None:
            self._seconds_before = seconds_at(Path(resume_from_checkpoint))
        self._begun = time.monotonic()
        try:
            output = super().train(resume_from_checkpoint, **kwargs)
        except KeyboardInterrupt as interrupt:
            raise KeyboardInterrupt(self.how_to_go_on or "there is no checkpoint yet") from interrupt
        except OSError as error:
            # A full disk that names no file is TensorBoard's log; all else that is written is named.
            if error.filename is not None or error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            with writing(self._folder / "runs"):
                raise
        self._seconds = time.monotonic() - self._begun
        return output

    @property
    def how_to_go_on(self) -> str | None:
        """What a run that was interrupted goes on from, in words; None where it has no checkpoint."""
        kept = last_checkpoint(self._folder)
        return kept and f"--resume_from_checkpoint goes on from {kept}"

    def remove_spare_checkpoints(self) -> None:
        """Once the finished model is saved: with a limit of one checkpoint, the best stays and the last goes."""
        if self._limit == 1 and self.best_checkpoint:
            keep(self._folder, 0, self.best_checkpoint)

    @property
    def best_checkpoint(self) -> Path | None:
        """The checkpoint whose weights the run ends with; None where that is simply the last step."""
        best = self.state.best_global_step if self.args.load_best_model_at_end else None
        return self._folder / checkpoint_name(best) if best else None

    def check_best_checkpoint(self) -> None:
        """Raise InputError where the best checkpoint so far is not there."""
        if self.best_checkpoint and self.best_checkpoint not in checkpoints(self._folder):
            there = ", ".join(path.name for path in checkpoints(self._folder)) or "no checkpoint"
            raise InputError(f"{self.best_checkpoint}: the run's best checkpoint is gone; there is {there}")

    def _save_checkpoint(self, model, trial) -> None:
        name, writes = checkpoint_name(self.state.global_step), self.args.should_save
        aside = self._folder / f".saving-{name}"
        try:
            with writing(self._folder / name):
                if writes:
                    begin(aside)
                self.accelerator.wait_for_everyone()
                self._saving_into = aside
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                if writes:
                    # Which step was best is kept, and not where its checkpoint lay: the folder may be moved.
                    self.state.best_model_checkpoint = None
                    self.state.save_to_json(str(aside / name / "trainer_state.json"))
                    complete(aside / name, self._folder, self._experiment, self.train_seconds)
                    forget_replaced_run(self._folder)
                    keep(self._folder, self._limit, self.best_checkpoint)
                self.accelerator.wait_for_everyone()
        finally:
            self._saving_into = None
            if writes and aside.exists():
                with writing(self._folder):
                    remove(aside)
        self.state.best_model_checkpoint = self.best_checkpoint and str(self.best_checkpoint)

    def _get_output_dir(self, trial) -> str:
        return str(self._saving_into or self._folder)

    def _load_best_model(self) -> None:
        self.check_best_checkpoint()
        with reading(str(self.best_checkpoint)):
            self.restore_classifier(self.best_checkpoint)

    # What is trained, in a checkpoint and out of it; a trainer whose model is more than a classifier has its own.

    def save_trained(self, folder: Path) -> None:
        """Write all that is trained into a checkpoint."""
        save_weights(self.classifier, folder)

    def restore_trained(self, checkpoint: Path) -> None:
        """Go on from what `save_trained` wrote."""
        restore_weights(self.classifier, checkpoint)

    def restore_classifier(self, checkpoint: Path) -> None:
        """Give the classifier the weights that it had at a checkpoint."""
        restore_weights(self.classifier, checkpoint)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            self.save_trained(folder)
            self.processing_class.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        with reading(resume_from_checkpoint):
            self.restore_trained(Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with reading(f"{checkpoint}, its optimizer"):
            super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.check_best_checkpoint()
            self.state.best_model_checkpoint = self.best_checkpoint and str(self.best_checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with reading(f"{checkpoint}, its random state"):
            super()._load_rng_state(checkpoint)

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not math.isfinite(loss):
            self.stop_diverged(f"the loss is {float(loss)} at step {self.state.global_step + 1}")
        return loss

    def stop_diverged(self, what: str) -> NoReturn:
        """End a run whose numbers have left the finite, before anything of it is saved."""
        kept = last_checkpoint(self._folder)
        raise InputError(
            f"{what}; nothing was saved after it, "
            + (f"the last good checkpoint is {kept}" if kept else "there is no checkpoint yet")
            + f"; a smaller --learning_rate (now {self.args.learning_rate}) often helps"
        )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        if model.training:
            loss = loss * share_of_step(outputs.logits)
            self.record({"train_loss": loss})
        return (loss, outputs) if return_outputs else loss

    def record(self, losses: dict[str, torch.Tensor]) -> None:
        """Take a step's losses into the log and the next evaluation's line."""
        self._since_log.add(losses)
        self._since_evaluation.add(losses)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if any(key.startswith("eval_") for key in logs):
            logs = logs | self._since_evaluation.take()
        elif "loss" in logs:
            logs = logs | self._since_log.take()
        super().log(logs, start_time)

    def evaluation_loop(self, dataloader, *args, metric_key_prefix: str = "eval", **kwargs):
        output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        if f"{metric_key_prefix}_loss" in output.metrics:
            # Several processes evaluate some rows twice, and the Trainer's own mean is over all of these.
            logits, labels = torch.from_numpy(output.predictions).float(), torch.from_numpy(output.label_ids)
            output.metrics[f"{metric_key_prefix}_loss"] = self.task.kind.hard_loss(logits, labels).item()
        output.metrics.update(self.agreement(metric_key_prefix, output.predictions, dataloader.dataset))
        return output

    def agreement(self, prefix: str, logits: np.ndarray, dataset: Dataset) -> dict[str, float]:
        """How logits for a dataset, from its longest example to its shortest, agree with the teacher's; nothing without
        those."""
        if prefix not in self._teacher_logits:
            return {}
        found = self.task.kind.agreement(logits, self._teacher_logits[prefix][longest_first(dataset)])
        return {f"{prefix}_{name}": value for name, value in found.items()}

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        before = len(self.state.log_history)
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        # The Trainer saves after it has evaluated, so weights that the last update broke are never saved.
        if self.is_in_train and not math.isfinite(metrics.get(f"{metric_key_prefix}_loss", 0)):
            self.stop_diverged(
                f"the dev loss is {metrics[f'{metric_key_prefix}_loss']} at step {self.state.global_step}"
            )
        # With several dev sets the Trainer comes back here for each; the line is printed once, for all of them.
        if metric_key_prefix == "eval" and self.is_world_process_zero():
            logged = {key: value for entry in self.state.log_history[before:] for key, value in entry.items()}
            tqdm.write(evaluation_line(self.state, logged, self.is_in_train))
        return metrics

    def measure(self) -> Measurement:
        """Measure the model as it is now; the training's history and log do not hear of it."""
        figures, answers = {}, {}
        for prefix, dataset in self.measured.items():
            output = self.predict(dataset, metric_key_prefix=prefix)
            figures |= {key: value for key, value in output.metrics.items() if is_figure(key)}
            answers[prefix] = Answers(output.predictions, output.label_ids, self._teacher_logits.get(prefix))
        return Measurement(figures, answers)

    def _measure_answers(self, prediction: EvalPrediction) -> dict[str, float]:
        return self.task.measure(prediction.predictions, prediction.label_ids)
