"""The Trainers that ask a teacher."""

import copy
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch._functorch import config as functorch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from bert_emd.bert_adam import BertAdam
from bert_emd.diagnosis import imbalance, mean_shares, measure_shares, measured_steps
from bert_emd.distillation import Distillation
from bert_emd.history import LayerHistory
from bert_emd.layer_outputs import LayerOutputs, layer_outputs
from bert_emd.teacher_answers import TeacherCache
from bert_finetune.run_arguments import RunArguments
from bert_finetune.run_trainer import RunTrainer
from bert_finetune.soft_labels import TEACHER_LOGITS
from bert_finetune.training import TaskTrainer


def allow_several_backward_passes() -> None:
    """For what is compiled from now on; torch by itself lets compiled code use its memory again after the first."""
    functorch.donated_buffer = False


class TeacherTrainer(RunTrainer):
    """Trains a `Distillation` against a frozen teacher. How the student is evaluated is for another class to say.

    teacher: None where there is none. asked: the parts of its outputs that it is asked for at each step, by default all
    that the objective looks at; logits that it is not asked for stand beside the training rows, as TEACHER_LOGITS.
    teacher_mode: "eval", or "train" for the authors' way, in which the teacher's dropout is active while it teaches.
    teacher_cache: keeps the teacher's answers; the training data's column "example" then numbers its rows.
    optimizer: "adamw" (whatever `args.optim` says), or "bert_adam" (`BertAdam`, which clips for itself).
    """

    def __init__(
        self,
        distillation: Distillation,
        teacher: PreTrainedModel | None,
        run_arguments: RunArguments,
        *args,
        asked: frozenset[str] | None = None,
        teacher_mode: str = "eval",
        optimizer: str = "adamw",
        teacher_cache: TeacherCache | None = None,
        **kwargs,
    ):
        if optimizer == "bert_adam":
            run_arguments = copy.copy(run_arguments)
            kwargs["optimizer_cls_and_kwargs"] = BertAdam, {"lr": run_arguments.learning_rate}
            run_arguments.max_grad_norm = 0.0
        allow_several_backward_passes()
        super().__init__(distillation, run_arguments, *args, **kwargs)
        needed = distillation.objective.looks_at if distillation.objective.needs_teacher else frozenset()
        self._asked = needed if asked is None else asked
        self._diagnosed, self._warned = 0, False
        self.layer_history, self.teacher_cache = LayerHistory(), teacher_cache
        self.teacher = teacher.to(self.args.device).requires_grad_(False) if teacher is not None else None
        if self.teacher is not None:
            self.teacher.train(teacher_mode == "train")
            self.prepare(self.teacher)

    @property
    def distillation(self) -> Distillation:
        return self.accelerator.unwrap_model(self.model)

    @property
    def plain_model(self) -> PreTrainedModel:
        return self.distillation.student

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs)
        examples = inputs.pop("example", None)
        given = inputs.pop(TEACHER_LOGITS, None)
        teacher = LayerOutputs(given)
        if self._asked:
            answers = self.ask_teacher({k: v for k, v in inputs.items() if k != "labels"}, examples)
            teacher = answers if given is None else replace(answers, logits=given)
        try:
            outputs = model(**inputs, teacher=teacher)
        except FloatingPointError:
            self.stop_diverged(f"the costs between layers are not finite at step {self.state.global_step + 1}")
        self.record({"train_loss": outputs.loss, **outputs.terms})
        if outputs.matching is not None:
            self.layer_history.add(outputs.matching, self.distillation.mapping)
        self.diagnose(outputs.terms)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    @property
    def shares(self) -> dict[str, float]:
        """Each term's share of the loss and of the gradient, the mean of what `diagnose` has measured."""
        return mean_shares(self.state.log_history)

    def diagnose(self, terms: dict[str, torch.Tensor]) -> None:
        """At some steps, in the first batch of each, measure what each term has to say, for the log; warn, once, where
        it is nothing."""
        step, objective = self.state.global_step + 1, self.distillation.objective
        if len(terms) < 2 or step == self._diagnosed or step not in measured_steps(self.state.max_steps):
            return
        self._diagnosed = step
        weighted = {name.removesuffix("_loss"): objective.weights[name] * term for name, term in terms.items()}
        parameters = [each for each in self.plain_model.parameters() if each.requires_grad]
        scaler = self.accelerator.scaler
        found = measure_shares(weighted, parameters, scaler.get_scale() if scaler else 1.0)
        if not found:
            return
        self.log(found)
        warning = imbalance(found, objective.beta)
        if warning and not self._warned and self.is_world_process_zero():
            tqdm.write(f"warning: step {step}: {warning}", file=sys.stderr)
        self._warned |= warning is not None

    @torch.no_grad()
    def ask_teacher(self, inputs: dict[str, torch.Tensor], examples: torch.Tensor | None) -> LayerOutputs:
        """The teacher's answers for a batch, computed where they are not in the cache."""
        cache, mask = self.teacher_cache, inputs["attention_mask"]
        if cache is None or not cache.knows(examples):
            with self.accelerator.autocast():
                outputs = layer_outputs(self.teacher, self._asked, **inputs)
            if cache is None:
                return outputs
            cache.keep(examples, outputs)
        return cache.answers(examples, mask)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            self.record_layers()
        super().log(logs, start_time)

    def record_layers(self) -> None:
        """Close an interval of the layers' history with the present step."""
        self.layer_history.record(self.state.global_step)

    def save_trained(self, folder: Path) -> None:
        self.distillation.save(folder)
        self.layer_history.save(folder)

    def restore_trained(self, checkpoint: Path) -> None:
        self.distillation.restore(checkpoint)
        self.layer_history.load(checkpoint)


class DistillationTrainer(TeacherTrainer, TaskTrainer):
    """The distillation of one task's teacher: the student is evaluated as a plain classifier."""
