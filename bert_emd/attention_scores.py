"""How a transformer hands out its pre-softmax attention scores.

transformers lets a model run any registered attention function. This one computes ordinary attention and, when the
model is called with `output_attentions=True`, returns the scores QKᵀ/√d where others return the probabilities. So
nothing is copied or hooked: `model(..., output_attentions=True).attentions` are the scores, for every architecture that
uses transformers' attention interface.
"""

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from bert_finetune.errors import InputError

_NAME = "scores"


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
    """Attention whose second result is the scores before mask and softmax, `scaling * query @ keyᵀ`.

    Shapes: `query`, `key`, `value` (batch, heads, length, head size); `attention_mask` additive and broadcastable to
    (batch, heads, length, length); the first result is (batch, length, heads, head size), the scores (batch, heads,
    length, length). `scaling` is 1/√(head size) by default. Without `output_attentions` no scores are kept.
    """
    if not output_attentions:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    probabilities = torch.softmax(scores if attention_mask is None else scores + attention_mask, dim=-1)
    probabilities = nn.functional.dropout(probabilities, dropout, module.training)
    return (probabilities @ value).transpose(1, 2).contiguous(), scores


AttentionInterface.register(_NAME, attention_with_scores)
AttentionMaskInterface.register(_NAME, eager_mask)


def expose_attention_scores(model: PreTrainedModel, option: str) -> None:
    """Make `model(..., output_attentions=True).attentions` the pre-softmax scores of its layers.

    Raises InputError, naming `option`, for an architecture that does not use transformers' attention interface.
    """
    if not type(model)._supports_attention_backend:
        raise InputError(
            f"{option}: {type(model).__name__} does not hand out its attention scores through transformers' attention "
            "interface; use a BERT, RoBERTa, ELECTRA or DistilBERT model"
        )
    model.set_attn_implementation(_NAME)
