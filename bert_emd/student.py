"""The student: a plain transformers classifier, with projections to the teacher's width that only training needs."""

import copy

import torch
from torch import nn
from transformers import PreTrainedModel

from bert_emd.objectives import LayerOutputs, evenly_spaced_layers
from bert_finetune.errors import InputError

PROJECTIONS = ("auto", "per_layer", "shared", "none")


def parse_student_layers(text: str, teacher_layers: int) -> list[int]:
    """`--student_layers` as teacher layer numbers, 1-based: "3" is three evenly spaced ones, "1,3,5" just those."""
    try:
        numbers = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        numbers = []
    if not numbers:
        raise InputError(f"--student_layers {text}: give a number of layers (3) or teacher layers (1,3,5)")
    layers = evenly_spaced_layers(numbers[0], teacher_layers) if "," not in text and numbers[0] > 0 else numbers
    if len(layers) > teacher_layers or not all(1 <= layer <= teacher_layers for layer in layers):
        raise InputError(
            f"--student_layers {text}: the teacher has {teacher_layers} layers; give at most {teacher_layers}, or "
            f"numbers from 1 to {teacher_layers}"
        )
    return layers


def student_from_teacher(teacher: PreTrainedModel, layers: list[int]) -> PreTrainedModel:
    """A student made of the teacher's embeddings, head and the given layers (1-based), all copied."""
    name, stack = _layer_stack(teacher)
    config = copy.deepcopy(teacher.config)
    config.num_hidden_layers = len(layers)
    student = type(teacher)(config)
    weights = {}
    for key, value in teacher.state_dict().items():
        if not key.startswith(f"{name}."):
            weights[key] = value
    for position, layer in enumerate(layers):
        for key, value in stack[layer - 1].state_dict().items():
            weights[f"{name}.{position}.{key}"] = value
    student.load_state_dict(weights)
    return student


def _layer_stack(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == model.config.num_hidden_layers:
            return name, module
    raise InputError(
        f"--teacher_model: cannot find the {model.config.num_hidden_layers} layers of {type(model).__name__}"
    )


class Student(nn.Module):
    """A classifier with the linear maps that bring its hidden states to the teacher's width.

    projection: "per_layer" has one map for the embedding output and one for each layer, "shared" one for all (as the
        authors train), "none" no map; "auto" is "none" where the widths are equal and the checkpoint brings no maps
        of its own, else "per_layer".
    stored: maps that the student's checkpoint brings, `{layer: (weight, bias)}` with 0 for the embedding output.
    Raises InputError where there is no map and the widths differ.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        teacher_width: int,
        projection: str = "auto",
        stored: dict[int, tuple[torch.Tensor, torch.Tensor]] | None = None,
    ):
        super().__init__()
        self.model = model
        self.accepts_loss_kwargs = False
        width, layers = model.config.hidden_size, model.config.num_hidden_layers
        stored = stored or {}
        if projection == "auto":
            projection = "none" if width == teacher_width and not stored else "per_layer"
        if projection == "none" and width != teacher_width:
            raise InputError(
                f"--projection none: the student is {width} wide, the teacher {teacher_width}; use per_layer or shared"
            )
        maps = {"none": 0, "shared": 1, "per_layer": layers + 1}[projection]
        self.projections = nn.ModuleList(nn.Linear(width, teacher_width) for _ in range(maps))
        with torch.no_grad():
            for linear in self.projections:
                linear.weight.normal_(std=model.config.initializer_range)
                linear.bias.zero_()
            if projection == "per_layer":
                for layer, (weight, bias) in stored.items():
                    self.projections[layer].weight.copy_(weight)
                    self.projections[layer].bias.copy_(bias)

    @property
    def config(self):
        return self.model.config

    def forward(self, labels: torch.Tensor | None = None, with_layers: bool = False, **inputs):
        """The classifier's own output, or, `with_layers`, the `LayerOutputs` that the losses look at."""
        if not with_layers:
            return self.model(labels=labels, **inputs)
        outputs = layer_outputs(self.model, **inputs)
        return LayerOutputs(outputs.logits, self._project(outputs.hidden_states), outputs.attention_scores)

    def _project(self, hidden_states: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        if not len(self.projections):
            return hidden_states
        return tuple(self.projections[k % len(self.projections)](state) for k, state in enumerate(hidden_states))


def layer_outputs(model: PreTrainedModel, **inputs) -> LayerOutputs:
    """A forward pass of a model prepared with `expose_attention_scores`, with all that the losses look at."""
    outputs = model(**inputs, output_hidden_states=True, output_attentions=True)
    return LayerOutputs(outputs.logits, outputs.hidden_states, outputs.attentions)
