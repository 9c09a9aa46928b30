"""Which student layer learns from which teacher layer: EMD and its rivals, one table. A new one is one more row.

torch is imported where a mapping is made: the command line reads the names for --help.
"""

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bert_finetune.errors import InputError
from bert_finetune.processes import is_main_process

if TYPE_CHECKING:
    from bert_emd.layer_mapping import LayerMapping

# From the command line's options (`DistillationArguments`), student layers and teacher layers; None stands for no layer
# losses.
Maker = Callable[[Any, int, int], "LayerMapping | None"]
Pairs = list[tuple[int, int]]


@dataclass(frozen=True)
class MappingRow:
    """`what` the mapping does, the `source` it is taken from, how to `make` it from the command line's options."""

    what: str
    source: str
    make: Maker


def evenly_spaced_layers(student_layers: int, teacher_layers: int) -> list[int]:
    """Teacher layer i·N/M for student layer i (1-based, rounded up where it does not divide): 2, 4, 6 for 3 of 6."""
    return [-(-i * teacher_layers // student_layers) for i in range(1, student_layers + 1)]


def uniform_pairs(student_layers: int, teacher_layers: int) -> Pairs:
    return list(enumerate(evenly_spaced_layers(student_layers, teacher_layers), start=1))


def skip_pairs(student_layers: int, teacher_layers: int) -> Pairs:
    return uniform_pairs(student_layers, teacher_layers)[:-1]


def last_pairs(student_layers: int, teacher_layers: int) -> Pairs:
    return [(i, max(1, teacher_layers - student_layers + i)) for i in range(1, student_layers)]


def first_pairs(student_layers: int, teacher_layers: int) -> Pairs:
    return [(i, min(i, teacher_layers)) for i in range(1, student_layers + 1)]


def reverse_pairs(student_layers: int, teacher_layers: int) -> Pairs:
    return list(enumerate(reversed(evenly_spaced_layers(student_layers, teacher_layers)), start=1))


def mean_pairs(student_layers: int, teacher_layers: int) -> Pairs:
    return list(itertools.product(range(1, student_layers + 1), range(1, teacher_layers + 1)))


def random_pairs(student_layers: int, teacher_layers: int) -> Pairs:
    """Drawn by the run's seed, which torch was given last; no teacher layer twice before all are used."""
    import torch

    drawn = random.Random(torch.initial_seed())
    layers = []
    while len(layers) < student_layers:
        layers += drawn.sample(range(1, teacher_layers + 1), teacher_layers)
    return list(enumerate(layers[:student_layers], start=1))


def fixed(pairs_of: Callable[[int, int], Pairs]) -> Maker:
    """The maker of a mapping whose pairs follow from the numbers of layers alone."""

    def make(options: Any, student_layers: int, teacher_layers: int) -> "LayerMapping":
        from bert_emd.layer_mapping import FixedMapping

        pairs = pairs_of(student_layers, teacher_layers)
        if not pairs:
            raise InputError(
                f"--layer_mapping {options.layer_mapping}: leaves a student's last layer to the predictions, and this "
                "one has no other; use emd, uniform or none"
            )
        if is_main_process():
            few = len(pairs) <= 2 * student_layers
            print(
                "layer mapping, student-teacher: " + (", ".join(f"{i}-{j}" for i, j in pairs) if few else "all pairs")
            )
        return FixedMapping(pairs, student_layers, teacher_layers)

    return make


def _emd(options: Any, student_layers: int, teacher_layers: int) -> "LayerMapping":
    from bert_emd.layer_transport import LayerTransport

    update = options.cost_attention if options.update_weight else "none"
    solver = "pot" if options.emd_solver == "auto" else options.emd_solver
    return LayerTransport(
        student_layers,
        teacher_layers,
        update,
        options.T_emd,
        not options.separate,
        solver,
        momentum=options.weight_momentum,
    )


def _nearest(options: Any, student_layers: int, teacher_layers: int) -> "LayerMapping":
    from bert_emd.layer_mapping import NearestMapping

    return NearestMapping()


MAPPINGS = {
    "emd": MappingRow(
        "every student layer from every teacher layer, matched by an earth mover's distance", "BERT-EMD", _emd
    ),
    "uniform": MappingRow("student layer i from teacher layer i·N/M", "TinyBERT", fixed(uniform_pairs)),
    "skip": MappingRow(
        "as uniform, without the last pair, whose layer the prediction loss teaches", "Patient KD", fixed(skip_pairs)
    ),
    "last": MappingRow(
        "student layer i from teacher layer N - M + i (1 where that is below 1), without the last pair",
        "Patient KD",
        fixed(last_pairs),
    ),
    "first": MappingRow("student layer i from teacher layer i", "DistilBERT's start", fixed(first_pairs)),
    "reverse": MappingRow("as uniform, in the opposite order", "a control", fixed(reverse_pairs)),
    "random": MappingRow("each student layer from a teacher layer drawn by --seed", "a control", fixed(random_pairs)),
    "mean": MappingRow(
        "every student layer from every teacher layer, all alike", "many to many without transport", fixed(mean_pairs)
    ),
    "nearest": MappingRow(
        "each student layer from the teacher layer of least cost in the batch", "semi-relaxed transport", _nearest
    ),
    "none": MappingRow("no layer losses: the predictions alone", "", lambda *_: None),
}
