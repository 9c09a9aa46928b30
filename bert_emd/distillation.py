"""The one module that is trained: the student, its maps to the teacher's width, and the layer mapping."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from bert_emd.layer_mapping import LayerMapping, Matching
from bert_emd.layer_outputs import LayerOutputs, layer_outputs
from bert_emd.objectives import Objective
from bert_finetune.checkpoints import restore_weights, save_weights

# In a checkpoint, beside the plain classifier.
_STATE_FILE = "distillation.safetensors"


@dataclass(frozen=True)
class DistillationOutput:
    """A training step's `loss` with gradient, its `terms` by name (unweighted), and what was matched (None without
    layer losses)."""

    loss: torch.Tensor
    terms: dict[str, torch.Tensor]
    matching: Matching | None


class Distillation(nn.Module):
    """A `student` (a plain classifier) that learns from a teacher's answers under an `objective`.

    projections: to the teacher's width, of `make_projections`. mapping: which layers learn from which; None for no
    layer losses. Parameters of all three are trained. In training a forward pass gives the loss; the whole of it is
    computed in here, so that in a distributed run every parameter's gradient is synchronised. In evaluation the module
    is the plain classifier.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        objective: Objective,
        mapping: LayerMapping | None = None,
        projections: nn.ModuleList | None = None,
    ):
        super().__init__()
        self.student, self.objective = student, objective
        self.projections = nn.ModuleList() if projections is None else projections
        self.mapping = mapping

    @property
    def config(self) -> PreTrainedConfig:
        return self.student.config

    def forward(self, labels: torch.Tensor | None = None, teacher: LayerOutputs | None = None, **inputs):
        """In training a `DistillationOutput`; `teacher`: its answers to the same `inputs`, None where the objective
        needs none. In evaluation the student's own output."""
        if not self.training:
            return self.student(labels=labels, **inputs)
        return self.loss(labels, teacher, **inputs)

    def loss(self, labels: torch.Tensor | None = None, teacher: LayerOutputs | None = None, **inputs):
        """The `DistillationOutput` for a batch, as in training, also where the module is not in training: then without
        dropout, and layer weights stay."""
        outputs = self.student_outputs(**inputs)
        # A run in bfloat16 has its models in it, not its losses.
        with torch.autocast(inputs["input_ids"].device.type, enabled=False):
            return DistillationOutput(*self.objective(self.mapping, outputs, teacher, inputs["attention_mask"], labels))

    def student_outputs(self, **inputs) -> LayerOutputs:
        """What the objective looks at, hidden states projected to the teacher's width."""
        outputs = layer_outputs(self.student, self.objective.looks_at, **inputs)
        return LayerOutputs(outputs.logits, self._project(outputs.hidden_states), outputs.attention)

    def _project(self, hidden_states: tuple[torch.Tensor | None, ...] | None) -> tuple | None:
        if hidden_states is None or not len(self.projections):
            return hidden_states
        return tuple(
            None if state is None else self.projections[k % len(self.projections)](state)
            for k, state in enumerate(hidden_states)
        )

    # On disk the student is a plain classifier, as from_pretrained reads it; what only training needs lies beside it.

    @property
    def _beside_the_student(self) -> nn.ModuleDict:
        parts = {"projections": self.projections} | ({} if self.mapping is None else {"mapping": self.mapping})
        return nn.ModuleDict(parts)

    def save(self, folder: Path) -> None:
        """Write the student, and the rest beside it."""
        save_weights(self.student, folder)
        state = self._beside_the_student.state_dict()
        save_file({key: value.contiguous() for key, value in state.items()}, folder / _STATE_FILE)

    def restore(self, folder: Path) -> None:
        """Go on from what `save` wrote."""
        self.restore_student(folder)
        self._beside_the_student.load_state_dict(load_file(folder / _STATE_FILE))

    def restore_student(self, folder: Path) -> None:
        """The student alone, as it was saved."""
        restore_weights(self.student, folder)
