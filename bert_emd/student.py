"""The student as it starts: a model of its own or the teacher's layers, and its maps to the teacher's width."""

import copy
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedConfig, PreTrainedModel

from bert_emd.mappings import evenly_spaced_layers
from bert_finetune.checkpoints import check_finite, output_layer, read_weights
from bert_finetune.errors import InputError
from bert_finetune.files import replacing_file


def parse_student_layers(text: str, teacher_layers: int, copied: bool = True) -> list[int]:
    """`--student_layers` as teacher layer numbers, 1-based: "3" is three evenly spaced ones, "1,3,5" just those. Where
    none is `copied` there may be more than the teacher has."""
    try:
        numbers = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        numbers = []
    if not numbers:
        raise InputError(f"--student_layers {text}: give a number of layers (3) or teacher layers (1,3,5)")
    layers = evenly_spaced_layers(numbers[0], teacher_layers) if "," not in text and numbers[0] > 0 else numbers
    if (copied and len(layers) > teacher_layers) or not all(1 <= layer <= teacher_layers for layer in layers):
        raise InputError(
            f"--student_layers {text}: the teacher has {teacher_layers} layers; give at most {teacher_layers}, or "
            f"numbers from 1 to {teacher_layers}"
        )
    return layers


def config_of_layers(teacher: PreTrainedConfig, layers: list[int]) -> PreTrainedConfig:
    """The teacher's configuration with these of its layers (1-based) and no others, and what it says of each layer:
    whether it looks at all tokens or at those nearby, and at how many."""
    config = copy.deepcopy(teacher)
    for name, value in vars(teacher).items():
        if _OF_LAYERS.search(name) and isinstance(value, list) and len(value) == teacher.num_hidden_layers:
            setattr(config, name, [value[layer - 1] for layer in layers])
    config.num_hidden_layers = len(layers)
    return config


# What architectures call a list with something for each layer. Others may be as long by chance.
_OF_LAYERS = re.compile("layer|attention_window")


def student_from_teacher(teacher: PreTrainedModel, layers: list[int]) -> PreTrainedModel:
    """A student made of the teacher's embeddings, head and the given layers (1-based), all copied. Where all layers
    share their weights, as in ALBERT, the student goes through them fewer times.

    Raises InputError where a layer would not compute what it does in the teacher, as ModernBERT's others in the place
    of its first one, which has no norm.
    """
    config, said = config_of_layers(teacher.config, layers), f"--student_layers {','.join(map(str, layers))}"
    if shares_layers(teacher.config):
        student = type(teacher)(config)
        student.load_state_dict(teacher.state_dict())
        return student
    name, stack = layer_stack(teacher)
    weights = {key: value for key, value in teacher.state_dict().items() if not key.startswith(f"{name}.")}
    for position, layer in enumerate(layers):
        for key, value in stack[layer - 1].state_dict().items():
            weights[f"{name}.{position}.{key}"] = value
    try:
        student = type(teacher)(config)
        report = student.load_state_dict(weights, strict=False)
    except Exception as error:  # nothing of ours runs in there
        reason = str(error).splitlines()[-1].strip()  # before it stands which class it was
        raise InputError(f"{said}: {type(teacher).__name__} cannot have fewer layers: {reason}") from error
    if different := [*report.missing_keys, *report.unexpected_keys]:
        raise InputError(
            f"{said}: the layers of {type(teacher).__name__} are not all alike, see {different[0]}; give others "
            "(beginning with 1 perhaps), or a --student_model"
        )
    for ours, layer in zip(student.get_submodule(name), layers, strict=True):
        if _settings(ours) != _settings(stack[layer - 1]):
            raise InputError(
                f"{said}: layer {layer} of {type(teacher).__name__} would compute something else in another place; "
                "give other layers, or a --student_model"
            )
    return student


def shares_layers(config: PreTrainedConfig) -> bool:
    """Whether a model goes through the same weights for each of its layers."""
    return getattr(config, "num_hidden_groups", None) == 1


def _settings(layer: nn.Module) -> dict[str, object]:
    """What a layer's parts are, and are set to beside their weights; its number, and whether it is training, apart."""
    return {
        f"{name}.{key}": value
        for name, module in layer.named_modules()
        for key, value in {"class": type(module), **vars(module)}.items()
        if isinstance(value, (type, bool, int, float, str)) and key not in _NUMBERS and key != "training"
    }


# What a layer calls its number among the layers; as BigBird's seed that is for training alone.
_NUMBERS = ("layer_idx", "layer_id", "layer_num", "layer_number", "seed")


