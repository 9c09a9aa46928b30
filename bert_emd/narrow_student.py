"""A student of the teacher's architecture and any width, and the start that it takes from the teacher.

The teacher's hidden states x (width d) lie near a space of fewer dimensions. B (d x k, orthonormal columns) spans the
k principal directions of its hidden states on the training text, Bᵀx is where the student (width k) starts, and B is
where its maps to the teacher's width start, so that the layer losses begin at the energy that is lost.
"""

import copy
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from datasets import Dataset
from torch import nn
from transformers import DataCollatorWithPadding, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from bert_emd.starts import Start
from bert_emd.student import StoredProjections, layer_stack, student_from_teacher
from bert_finetune.checkpoints import output_layer
from bert_finetune.errors import InputError
from bert_finetune.processes import is_main_process

# Training examples that a start looks at, evenly spaced; and how many at a time.
TEXTS, _BATCH = 256, 32

# What architectures call the width of their feed-forward layers.
_FFN = ("intermediate_size", "hidden_dim", "d_inner")

# The linear maps of a layer, by the end of their names in BERT, RoBERTa, ELECTRA, DistilBERT, MPNet, DeBERTa.
_PARTS = {
    "query": re.compile(r"(query|query_proj|q_lin|attn\.q)$"),
    "key": re.compile(r"(key|key_proj|k_lin|attn\.k)$"),
    "value": re.compile(r"(value|value_proj|v_lin|attn\.v)$"),
    "context": re.compile(r"(attention\.output\.dense|out_lin|attn\.o)$"),
    "neurons": re.compile(r"(intermediate\.dense|lin1)$"),
    "output": re.compile(r"((^|[^n]\.)output\.dense|lin2)$"),
}


@dataclass(frozen=True)
class Shape:
    """`--student_width`, `--student_ffn`, `--student_heads`; what is None follows the teacher."""

    width: int | None = None
    ffn: int | None = None
    heads: int | None = None


def narrow_config(teacher: PreTrainedConfig, layers: list[int], shape: Shape, start: Start) -> PreTrainedConfig:
    """The teacher's configuration with `layers` (1-based, of the teacher) and `shape`.

    Without `shape.heads` there are as many heads as in the teacher, so that attention scores can be compared; without
    `shape.ffn` the feed-forward layers keep their ratio to the width. Raises InputError for what does not fit.
    """
    config = copy.deepcopy(teacher)
    width = shape.width or teacher.hidden_size
    heads = shape.heads or teacher.num_attention_heads
    for option, value in (("width", shape.width), ("ffn", shape.ffn), ("heads", shape.heads)):
        if value is not None and value < 1:
            raise InputError(f"--student_{option} {value}: must be at least 1")
    if width % heads:
        fitting = ", ".join(str(n) for n in range(1, width + 1) if width % n == 0 and n <= teacher.num_attention_heads)
        raise InputError(
            f"--student_width {width}: {heads} attention heads do not divide it; give a multiple of {heads}, or "
            f"--student_heads, one of {fitting}"
        )
    if start.embeddings and width > teacher.hidden_size:
        raise InputError(
            f"--student_width {width}: the teacher is only {teacher.hidden_size} wide; a wider student starts with "
            "--student_start random"
        )
    ffn_name = _ffn_name(teacher)
    ffn = shape.ffn or round(getattr(teacher, ffn_name) * width / teacher.hidden_size)
    if start.layers and heads != teacher.num_attention_heads:
        raise InputError(
            f"--student_heads {heads}: the teacher's layers have {teacher.num_attention_heads} heads; another number "
            "starts with --student_start embeddings or random"
        )
    if start.layers and ffn > getattr(teacher, ffn_name):
        raise InputError(
            f"--student_ffn {ffn}: the teacher's layers have {getattr(teacher, ffn_name)}; more start with "
            "--student_start embeddings or random"
        )
    if getattr(config, "embedding_size", None) == config.hidden_size:  # ELECTRA and ALBERT may have another width there
        config.embedding_size = width
    config.num_hidden_layers, config.hidden_size, config.num_attention_heads = len(layers), width, heads
    setattr(config, ffn_name, ffn)
    if getattr(config, "layer_types", None):  # some look at all tokens, others at those nearby
        config.layer_types = [config.layer_types[layer - 1] for layer in layers]
    return config


def _ffn_name(config: PreTrainedConfig) -> str:
    for name in _FFN:
        if hasattr(config, name):
            return name
    raise InputError(f"--student_width: cannot find the feed-forward width of a {config.model_type}")


