"""A student of the teacher's architecture and any width, and what it takes from the teacher at its start.

The teacher's hidden states x (width d) lie near a space of fewer dimensions. B (d x k, orthonormal columns) spans the
k principal directions of its hidden states on the training text. The student (width k) starts near Bᵀx, and its maps to
the teacher's width start at B, so that the layer losses begin near the energy that B leaves out.
"""

import math
import re
from collections.abc import Iterator

import torch
from datasets import Dataset
from torch import nn
from transformers import DataCollatorWithPadding, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from bert_emd.starts import Shape, Start
from bert_emd.student import config_of_layers, layer_stack, shares_layers, student_from_teacher
from bert_finetune.errors import InputError
from bert_finetune.processes import is_main_process

# Training examples that a start looks at, evenly spaced; and how many at a time.
TEXTS, _BATCH = 256, 32

# What architectures call the width of their feed-forward layers.
_FFN = ("hidden_dim", "d_inner", "intermediate_size")

# What they call other widths, which mostly are the hidden width: ELECTRA's embeddings may be narrower.
_WIDTHS = ("embedding_size", "pooler_hidden_size")

# The linear maps of a layer, by the end of their names in BERT, RoBERTa and ELECTRA, DistilBERT, MPNet.
_PARTS = {
    "query": re.compile(r"(query|q_lin|attn\.q)$"),
    "key": re.compile(r"(key|k_lin|attn\.k)$"),
    "value": re.compile(r"(value|v_lin|attn\.v)$"),
    "context": re.compile(r"(attention\.output\.dense|out_lin|attn\.o)$"),
    "neurons": re.compile(r"(intermediate\.dense|lin1)$"),
    "output": re.compile(r"(^output\.dense|lin2)$"),
}

_Batches = list[dict[str, torch.Tensor]]