def layer_stack(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The list of a model's layers, and its name. Raises InputError where there is none."""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == model.config.num_hidden_layers:
            return name, module
    raise InputError(
        f"--student_layers: cannot find the {model.config.num_hidden_layers} layers of {type(model).__name__}; give a "
        "--student_model"
    )


@dataclass(frozen=True)
class StoredProjections:
    """The maps to the teacher's width that a general-distilled checkpoint brings, each a (weight, bias).

    per_layer: by layer, 0 for the embedding output (`fit_denses.{0..M}` of TinyBERT v2). shared: one for all layers, as
    the BERT-EMD authors name it (`share_fit_dense`); tinybert: the same by the name that TinyBERT v1 gave it
    (`fit_dense`), under which the authors' code does not find it.
    """

    per_layer: dict[int, tuple[torch.Tensor, torch.Tensor]]
    shared: tuple[torch.Tensor, torch.Tensor] | None
    tinybert: tuple[torch.Tensor, torch.Tensor] | None = None


def stored_projections(name_or_path: str, teacher_width: int) -> StoredProjections:
    """What a student's checkpoint (folder or hub name) brings, among its weights or, as `save_projections` writes them,
    beside these; maps to another width than the teacher's are left out, which is printed. Raises InputError for half a
    map."""
    named = _PROJECTION.search
    weights = read_weights(name_or_path, named) | read_weights(name_or_path, named, (_BESIDE_WEIGHTS,))
    found = {named(key)[1]: value for key, value in weights.items()}
    check_finite(found, f"--student_model {name_or_path}")
    fitting = {key: value for key, value in found.items() if value.shape[0] == teacher_width}
    if len(fitting) < len(found):
        widths = sorted({value.shape[0] for value in found.values()} - {teacher_width})
        print(f"{name_or_path}: its projections are to width {widths}, not to the teacher's {teacher_width}: not used")
    pairs = {}
    for name in {key.rpartition(".")[0] for key in fitting}:
        try:
            pairs[name] = fitting[f"{name}.weight"], fitting[f"{name}.bias"]
        except KeyError as error:
            raise InputError(f"--student_model {name_or_path}: it has no {error.args[0]} beside the rest") from error
    per_layer = {int(name.split(".")[1]): pair for name, pair in pairs.items() if name.startswith("fit_denses.")}
    return StoredProjections(per_layer, pairs.get("share_fit_dense"), pairs.get("fit_dense"))


# Perhaps behind a prefix, with which all of a checkpoint's names may begin.
_PROJECTION = re.compile(r"(?:^|\.)((?:fit_denses\.\d+|fit_dense|share_fit_dense)\.(?:weight|bias))$")


# Among the weights, other loaders of the model would wonder at them.
_BESIDE_WEIGHTS = "projections.safetensors"


def save_projections(projections: nn.ModuleList, folder: Path) -> None:
    """Write a student's maps to its teacher's width, if it has any, beside its weights."""
    names = ["share_fit_dense"] if len(projections) == 1 else [f"fit_denses.{k}" for k in range(len(projections))]
    weights = {
        f"{name}.{key}": value.contiguous()
        for name, linear in zip(names, projections, strict=True)
        for key, value in linear.state_dict().items()
    }
    if weights:
        with replacing_file(folder / _BESIDE_WEIGHTS) as aside:
            save_file(weights, aside)


def use_relu_head(model: PreTrainedModel) -> list[RemovableHandle]:
    """Make the logits `classifier(relu(pooled))`, as the authors' code does, which has no dropout there; the handles
    take it back."""
    body = set(model.base_model.modules())
    dropouts = [module for module in model.modules() if isinstance(module, nn.Dropout) and module not in body]
    return [
        output_layer(model).register_forward_pre_hook(lambda module, inputs: (torch.relu(inputs[0]),)),
        *(module.register_forward_hook(lambda module, inputs, output: inputs[0]) for module in dropouts),
    ]


def make_projections(
    model: PreTrainedModel, teacher_width: int, projection: str = "auto", stored: StoredProjections | None = None
) -> nn.ModuleList:
    """The linear maps that bring a student's hidden states to the teacher's width.

    projection: "per_layer" has one map for the embedding output and one for each layer, "shared" one for all (as the
        authors train), "none" no map; "auto" is what the checkpoint brings, else "none" where the widths are equal,
        else "per_layer".
    stored: maps that the student's checkpoint brings. Those of the chosen kind are where training starts, but TinyBERT
        v1's only with "auto", as in the authors' code; others, and all without a checkpoint's, start at random.
    Raises InputError where there is no map and the widths differ, or a stored map is of a layer that is not there.
    """
    width, layers = model.config.hidden_size, model.config.num_hidden_layers
    stored = stored or StoredProjections({}, None)
    shared = stored.shared
    if projection == "auto":
        shared = shared or stored.tinybert
        if stored.per_layer or (width != teacher_width and not shared):
            projection = "per_layer"
        else:
            projection = "shared" if shared else "none"
    if projection == "none" and width != teacher_width:
        raise InputError(
            f"--projection none: the student is {width} wide, the teacher {teacher_width}; use per_layer or shared"
        )
    count = {"none": 0, "shared": 1, "per_layer": layers + 1}[projection]
    maps = nn.ModuleList(nn.Linear(width, teacher_width) for _ in range(count))
    with torch.no_grad():
        for linear in maps:
            linear.weight.normal_(std=model.config.initializer_range)
            linear.bias.zero_()
        pairs = {"per_layer": stored.per_layer, "shared": {0: shared} if shared else {}}
        for layer, (weight, bias) in pairs.get(projection, {}).items():
            if layer >= count:
                raise InputError(f"--student_model: its checkpoint has fit_denses.{layer}, but only {layers} layers")
            maps[layer].weight.copy_(weight)
            maps[layer].bias.copy_(bias)
    return maps