def make_student(teacher: PreTrainedModel, layers: list[int], shape: Shape, start: Start) -> PreTrainedModel:
    """A student of the teacher's architecture: its layers copied where they keep their shape, else with new weights,
    which `start_from_teacher` fills."""
    if is_copy(shape, start):
        return student_from_teacher(teacher, layers)
    config = narrow_config(teacher.config, layers, shape, start)
    try:
        return type(teacher)(config)
    except Exception as error:  # nothing of ours runs in there
        raise InputError(
            f"--student_width: {type(teacher).__name__} cannot be made {config.hidden_size} wide: {error}"
        ) from error


def is_copy(shape: Shape, start: Start) -> bool:
    return start.layers and shape == Shape()


@torch.no_grad()
def start_from_teacher(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    layers: list[int],
    start: Start,
    train: Dataset,
    tokenizer: PreTrainedTokenizerBase,
) -> StoredProjections:
    """Fill in what `start` takes from the teacher; B as the student's maps to the teacher's width.

    layers: the teacher's layer (1-based) for each of the student's.
    """
    copied = _copied_layers(student, teacher, layers) if start.layers else []
    watched = [_parts(theirs)["output"] for _, _, theirs in copied] + [output_layer(teacher)]
    batches = list(_batches(teacher, train, tokenizer))
    seen = _look(teacher, watched, batches)
    counted = [seen.moments[layer] for layer in sorted({0, *(layer for layer, *_ in copied)})]
    wide, width = teacher.config.hidden_size, student.config.hidden_size
    basis = _principal_directions(counted, width)
    modules, pairs = dict(student.named_modules()), []
    for name, theirs in teacher.named_modules():
        if "embedding" in name and name in modules:
            _narrow(modules[name], theirs, basis)
            pairs.append((modules[name], theirs))
    for layer, ours, theirs in copied:
        _narrow_layer(ours, theirs, basis, seen, layer, student.config.num_attention_heads)
        pairs += [(ours.get_submodule(name), module) for name, module in theirs.named_modules()]
    if copied:
        _narrow_head(student, teacher, basis, seen)
    _match_norms(student, teacher, pairs, basis, batches)
    if is_main_process():
        kept = sum(_energy_kept(moment, basis) for moment in counted) / len(counted)
        of = "hidden states'" if copied else "embeddings'"
        print(f"{width} of {wide} directions keep {kept:.0%} of the {of} energy")
    if width == wide:
        return StoredProjections({}, None)
    there = basis.float(), torch.zeros(wide)
    return StoredProjections(dict.fromkeys(range(student.config.num_hidden_layers + 1), there), there)


# What the text shows.


@dataclass(frozen=True)
class _Seen:
    """moments: by layer, 0 for the embedding output, E[(x, 1)(x, 1)ᵀ] of its hidden states x. squares: of the inputs of
    a linear map, their sum."""

    moments: list[torch.Tensor]
    squares: dict[nn.Module, torch.Tensor]


