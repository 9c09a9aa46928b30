"""transformers' Trainer with what every run here shares: GLUE metrics, one line per evaluation, a stop at NaN."""

import copy
import math

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import Sampler
from tqdm.auto import tqdm
from transformers import (
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
)
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import PredictionOutput

from bert_finetune.arguments import RunArguments
from bert_finetune.checkpoints import save_classifier
from bert_finetune.errors import InputError
from bert_finetune.glue import Task
from bert_finetune.metrics import compute_metrics
from bert_finetune.outputs import last_checkpoint, write_eval_results
from bert_finetune.predictions import write_predictions


class Means:
    """Running means of named losses, kept on their device until they are asked for."""

    def __init__(self):
        self._sums, self._count = {}, 0

    def add(self, values: dict[str, torch.Tensor]) -> None:
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0) + value.detach()
        self._count += 1

    def take(self) -> dict[str, float]:
        """The means since the last call; empty when nothing was added."""
        means = {name: float(total) / self._count for name, total in self._sums.items()}
        self._sums, self._count = {}, 0
        return means


class LengthGroupedBatches(LengthGroupedSampler):
    """Random batches of examples of similar length, the same in epoch k whether or not the run was interrupted."""

    def __init__(self, batch_size: int, dataset: Dataset, seed: int):
        super().__init__(batch_size, lengths=[len(ids) for ids in dataset["input_ids"]], generator=torch.Generator())
        self._seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        self.generator.manual_seed(self._seed + epoch)