def narrow_config(teacher: PreTrainedConfig, layers: list[int], shape: Shape, start: Start) -> PreTrainedConfig:
    """The teacher's configuration with `layers` (1-based, of the teacher) and `shape`.

    Without `shape.heads` there are as many heads as in the teacher, so that attention scores can be compared; without
    `shape.ffn` the feed-forward layers keep their ratio to the width. Raises InputError for what does not fit.
    """
    config = config_of_layers(teacher, layers)
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
    for name in _WIDTHS:
        if getattr(config, name, None) == config.hidden_size:
            setattr(config, name, width)
    if vars(config).get("head_dim"):
        config.head_dim = width // heads
    if groups := vars(config).get("num_key_value_heads"):  # as many of them for each head, as near as they divide
        config.num_key_value_heads = math.gcd(heads, max(1, groups * heads // teacher.num_attention_heads))
    config.hidden_size, config.num_attention_heads = width, heads
    setattr(config, ffn_name, ffn)
    return config


def _ffn_name(config: PreTrainedConfig) -> str:
    for name in _FFN:
        if hasattr(config, name):
            return name
    raise InputError(f"--student_width: cannot find the feed-forward width of a {config.model_type}")


def make_student(teacher: PreTrainedModel, layers: list[int], shape: Shape, start: Start) -> PreTrainedModel:
    """A student of the teacher's architecture, as `start_from_teacher` wants it: with the teacher's layers where these
    keep their shape, else with new weights.

    layers: the teacher's layer (1-based) for each of the student's. Raises InputError where that cannot be done.
    """
    if start.layers and shape == Shape():
        return student_from_teacher(teacher, layers)
    config = narrow_config(teacher.config, layers, shape, start)
    if start.layers:
        _check_parts(teacher)
    try:
        student = type(teacher)(config)
        with torch.no_grad():  # rotary positions, for one, want an even head size, and say so only here
            student.eval().base_model(input_ids=torch.zeros(1, 1, dtype=torch.long))
    except Exception as error:  # nothing of ours runs in there
        raise InputError(
            f"--student_width: {type(teacher).__name__} cannot be made {config.hidden_size} wide with "
            f"{config.num_attention_heads} heads: {' '.join(str(error).split())}"
        ) from error
    student.train()
    if start.embeddings:
        _check_shapes(student, teacher, start)
    return student


@torch.no_grad()
def start_from_teacher(
    student: PreTrainedModel,
    projections: nn.ModuleList,
    teacher: PreTrainedModel,
    layers: list[int],
    start: Start,
    train: Dataset,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Fill in what the student and its `projections` to the teacher's width take from the teacher by `start`.

    layers: the teacher's layer (1-based) for each of the student's. train: the tokenised training text, of which
    `TEXTS` examples are looked at. Prints the share of the energy of hidden states that B keeps.
    """
    copied = {}
    if start.layers:
        theirs = layer_stack(teacher)[1]
        copied = {ours: theirs[k - 1] for ours, k in zip(layer_stack(student)[1], layers, strict=True)}
    batches = _batches(train, tokenizer, teacher.device)
    student.to(teacher.device)
    counted = sorted({0, *(layers if copied else [])})
    head = _head(teacher) if copied else []
    outputs = [_parts(layer)["output"] for layer in copied.values()] + head[-1:]
    inputs = [k - 1 for k in layers] if copied else []
    moments, squares = _look(teacher, batches, {*counted, *inputs}, outputs)
    basis = _principal_directions([moments[k] for k in counted], student.config.hidden_size)

    pairs = _outside_layers(student, teacher, start)
    for ours, theirs in pairs:
        _narrow(ours, theirs, basis)
    for (ours, theirs), k in zip(copied.items(), inputs, strict=True):
        mine, parts = _parts(ours), _parts(theirs)
        more = [(ours.get_submodule(name), module) for name, module in theirs.named_modules()]
        for narrower, module in more:
            if module not in parts.values():
                _narrow(narrower, module, basis)
        _narrow_attention(mine, parts, basis, moments[k], student.config.num_attention_heads)
        _narrow_neurons(*(part[name] for part in (mine, parts) for name in ("neurons", "output")), basis, squares)
        pairs += more
    if head:
        _narrow_neurons(*_head(student), *head, basis, squares)
    _match_norms(student, teacher, pairs, basis, batches)
    for linear in projections:
        linear.weight.copy_(basis)
        linear.bias.zero_()
    if is_main_process():
        kept = sum(_energy_kept(moments[k], basis) for k in counted) / len(counted)
        of = "hidden states'" if copied else "embeddings'"
        print(f"{basis.shape[1]} of {len(basis)} directions keep {kept:.0%} of the {of} energy")


# What the text shows.


def _batches(train: Dataset, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> _Batches:
    """Some of the training text as a model's inputs."""
    count = min(TEXTS, len(train))
    rows = train.select([k * len(train) // count for k in range(count)])
    rows = rows.select_columns([name for name in tokenizer.model_input_names if name in rows.column_names])
    rows = sorted(rows, key=lambda row: len(row["input_ids"]))  # little padding
    collate = DataCollatorWithPadding(tokenizer)
    return [collate(rows[first : first + _BATCH]).to(device) for first in range(0, count, _BATCH)]


def _run(
    model: PreTrainedModel, batches: _Batches, modules: list[nn.Module], inputs: bool = False
) -> Iterator[tuple[list[torch.Tensor], dict[nn.Module, torch.Tensor]]]:
    """For each batch the hidden states, and what `modules` give out, or take in: each (real tokens, width), in double
    precision; (texts, width) where a module looks at one token of a text."""
    seen = {}
    hooks = [
        module.register_forward_hook(
            lambda module, given, output: seen.__setitem__(module, given[0] if inputs else output)
        )
        for module in modules
    ]
    training = model.training
    model.eval()
    try:
        for batch in batches:
            states = model(**batch, output_hidden_states=True).hidden_states
            real = batch["attention_mask"].bool()

            def rows(x: torch.Tensor, real: torch.Tensor = real) -> torch.Tensor:
                x = x[0] if isinstance(x, tuple) else x  # I-BERT's modules give their scale, too
                # Longformer pads its sequences further.
                return (x[:, : real.shape[1]][real] if x.dim() == 3 else x).double().cpu()

            yield [rows(state) for state in states], {module: rows(x) for module, x in seen.items()}
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()


def _look(
    teacher: PreTrainedModel, batches: _Batches, layers: set[int], modules: list[nn.Module]
) -> tuple[dict[int, torch.Tensor], dict[nn.Module, torch.Tensor]]:
    """By layer, 0 for the embedding output, E[(x, 1)(x, 1)ᵀ] of its hidden states x; and of each linear map the sum of
    its inputs' squares."""
    moments, squares, tokens = dict.fromkeys(layers, 0), dict.fromkeys(modules, 0), 0
    for states, inputs in _run(teacher, batches, modules, inputs=True):
        tokens += len(states[0])
        for layer in layers:
            x = nn.functional.pad(states[layer], (0, 1), value=1.0)
            moments[layer] = moments[layer] + x.T @ x
        for module, a in inputs.items():
            squares[module] = squares[module] + a.square().sum(0)
    return {layer: moment / tokens for layer, moment in moments.items()}, squares


def _means_and_deviations(
    model: PreTrainedModel, batches: _Batches, modules: list[nn.Module], basis: torch.Tensor | None = None
) -> dict[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    """Of each element of what a module gives out, on `basis` where there is one."""
    outputs = {module: [] for module in modules}
    for _, seen in _run(model, batches, modules):
        for module, x in seen.items():
            outputs[module].append(x if basis is None else x @ basis)
    return {module: torch.std_mean(torch.cat(x), dim=0)[::-1] for module, x in outputs.items()}


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
        if name == "weight" and _is_norm(ours) and parameter.shape != value.shape:
            parameter.copy_(basis.square().T @ value.double().cpu())
        else:
            parameter.copy_(_reduced(value, parameter.shape, basis))


def _is_norm(module: nn.Module) -> bool:
    """Whether a module has a gain for each element: architectures have layer norms of their own beside PyTorch's."""
    weight = getattr(module, "weight", None)
    return torch.is_tensor(weight) and weight.dim() == 1


def _match_norms(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    pairs: list[tuple[nn.Module, nn.Module]],
    basis: torch.Tensor,
    batches: _Batches,
) -> None:
    """Give each narrower layer norm, from the first to the last, a gain and bias with which its elements have the mean
    and deviation that the teacher's have on B.

    A layer norm divides by the deviation over its elements, and of fewer elements, and without the energy that is left
    out, that is another one than the teacher's.
    """
    norms = {ours: theirs for ours, theirs in pairs if _is_norm(ours) and ours.weight.shape != theirs.weight.shape}
    wanted = _means_and_deviations(teacher, batches, list(norms.values()), basis)
    for ours, theirs in norms.items():
        mean, deviation = _means_and_deviations(student, batches, [ours])[ours]
        wanted_mean, wanted_deviation = wanted[theirs]
        scale = wanted_deviation / deviation.clamp(min=1e-12)
        ours.weight.copy_(ours.weight.cpu() * scale)
        if getattr(ours, "bias", None) is not None:
            ours.bias.copy_((ours.bias.cpu() - mean) * scale + wanted_mean)


def _parts(layer: nn.Module) -> dict[str, nn.Linear]:
    """A layer's linear maps by what they do."""
    named = [(name, module) for name, module in layer.named_modules() if isinstance(module, nn.Linear)]
    return {part: module for part, pattern in _PARTS.items() for name, module in named if pattern.search(name)}


def _check_parts(teacher: PreTrainedModel) -> None:
    """Raise InputError where the linear maps of a layer cannot be told apart."""

    def known(layer: nn.Module) -> bool:
        linear = [module for module in layer.modules() if isinstance(module, nn.Linear)]
        return set(_parts(layer)) == set(_PARTS) and len(linear) == len(_PARTS)

    if shares_layers(teacher.config) or not all(map(known, layer_stack(teacher)[1])):
        raise InputError(
            f"--student_start layers: does not know how to narrow the layers of {type(teacher).__name__}; use "
            "embeddings or random"
        )


def _check_shapes(student: PreTrainedModel, teacher: PreTrainedModel, start: Start) -> None:
    """Raise InputError where what the student takes would have to be narrowed in anything but the hidden width."""
    hidden = teacher.config.hidden_size, student.config.hidden_size
    for ours, theirs in _outside_layers(student, teacher, start):
        for name, parameter in ours.named_parameters(recurse=False):
            sizes = zip(getattr(theirs, name).shape, parameter.shape, strict=True)
            if any(wide != narrow and (wide, narrow) != hidden for wide, narrow in sizes):
                raise InputError(
                    f"--student_width {hidden[1]}: does not know how to narrow all of {type(teacher).__name__} that "
                    f"it would take; use --student_start {'embeddings or ' * start.layers}random"
                )


def _outside_layers(
    student: PreTrainedModel, teacher: PreTrainedModel, start: Start
) -> list[tuple[nn.Module, nn.Module]]:
    """The student's and the teacher's modules outside their layers, as far as `start` takes them."""
    ours, within, pieces = dict(student.named_modules()), set(), teacher.get_input_embeddings()
    if start.layers:
        within = set(layer_stack(teacher)[1].modules())
    return [
        (ours[name], module)
        for name, module in teacher.named_modules()
        if module not in within and (start.layers or "embedding" in name or module is pieces)
    ]


def _head(model: PreTrainedModel) -> list[nn.Linear]:
    """The map before the classifier, and the classifier; empty for a model without one."""
    if model.base_model is model:
        return []
    within = set(layer_stack(model)[1].modules())
    return [module for module in model.modules() if isinstance(module, nn.Linear) and module not in within][-2:]


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
    into: nn.Linear,
    out: nn.Linear,
    their_into: nn.Linear,
    their_out: nn.Linear,
    basis: torch.Tensor,
    squares: dict[nn.Module, torch.Tensor],
) -> None:
    """Two linear maps with a function between: the neurons stay that add most to what comes out, E[a²] |w|² of the
    activation a and the weights w that lead out of it."""
    weight = _reduced(their_out.weight, (len(out.weight), their_out.in_features), basis)
    weight_in = _reduced(their_into.weight, (their_into.out_features, into.in_features), basis)
    added = squares[their_out] * weight.square().sum(0)
    stay = added.topk(into.out_features).indices.sort().values
    into.weight.copy_(weight_in[stay])
    into.bias.copy_(their_into.bias.double().cpu()[stay])
    out.weight.copy_(weight[:, stay])
    out.bias.copy_(_reduced(their_out.bias, out.bias.shape, basis))
