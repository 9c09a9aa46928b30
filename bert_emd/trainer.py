"""A transformers Trainer that asks a teacher."""

import copy
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from bert_emd.bert_adam import BertAdam
from bert_emd.history import LayerHistory
from bert_emd.layer_transport import LayerTransport
from bert_emd.objectives import LayerOutputs, Objective
from bert_emd.pictures import draw_flow, draw_flow_over_training, draw_layer_weights
from bert_emd.student import Student, layer_outputs
from bert_emd.teacher_cache import TeacherCache
from bert_finetune.arguments import RunArguments
from bert_finetune.errors import reading
from bert_finetune.trainer import TaskTrainer, format_figures

# Beside a checkpoint's plain classifier: projections and layer weights, which only training needs.
_STATE_FILE = "distillation.safetensors"


class DistillationTrainer(TaskTrainer):
    """Trains a `Student` against a frozen teacher under an `Objective`; evaluates the student as a plain classifier.

    teacher: where the objective needs none, it is in the model card only. teacher_mode: "eval", or "train" for the
    authors' way, in which the teacher's dropout is active while it teaches. teacher_metrics: its dev figures, for the
    results file.
    teacher_cache: keeps the teacher's answers; the training data's column "example" then numbers its rows.
    relu_heads: handles of `use_relu_head`; they are removed in the end, and the figures without them given too.
    optimizer: "adamw" (whatever `args.optim` says), or "bert_adam" (`BertAdam`, which clips for itself).
    """

    def __init__(
        self,
        student: Student,
        teacher: PreTrainedModel | None,
        objective: Objective,
        run_arguments: RunArguments,
        *args,
        teacher_mode: str = "eval",
        optimizer: str = "adamw",
        teacher_metrics: dict[str, float] | None = None,
        relu_heads: list[RemovableHandle] | None = None,
        teacher_cache: TeacherCache | None = None,
        **kwargs,
    ):
        if optimizer == "bert_adam":
            run_arguments = copy.copy(run_arguments)
            kwargs["optimizer_cls_and_kwargs"] = BertAdam, {"lr": run_arguments.learning_rate}
            run_arguments.max_grad_norm = 0.0
        super().__init__(student, run_arguments, *args, **kwargs)
        self.objective, self.layer_history = objective, LayerHistory()
        self.teacher_cache = teacher_cache
        self.teacher_metrics, self.relu_heads = teacher_metrics or {}, relu_heads or []
        self.teacher = teacher.to(self.args.device).requires_grad_(False) if teacher is not None else None
        if self.teacher is not None:
            self.teacher.train(teacher_mode == "train")
            self.compile_model(self.teacher)

    @property
    def classifier(self) -> PreTrainedModel:
        return self.accelerator.unwrap_model(self.model).model

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs)
        labels, examples = inputs.pop("labels"), inputs.pop("example", None)
        teacher = self.ask_teacher(inputs, examples) if self.objective.needs_teacher else None
        student = model(**inputs, parts=self.objective.looks_at)
        try:
            loss, terms, transport = self.objective(student, teacher, inputs["attention_mask"], labels)
        except FloatingPointError:
            self.stop_diverged(f"the costs between layers are not finite at step {self.state.global_step + 1}")
        self.record({"train_loss": loss, **terms})
        if transport is not None:
            self.layer_history.add(transport)
        return (loss, student) if return_outputs else loss

    @torch.no_grad()
    def ask_teacher(self, inputs: dict[str, torch.Tensor], examples: torch.Tensor | None) -> LayerOutputs:
        """The teacher's answers for a batch, computed where they are not in the cache."""
        cache, mask = self.teacher_cache, inputs["attention_mask"]
        if cache is None or not cache.knows(examples):
            with self.accelerator.autocast():
                outputs = layer_outputs(self.teacher, self.objective.looks_at, **inputs)
            if cache is None:
                return outputs
            cache.keep(examples, outputs)
        return cache.answers(examples, mask)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            self.layer_history.record(self.state.global_step, self.objective.mapping)
        super().log(logs, start_time)

    def finish_training(self) -> None:
        self.layer_history.record(self.state.global_step, self.objective.mapping)
        if self.is_world_process_zero():
            self.layer_history.write(self.args.output_dir)
        super().finish_training()

    def compared_models(self, results: dict) -> list[tuple[str, PreTrainedModel, dict]]:
        # With --head relu, the figures of the saved model as it is are kept beside those with the relu.
        own = {key.removeprefix("own_head_"): value for key, value in results.items() if key.startswith("own_head_")}
        rows = super().compared_models(own or results)
        name = "teacher (with a relu before its classifier)" if self.relu_heads else "teacher"
        return rows if self.teacher is None else [(name, self.teacher, self.teacher_metrics), *rows]

    def origin(self) -> str:
        teacher = f"`{self.teacher.config.name_or_path}`" if self.teacher is not None else None
        if not self.objective.needs_teacher:
            return super().origin() + (f" {teacher} took no part; it is here for comparison." if teacher else "")
        layers = self.objective.use_attention or self.objective.use_hidden
        if layers and isinstance(self.objective.mapping, LayerTransport):
            return f"Distilled with BERT-EMD from {teacher}."
        if layers:
            return f"Distilled from {teacher}, layer by layer under a fixed mapping."
        predictions = self.objective.use_prediction and self.objective.alpha > 0
        parts = {"embeddings": self.objective.use_embedding, "predictions": predictions}
        return f"Distilled from the {' and '.join(name for name, used in parts.items() if used)} of {teacher}."

    def write_card(self, results: dict, picture: str | None = None) -> None:
        drawn = self.draw_layers()
        super().write_card(results, "flow.png" if "flow" in drawn else None)

    def draw_layers(self) -> list[str]:
        """Draw the flow between layers and their weights, where the run has them, into the output folder and the
        TensorBoard log; the pictures' names."""
        folder = Path(self.args.output_dir)
        if not (folder / "flows.npz").exists():
            return []
        pictures = {
            "flow": draw_flow,
            "flow_over_training": draw_flow_over_training,
            "layer_weights": draw_layer_weights,
        }
        drawn = [name for name, draw in pictures.items() if draw(folder, folder / name) is not None]
        self.show_pictures([folder / f"{name}.png" for name in drawn])
        return drawn

    def results(self) -> dict:
        results = super().results() | {f"teacher_{key}": value for key, value in self.teacher_metrics.items()}
        if self.relu_heads:
            for handle in self.relu_heads:
                handle.remove()
            own = self.final_figures()
            results |= {f"own_head_{key}": value for key, value in own.items()}
            print(f"figures are with a relu before the classifier; the saved model as it is: {format_figures(own)}")
        return results

    # A checkpoint is the plain classifier, as from_pretrained reads it, plus what only training needs.

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        state = state_dict or self.accelerator.unwrap_model(self.model).state_dict()
        weights = {key.removeprefix("model."): value for key, value in state.items() if key.startswith("model.")}
        self.classifier.save_pretrained(folder, state_dict=weights)
        self.processing_class.save_pretrained(folder)
        own = {key: value for key, value in state.items() if not key.startswith("model.")}
        own |= {f"objective.{key}": value for key, value in self.objective.state_dict().items()}
        save_file({key: value.contiguous() for key, value in own.items()}, folder / _STATE_FILE)
        self.layer_history.save(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        folder = Path(resume_from_checkpoint)
        with reading(resume_from_checkpoint):
            own = load_file(folder / _STATE_FILE)
            objective = {
                key.removeprefix("objective."): own.pop(key) for key in list(own) if key.startswith("objective.")
            }
            self.objective.load_state_dict(objective)
            weights = load_file(folder / "model.safetensors")
            student = self.accelerator.unwrap_model(model or self.model)
            student.load_state_dict({f"model.{key}": value for key, value in weights.items()} | own)
            self.layer_history.load(folder)

    def _load_best_model(self) -> None:
        weights = load_file(Path(self.state.best_model_checkpoint) / "model.safetensors")
        self.classifier.load_state_dict(weights)