class QuietProgress(ProgressCallback):
    """The progress bars without a dictionary printed at every log: `TaskTrainer` prints its own line."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        pass


class TaskTrainer(Trainer):
    """A Trainer for one GLUE task.

    `eval_datasets`: dev split name -> dataset; with more than one (MNLI) every figure carries the split's name. The
    losses that a step computes go to the log and, as means since the last evaluation, into the evaluation's line.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        args: RunArguments,
        task: Task,
        tokenizer: PreTrainedTokenizerBase,
        train_dataset: Dataset | None = None,
        eval_datasets: dict[str, Dataset] | None = None,
        **kwargs,
    ):
        args = copy.copy(args)
        args.label_names = ["labels"]
        if train_dataset is None:
            args.report_to = []  # an evaluation by itself leaves no log
        if args.load_best_model_at_end:
            args.metric_for_best_model = task.dev_figure(args.metric_for_best_model or task.metric)
            args.greater_is_better = not args.metric_for_best_model.endswith("loss")
        super().__init__(
            model,
            args,
            data_collator=kwargs.pop("data_collator", None) or DataCollatorWithPadding(tokenizer),
            train_dataset=train_dataset,
            eval_dataset=_single(eval_datasets),
            processing_class=tokenizer,
            compute_metrics=self._compute_metrics,
            **kwargs,
        )
        self.task = task
        self.model_accepts_loss_kwargs = False  # every loss here is a mean over its batch
        self._since_log, self._since_evaluation = Means(), Means()
        if not args.disable_tqdm:
            self.pop_callback(ProgressCallback)
            self.add_callback(QuietProgress)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return LengthGroupedBatches(self.args.train_batch_size, train_dataset or self.train_dataset, seed)

    def _get_dataloader(self, *args, is_training: bool = False, **kwargs):
        # The Trainer would drop a dev or test set's last rows too.
        drop_last = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = drop_last and is_training
        try:
            return super()._get_dataloader(*args, is_training=is_training, **kwargs)
        finally:
            self.args.dataloader_drop_last = drop_last

    # Evaluation goes from the longest example to the shortest, which wastes little on padding; no figure depends on
    # the order, and `predict` puts its rows back into the dataset's.

    def _get_eval_sampler(self, eval_dataset: Dataset) -> list[int]:
        return _longest_first(eval_dataset)

    def predict(self, test_dataset: Dataset, *args, **kwargs) -> PredictionOutput:
        output = super().predict(test_dataset, *args, **kwargs)
        back = np.argsort(_longest_first(test_dataset))
        labels = None if output.label_ids is None else output.label_ids[back]
        return PredictionOutput(output.predictions[back], labels, output.metrics)

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not math.isfinite(loss):
            kept = last_checkpoint(self.args.output_dir)
            raise InputError(
                f"the loss is {float(loss)} at step {self.state.global_step + 1}; nothing was saved after it, "
                + (f"the last good checkpoint is {kept}" if kept else "there is no checkpoint yet")
                + f"; a smaller --learning_rate (now {self.args.learning_rate}) often helps"
            )
        return loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        if model.training:
            self.record({"train_loss": loss})
        return (loss, outputs) if return_outputs else loss

    def record(self, losses: dict[str, torch.Tensor]) -> None:
        """Take a step's losses into the log and the next evaluation's line."""
        self._since_log.add(losses)
        self._since_evaluation.add(losses)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        is_evaluation = any(key.startswith("eval_") for key in logs)
        means = (self._since_evaluation if is_evaluation else self._since_log).take()
        super().log(logs | means, start_time)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        before = len(self.state.log_history)
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        # With several dev sets the Trainer comes back here for each; the line is printed once, for all of them.
        if metric_key_prefix == "eval" and self.is_world_process_zero():
            logged = {key: value for entry in self.state.log_history[before:] for key, value in entry.items()}
            tqdm.write(self._line(logged))
        return metrics

    @property
    def classifier(self) -> PreTrainedModel:
        """The plain transformers model that is being trained."""
        return self.accelerator.unwrap_model(self.model)

    def finish_training(self) -> None:
        """Save the model (the best one, once `train` is through) and its results into `output_dir`."""
        results = self.results()
        if self.is_world_process_zero():
            save_classifier(self.classifier, self.processing_class, self.args.output_dir)
            write_eval_results(self.args.output_dir, results, self.history())

    def results(self) -> dict:
        """What `eval_results.txt` holds: the task, where the model comes from, its dev figures."""
        metrics = self.evaluate()
        best_step = self.state.best_global_step or self.state.global_step
        figures = {key: value for key, value in metrics.items() if is_figure(key)}
        return {"task": self.task.name, "global_step": best_step, **figures}

    def write_predictions(self, test_datasets: dict[str, Dataset]) -> None:
        """Predict each test split and write it for the GLUE server, beside the model."""
        for split, dataset in test_datasets.items():
            logits = self.predict(dataset, metric_key_prefix="test").predictions
            if self.is_world_process_zero():
                path = write_predictions(self.task, split, logits, self.args.output_dir)
                print(f"{path}: {len(dataset)} predictions")

    def history(self) -> list[dict]:
        """One entry per evaluation so far: step, epoch, mean training losses, dev figures."""
        entries = {}
        for entry in self.state.log_history:
            if any(key.startswith("eval_") for key in entry):
                entries.setdefault(entry["step"], {}).update({k: v for k, v in entry.items() if is_figure(k)})
        return list(entries.values())

    def _compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        return compute_metrics(self.task, prediction.predictions, prediction.label_ids)

    def _line(self, logged: dict[str, float]) -> str:
        parts = []
        if self.is_in_train:
            parts.append(f"step {self.state.global_step}/{self.state.max_steps}  epoch {self.state.epoch:.2f}")
            losses = [
                f"{key.removesuffix('_loss')} {value:.4f}" for key, value in logged.items() if _is_train_loss(key)
            ]
            parts.append("losses: " + " ".join(losses))
        parts.append("dev: " + format_figures(logged))
        return "  ".join(parts)


def format_figures(metrics: dict[str, float]) -> str:
    """The dev figures of an evaluation as `accuracy 0.8440 loss 0.3912`."""
    figures = {k.removeprefix("eval_"): v for k, v in metrics.items() if k.startswith("eval_") and is_figure(k)}
    return " ".join(f"{name} {value:.4f}" for name, value in sorted(figures.items()))


def is_figure(key: str) -> bool:
    """Whether an evaluation's entry says something about the model, not about the time it took."""
    return not key.endswith(("_per_second", "_runtime", "_preparation_time"))


def _longest_first(dataset: Dataset) -> list[int]:
    lengths = [len(ids) for ids in dataset["input_ids"]]
    return sorted(range(len(lengths)), key=lambda k: -lengths[k])


def _is_train_loss(key: str) -> bool:
    return key.endswith("_loss") and not key.startswith("eval_")


def _single(datasets: dict[str, Dataset] | None):
    return next(iter(datasets.values())) if datasets and len(datasets) == 1 else datasets
