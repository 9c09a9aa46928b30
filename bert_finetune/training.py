"""The Trainer of a run for one task: its figures, batches of similar length."""

import copy
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import Sampler
from transformers import EvalPrediction, PreTrainedTokenizerBase
from transformers.trainer_utils import PredictionOutput

from bert_finetune.errors import InputError
from bert_finetune.glue import Task
from bert_finetune.processes import share_of_step
from bert_finetune.run_arguments import RunArguments
from bert_finetune.run_trainer import RunTrainer
from bert_finetune.samplers import LengthGroupedBatches, longest_first
from bert_finetune.task_kinds import SMALLER_IS_BETTER
from bert_finetune.training_log import is_figure


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
    `labels` and a teacher's logits. settings: what the model's kind has chosen (`TaskKind.settings`), and, with
    `teacher_` before the name, the teacher's."""

    logits: np.ndarray
    labels: np.ndarray | None
    teacher_logits: np.ndarray | None
    settings: dict[str, list[float]] = field(default_factory=dict)

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """All of them, by name."""
        named = {"logits": self.logits, "labels": self.labels, "teacher_logits": self.teacher_logits} | self.settings
        return {name: np.asarray(array) for name, array in named.items() if array is not None}


@dataclass(frozen=True)
class Measurement:
    """What a model gives: `figures` as the trainer names them, and its answers for each dataset, by what the names of
    the set's figures begin with."""

    figures: dict[str, float]
    answers: dict[str, Answers]


class TaskTrainer(RunTrainer):
    """The trainer of a run for one task.

    `dev`: dev split name -> dataset; with more than one (MNLI) every figure carries the split's name. `held_out`: one
    more dataset, with labels or without, for `measure` alone; its figures are called `test_...`. `teacher_logits`: a
    teacher's answers for these datasets, by what the names of their figures begin with; with them, the figures of
    `TaskKind.agreement` are measured too. `experiment`: what the run is, for its checkpoints.

    `task.kind` may have a teacher's settings (thresholds), by which agreement is judged; the model is measured by its
    own, of its configuration, which a training chooses anew on the (first) dev set whenever that is measured.
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
        args.label_names = ["labels"]
        args.metric_for_best_model = task.dev_figure(args.metric_for_best_model or task.metric)
        args.greater_is_better = not args.metric_for_best_model.endswith(SMALLER_IS_BETTER)
        self.task, self.dev = replace(task, kind=task.kind.configured(model.config.to_dict())), dev or {}
        self._teachers_kind = task.kind
        self.measured = {task.dev_prefixes[split]: dataset for split, dataset in self.dev.items()}
        self.measured |= {} if held_out is None else {"test": held_out}
        self._teacher_logits = teacher_logits or {}
        super().__init__(
            model,
            args,
            tokenizer,
            train_dataset,
            experiment,
            eval_dataset=next(iter(self.dev.values())) if len(self.dev) == 1 else dev,
            compute_metrics=partial(self._measure_answers, ""),
            compute_loss_func=None if args.label_smoothing_factor else self._hard_loss,
            **kwargs,
        )

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

    # Evaluation goes from the longest example to the shortest, which wastes little on padding; no figure depends on
    # the order, and `predict` puts its rows back into the dataset's.

    def _get_eval_sampler(self, eval_dataset: Dataset) -> list[int]:
        return longest_first(eval_dataset)

    def predict(self, test_dataset: Dataset, *args, **kwargs) -> PredictionOutput:
        output = super().predict(test_dataset, *args, **kwargs)
        back = np.argsort(longest_first(test_dataset))
        labels = None if output.label_ids is None else output.label_ids[back]
        return PredictionOutput(output.predictions[back], labels, output.metrics)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        if model.training:
            loss = loss * share_of_step(outputs.logits)
            self.record({"train_loss": loss})
        return (loss, outputs) if return_outputs else loss

    def _hard_loss(self, outputs, labels: torch.Tensor, num_items_in_batch=None) -> torch.Tensor:
        return self.task.kind.hard_loss(outputs.logits, labels)

    def evaluation_loop(self, dataloader, *args, metric_key_prefix: str = "eval", **kwargs):
        self.compute_metrics = partial(self._measure_answers, metric_key_prefix)
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
        found = self._teachers_kind.agreement(logits, self._teacher_logits[prefix][longest_first(dataset)])
        return {f"{prefix}_{name}": value for name, value in found.items()}

    def measure(self) -> Measurement:
        """Measure the model as it is now; the training's history and log do not hear of it."""
        figures, answers = {}, {}
        for prefix, dataset in self.measured.items():
            output = self.predict(dataset, metric_key_prefix=prefix)
            figures |= {key: value for key, value in output.metrics.items() if is_figure(key)}
            settings = dict(self.task.kind.settings)
            if prefix in self._teacher_logits:
                settings |= {f"teacher_{name}": values for name, values in self._teachers_kind.settings.items()}
            answers[prefix] = Answers(output.predictions, output.label_ids, self._teacher_logits.get(prefix), settings)
        return Measurement(figures, answers)

    def _measure_answers(self, prefix: str, prediction: EvalPrediction) -> dict[str, float]:
        if self.train_dataset is not None and prefix == next(iter(self.measured), None):
            kind = self.task.kind.fitted(prediction.predictions, prediction.label_ids)
            self.task = replace(self.task, kind=kind)
            self.plain_model.config.update(kind.settings)
        return self.task.measure(prediction.predictions, prediction.label_ids)
