import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
    FNetConfig,
    FNetForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from bert_emd.attention_scores import LONGEST_SCORES, expose_attention
from bert_emd.layer_outputs import layer_outputs
from bert_finetune.errors import InputError

ALL = frozenset({"logits", "embedding", "hidden", "attention"})
SIZES = {"vocab_size": 50, "max_position_embeddings": 40}
BERT_SIZES = SIZES | {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 32}
# Per architecture: a tiny model, the names of its query and key layers.
MODELS = {
    "bert": (BertForSequenceClassification, BertConfig(**BERT_SIZES), ("query", "key")),
    "roberta": (RobertaForSequenceClassification, RobertaConfig(**BERT_SIZES), ("query", "key")),
    "electra": (ElectraForSequenceClassification, ElectraConfig(**BERT_SIZES, embedding_size=12), ("query", "key")),
    "distilbert": (
        DistilBertForSequenceClassification,
        DistilBertConfig(**SIZES, dim=24, n_layers=3, n_heads=3, hidden_dim=32),
        ("q_lin", "k_lin"),
    ),
}


def batch():
    ids = torch.randint(5, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    ids[1, 6:], mask[1, 6:] = 1, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("max_seq_length", [LONGEST_SCORES, LONGEST_SCORES + 1])
@pytest.mark.parametrize("name", MODELS)
def test_scores_are_query_times_key_of_the_model_s_own_layers(name, max_seq_length):
    build, config, (query_name, key_name) = MODELS[name]
    torch.manual_seed(0)
    model = build(config).eval()
    expose_attention(model, "--teacher_model", max_seq_length)
    seen = {query_name: [], key_name: []}
    for path, module in model.named_modules():
        kind = path.split(".")[-1]
        if kind in seen:
            module.register_forward_hook(lambda m, i, out, kind=kind: seen[kind].append(out))
    outputs = layer_outputs(model, ALL, **batch())

    assert len(outputs.attention) == 3 and len(outputs.hidden_states) == 4
    for attention, query, key in zip(outputs.attention, seen[query_name], seen[key_name], strict=True):
        q, k = (x.view(2, 9, 3, 8).transpose(1, 2) for x in (query, key))
        scores = attention if max_seq_length == LONGEST_SCORES else attention[0] @ attention[1].mT
        torch.testing.assert_close(scores, q @ k.mT / 8**0.5)


@pytest.mark.parametrize("max_seq_length", [LONGEST_SCORES, LONGEST_SCORES + 1])
@pytest.mark.parametrize("name", MODELS)
def test_the_model_computes_what_it_computed_before(name, max_seq_length):
    build, config, _ = MODELS[name]
    torch.manual_seed(0)
    model = build(config).eval()
    before = model(**batch(), output_hidden_states=True)
    expose_attention(model, "--teacher_model", max_seq_length)
    with_attention = layer_outputs(model, ALL, **batch())
    torch.testing.assert_close(with_attention.logits, before.logits)
    real = batch()["attention_mask"].bool()
    for ours, theirs in zip(with_attention.hidden_states, before.hidden_states, strict=True):
        torch.testing.assert_close(ours[real], theirs[real])
    torch.testing.assert_close(model(**batch()).logits, before.logits)
    assert model(**batch()).attentions is None


@pytest.mark.parametrize("max_seq_length", [LONGEST_SCORES, LONGEST_SCORES + 1])
def test_attention_dropout_is_active_in_training_mode(max_seq_length):
    build, config, _ = MODELS["bert"]
    model = build(config).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.bert.encoder.layer[0].attention.self.dropout.p = 0.5
    expose_attention(model, "--student_model", max_seq_length)
    torch.manual_seed(1)
    first, second = layer_outputs(model, ALL, **batch()), layer_outputs(model, ALL, **batch())
    torch.testing.assert_close(first.attention[0], second.attention[0])
    assert not torch.allclose(first.logits, second.logits)


def test_an_architecture_without_attention_scores_is_refused():
    model = FNetForSequenceClassification(
        FNetConfig(vocab_size=50, hidden_size=24, num_hidden_layers=1, intermediate_size=8)
    )
    with pytest.raises(InputError, match="--teacher_model: FNetForSequenceClassification does not hand out"):
        expose_attention(model, "--teacher_model", 128)
