"""Pre-softmax attention scores, or the queries and keys whose products they are, out of a transformers model.

Two registered attention functions serve every architecture that uses transformers' attention interface. Scores are what
the layer losses compare most cheaply for short inputs, and the model makes them anyway. For long ones their size grows
with the square of the length: there the models run fused attention and hand out queries and keys. Of the architectures
in `FROM_SOFTMAX` scores are read where they go into the softmax, at any length.
"""

import math

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from bert_finetune.errors import InputError

# Inputs that may be longer than this are compared by their factors: from there on the layer losses take about as long
# with them and a fraction of the memory (benchmarks/RESULTS.md, table e).
LONGEST_SCORES = 256

# Architectures, by `model_type`, that are not on the interface and take one softmax over all keys in each layer. What
# goes into it has the scale and all that positions add.
FROM_SOFTMAX = frozenset(
    {
        "big_bird",  # in full attention, as `attend_fully` has it
        "convbert",  # of its heads of attention; the others are convolutions
        "deberta",  # with the disentangled terms of positions
        "deberta-v2",  # of DeBERTa-v3 too
        "megatron-bert",
        "mpnet",  # with the bias of each bucket of positions
        "rembert",
        "roformer",  # of rotated queries and keys
        "squeezebert",
    }
)

# Architectures whose `sliding_window` is what `attention_windows` says; Gemma's, for one, counts a token more.
_WINDOWED = ("modernbert",)


def attention_with_scores(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    output_attentions: bool = False,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention whose second result is its scores before mask and softmax, (batch, heads, length, length).

    Shapes: `query`, `key`, `value` (batch, heads, length, head size); `attention_mask` additive and broadcastable to
    the scores; the first result is (batch, length, heads, head size). Fewer heads of keys and values are each repeated
    for their group of queries. `scaling` is 1/√(head size) by default. Without `output_attentions` the attention is
    fused, and there are no scores.
    """
    if not output_attentions:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    key, value = _of_all_heads(key, query), _of_all_heads(value, query)
    scores = _scaled(query, scaling) @ key.mT
    masked = scores if attention_mask is None else scores + attention_mask
    probabilities = functional.dropout(functional.softmax(masked, dim=-1), dropout, module.training)
    return (probabilities.to(value.dtype) @ value).transpose(1, 2).contiguous(), scores


def attention_with_factors(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    output_attentions: bool = False,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Fused attention whose second result is the factors of its scores, (2, batch, heads, length, head size).

    The factors are `scaling * query` and `key`: the scores are factors[0] @ factors[1]ᵀ. Else as
    `attention_with_scores`.
    """
    factors = torch.stack((_scaled(query, scaling), _of_all_heads(key, query))) if output_attentions else None
    output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    return output, factors


def _scaled(query: torch.Tensor, scaling: float | None) -> torch.Tensor:
    return query * (query.shape[-1] ** -0.5 if scaling is None else scaling)


def _of_all_heads(keys: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    return repeat_kv(keys, query.shape[1] // keys.shape[1])


for _name, _function in (("scores", attention_with_scores), ("factors", attention_with_factors)):
    AttentionInterface.register(_name, _function)
    AttentionMaskInterface.register(_name, eager_mask)


class SoftmaxInputs(TorchFunctionMode):
    """While it is entered, `scores` collects what goes into each softmax of a model in `FROM_SOFTMAX`: one tensor
    (batch, heads, length, length) for each layer, with gradients, and 0 where the mask is."""

    def __init__(self):
        super().__init__()
        self.scores = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is functional.softmax:
            scores = args[0]
            # These models add the lowest number of a dtype, or put it, where a token must not look.
            self.scores.append(scores.masked_fill(scores < torch.finfo(scores.dtype).min / 2, 0))
        return function(*args, **(kwargs or {}))


def attention_heads(config: PreTrainedConfig) -> int:
    """How many heads of scores a layer has."""
    if config.model_type == "convbert":
        return max(config.num_attention_heads // config.head_ratio, 1)
    return config.num_attention_heads


def attention_windows(*configs: PreTrainedConfig) -> tuple[list[float], ...] | None:
    """Of each model, how many tokens the queries of each layer see to either side, infinity for all; None where all of
    the models' layers see all tokens."""
    types = [getattr(config, "layer_types", None) or [""] * config.num_hidden_layers for config in configs]
    if not any("sliding_attention" in each for each in types):
        return None
    return tuple(
        [config.sliding_window if kind == "sliding_attention" else math.inf for kind in each]
        for config, each in zip(configs, types, strict=True)
    )


def expose_attention(model: PreTrainedModel, option: str, max_seq_length: int) -> None:
    """Have `layer_outputs` find a model's pre-softmax attention scores, or their factors.

    `max_seq_length`: of the inputs; it decides between the two, where a model has both. Raises InputError, naming
    `option`, for an architecture whose scores are not to be had, or do not all exist.
    """
    config, name = model.config, type(model).__name__
    if not _sees_ahead(model):
        raise InputError(
            f"{option}: {name} is a decoder, in which tokens see only what stands before them: half of the attention "
            "scores do not exist; use --use_att False"
        )
    if config.model_type in FROM_SOFTMAX:
        return
    if not type(model)._supports_attention_backend:
        raise InputError(
            f"{option}: {name} does not hand out its attention scores; use --use_att False, or an architecture of "
            "docs/models.md"
        )
    windows = attention_windows(config)
    if windows is not None and config.model_type not in _WINDOWED:
        raise InputError(
            f"{option}: in some layers of {name} a token sees only its neighbours, and it is not known here which; use "
            "--use_att False, or an architecture of docs/models.md"
        )
    # In sums over products of factors no window can be left out.
    whole = max_seq_length <= LONGEST_SCORES or windows is not None
    model.set_attn_implementation("scores" if whole else "factors")


@torch.no_grad()
def _sees_ahead(model: PreTrainedModel) -> bool:
    """Whether the state of a text's first token depends on its last one."""
    training, last = model.training, len(model.get_input_embeddings().weight) - 1
    ids = torch.tensor([[last, last], [last, last - 1]], device=model.device)
    states = model.eval().base_model(input_ids=ids, attention_mask=torch.ones_like(ids))[0]
    model.train(training)
    return not torch.equal(states[0, 0], states[1, 0])