def _batches(
    teacher: PreTrainedModel, train: Dataset, tokenizer: PreTrainedTokenizerBase
) -> Iterator[dict[str, torch.Tensor]]:
    """Some of the training text as the teacher's inputs."""
    count = min(TEXTS, len(train))
    rows = train.select([k * len(train) // count for k in range(count)])
    rows = rows.select_columns([name for name in tokenizer.model_input_names if name in rows.column_names])
    collate = DataCollatorWithPadding(tokenizer)
    for first in range(0, count, _BATCH):
        yield collate([rows[k] for k in range(first, min(first + _BATCH, count))]).to(teacher.device)


def _look(teacher: PreTrainedModel, watched: list[nn.Module], batches: Iterable[dict[str, torch.Tensor]]) -> _Seen:
    """Of all hidden states, and the inputs of the `watched` linear maps; of real tokens."""
    moments, squares, tokens = [], {}, 0
    training = teacher.training
    teacher.eval()
    inputs = {}
    hooks = [
        module.register_forward_pre_hook(lambda module, given: inputs.__setitem__(module, given[0]))
        for module in watched
    ]
    for batch in batches:
        real = batch["attention_mask"].bool()
        states = teacher(**batch, output_hidden_states=True).hidden_states
        for layer, state in enumerate(states):
            x = nn.functional.pad(state[real].double().cpu(), (0, 1), value=1.0)
            if layer == len(moments):
                moments.append(0)
            moments[layer] = moments[layer] + x.T @ x
        for module, given in inputs.items():
            given = given[real] if given.shape[:2] == real.shape else given  # a head sees one row for each text
            squares[module] = squares.get(module, 0) + given.double().square().sum(0).cpu()
        tokens += real.sum().item()
    for hook in hooks:
        hook.remove()
    teacher.train(training)
    return _Seen([moment / tokens for moment in moments], squares)


def _principal_directions(moments: list[torch.Tensor], width: int) -> torch.Tensor:
    """B (d x width): the directions that keep most energy of these layers together, the energy of each counted alike.

    Where nothing is left out, B is the identity.
    """
    second = sum(moment[:-1, :-1] / moment[:-1, :-1].trace() for moment in moments)
    if width == len(second):
        return torch.eye(width, dtype=torch.float64)
    _, directions = torch.linalg.eigh(second)  # the largest come last
    basis = directions[:, -width:].flip(1)
    return basis * basis.gather(0, basis.abs().argmax(0, keepdim=True)).sign()  # of two signs always the same


def _energy_kept(moment: torch.Tensor, basis: torch.Tensor) -> float:
    """E[|Bᵀx|²] / E[|x|²]."""
    second = moment[:-1, :-1]
    return ((basis.T @ second @ basis).trace() / second.trace()).item()


# From wide weights to narrow ones.


def _reduced(value: torch.Tensor, shape: torch.Size, basis: torch.Tensor) -> torch.Tensor:
    """`value`, projected in those of its dimensions in which `shape` is another."""
    value = value.detach().double().cpu()
    for dim, size in enumerate(shape):
        if value.shape[dim] != size:
            value = torch.tensordot(value, basis, dims=([dim], [0])).movedim(-1, dim)
    return value


def _narrow(ours: nn.Module, theirs: nn.Module, basis: torch.Tensor) -> None:
    """A module's own parameters. Of a layer norm's gain g it is the diagonal of Bᵀ diag(g) B."""
    for name, parameter in ours.named_parameters(recurse=False):
        value = getattr(theirs, name)
        if name == "weight" and isinstance(ours, nn.LayerNorm) and parameter.shape != value.shape:
            parameter.copy_(basis.square().T @ value.double().cpu())
        else:
            parameter.copy_(_reduced(value, parameter.shape, basis))


def _match_norms(
    student: PreTrainedModel, teacher: PreTrainedModel, pairs: list, basis: torch.Tensor, batches: list
) -> None:
    """Correct the gain and bias of each narrower layer norm, from the first to the last: its elements have the mean and
    deviation of the teacher's, projected, on the text.

    A layer norm divides by the deviation over its elements, and of fewer elements, and without the energy that is left
    out, that is another one than the teacher's.
    """
    norms = {
        ours: theirs
        for ours, theirs in pairs
        if isinstance(ours, nn.LayerNorm) and ours.weight.shape != theirs.weight.shape
    }
    wanted = _outputs(teacher, list(norms.values()), batches, basis)
    for ours, theirs in norms.items():
        (mean, deviation), (wanted_mean, wanted_deviation) = _outputs(student, [ours], batches)[ours], wanted[theirs]
        scale = wanted_deviation / deviation
        ours.weight.mul_(scale)
        ours.bias.copy_((ours.bias - mean) * scale + wanted_mean)


def _outputs(model, modules: list[nn.Module], batches: list, basis=None) -> dict:
    """By module, the mean and deviation of each element of its outputs."""
    sums, tokens = {module: [0, 0] for module in modules}, 0
    outputs = {}
    hooks = [
        module.register_forward_hook(lambda module, given, output: outputs.__setitem__(module, output))
        for module in modules
    ]
    training = model.training
    model.eval()
    for batch in batches:
        real = batch["attention_mask"].bool()
        model(**batch)
        for module, output in outputs.items():
            x = output[real].double().cpu()
            x = x if basis is None else x @ basis
            sums[module][0] = sums[module][0] + x.sum(0)
            sums[module][1] = sums[module][1] + x.square().sum(0)
        tokens += real.sum().item()
    model.train(training)
    for hook in hooks:
        hook.remove()
    means = {module: (first / tokens, second / tokens) for module, (first, second) in sums.items()}
    return {module: (first, (second - first.square()).clamp(min=0).sqrt()) for module, (first, second) in means.items()}


def _parts(layer: nn.Module) -> dict[str, nn.Linear]:
    """A layer's linear maps by what they do."""
    named = [(name, module) for name, module in layer.named_modules() if isinstance(module, nn.Linear)]
    return {part: module for part, pattern in _PARTS.items() for name, module in named if pattern.search(name)}


def _copied_layers(
    student: PreTrainedModel, teacher: PreTrainedModel, layers: list[int]
) -> list[tuple[int, nn.Module, nn.Module]]:
    """For each of the student's layers the teacher's number, the student's and the teacher's. Raises InputError where
    the linear maps of a layer cannot be told apart."""
    theirs = layer_stack(teacher)[1]
    for layer in theirs:
        linear = [module for module in layer.modules() if isinstance(module, nn.Linear)]
        if set(_parts(layer)) != set(_PARTS) or len(linear) != len(_PARTS):
            raise InputError(
                f"--student_start layers: does not know how to narrow the layers of {type(teacher).__name__}; use "
                "embeddings or random"
            )
    return [(layer, ours, theirs[layer - 1]) for ours, layer in zip(layer_stack(student)[1], layers, strict=True)]


def _narrow_layer(ours: nn.Module, theirs: nn.Module, basis: torch.Tensor, seen: _Seen, layer: int, heads: int) -> None:
    """The student's layer from the teacher's, number `layer` (1-based)."""
    mine, parts = _parts(ours), _parts(theirs)
    done = set(mine.values())
    named = dict(theirs.named_modules())
    for name, module in ours.named_modules():
        if module not in done:
            _narrow(module, named[name], basis)
    _narrow_attention(mine, parts, basis, seen.moments[layer - 1], heads)
    _narrow_neurons(mine["neurons"], mine["output"], parts["neurons"], parts["output"], basis, seen)


def _narrow_attention(
    ours: dict[str, nn.Linear], theirs: dict[str, nn.Linear], basis: torch.Tensor, moment: torch.Tensor, heads: int
) -> None:
    """Query, key, value and context maps, head by head, each with h' of its h dimensions.

    Queries and keys: those that keep most of the scores between any two tokens, E[(qᵀk - q'ᵀk')²] least. With the
    second moments Q and K of queries and keys, and Q^½ K^½ = U S Vᵀ, these are q' = S^-½ Vᵀ K^½ q and
    k' = S^-½ Uᵀ Q^½ k of the h' largest S; both times (h'/h)^¼, as scores are divided by the root of the head size.
    Values: the h' principal directions of what a head adds to the hidden states.
    """
    lift = torch.block_diag(basis, torch.ones(1, 1, dtype=basis.dtype))
    moment = lift.T @ moment @ lift
    query, key, value = (_by_head(theirs[part], lift, heads) for part in ("query", "key", "value"))
    out = (basis.T @ theirs["context"].weight.double().cpu()).unflatten(1, (heads, -1)).movedim(1, 0)
    wide, size = query.shape[1], len(ours["query"].weight) // heads
    if size < wide:
        root_q, root_k = (_root(part @ moment @ part.mT) for part in (query, key))
        left, scale, right = torch.linalg.svd(root_q @ root_k)
        scale = scale[:, :size, None].clamp(min=1e-12).rsqrt() * (size / wide) ** 0.25
        query, key = (
            scale * (right[:, :size] @ root_k @ query),
            scale * (left[:, :, :size].mT @ root_q @ key),
        )
        added = out @ value
        out = torch.linalg.svd(added @ _root(moment), full_matrices=False)[0][:, :, :size]
        value = out.mT @ added
    for part, narrowed in (("query", query), ("key", key), ("value", value)):
        ours[part].weight.copy_(narrowed[..., :-1].flatten(0, 1))
        ours[part].bias.copy_(narrowed[..., -1].flatten())
    ours["context"].weight.copy_(out.movedim(0, 1).flatten(1))
    ours["context"].bias.copy_(_reduced(theirs["context"].bias, ours["context"].bias.shape, basis))


def _by_head(linear: nn.Linear, lift: torch.Tensor, heads: int) -> torch.Tensor:
    """A map's weights and bias side by side, for narrow inputs: (heads, head size, width + 1)."""
    both = torch.cat((linear.weight, linear.bias[:, None]), dim=1).double().cpu()
    return (both @ lift).unflatten(0, (heads, -1))


def _root(moment: torch.Tensor) -> torch.Tensor:
    """The symmetric root of a symmetric, positive matrix."""
    values, vectors = torch.linalg.eigh(moment)
    return vectors * values.clamp(min=0).sqrt()[..., None, :] @ vectors.mT


def _narrow_neurons(
    into: nn.Linear, out: nn.Linear, their_into: nn.Linear, their_out: nn.Linear, basis: torch.Tensor, seen: _Seen
) -> None:
    """Two linear maps with a function between: the neurons stay that add most to what comes out, E[a²] |w|² of the
    activation a and the weights w that lead out of it."""
    weight = _reduced(their_out.weight, (len(out.weight), their_out.in_features), basis)
    weight_in = _reduced(their_into.weight, (their_into.out_features, into.in_features), basis)
    added = seen.squares[their_out] * weight.square().sum(0)
    stay = added.topk(into.out_features).indices.sort().values
    into.weight.copy_(weight_in[stay])
    into.bias.copy_(their_into.bias.double().cpu()[stay])
    out.weight.copy_(weight[:, stay])
    out.bias.copy_(_reduced(their_out.bias, out.bias.shape, basis))


def _narrow_head(student: PreTrainedModel, teacher: PreTrainedModel, basis: torch.Tensor, seen: _Seen) -> None:
    """The classifier, and the layer before it, whose neurons are chosen like a feed-forward layer's."""
    pairs = []
    for model in (student, teacher):
        within = set(layer_stack(model)[1].modules())
        linear = [module for module in model.modules() if isinstance(module, nn.Linear) and module not in within]
        pairs += linear[-2:]
    _narrow_neurons(*pairs, basis, seen)
