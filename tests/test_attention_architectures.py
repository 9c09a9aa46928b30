"""Attention scores of architectures beside BERT's family: against what their weights give, computed in other ways, and
in runs."""

import json
import math

import pytest
import torch
from conftest import ROOT, SPECIAL
from glue_files import WORDS
from transformers import AutoConfig, AutoModelForSequenceClassification, BertTokenizer

from bert_emd.attention_scores import (
    FROM_SOFTMAX,
    LONGEST_SCORES,
    attention_heads,
    attention_windows,
    expose_attention,
)
from bert_emd.emd_task_distill import main
from bert_emd.layer_outputs import layer_outputs
from bert_finetune.errors import InputError
from bert_finetune.glue import get_task
from bert_finetune.run_glue import main as run_glue

ALL = frozenset({"logits", "embedding", "hidden", "attention"})
SIZES = {
    **{"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 32},
    **{"max_position_embeddings": 64, "pad_token_id": 0},
}
EMBEDDING = {"embedding_size": 8}
DISENTANGLED = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False}
LENGTH = 9
# What comes behind another: i - j of query i and key j.
BEHIND = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)


def heads(states, count=4):
    """(batch, length, width) -> (batch, heads, length, head size)"""
    return states.unflatten(-1, (count, -1)).transpose(1, 2)


def products(query, key):
    return query @ key.mT / query.shape[-1] ** 0.5


def plain(query="query", key="key", count=4):
    def scores(model, module, states, layer):
        return products(*(heads(getattr(module, name)(states), count) for name in (query, key)))

    return scores


def convolved(model, module, states, layer):
    # SqueezeBERT's states are (batch, width, length).
    return products(*(heads(part(states).mT) for part in (module.query, module.key)))


def mpnet(model, module, states, layer):
    # Up to a distance of 8 each has a bucket, for keys behind the query from 16 on.
    buckets = BEHIND.abs() + 16 * (BEHIND < 0)
    bias = model.mpnet.encoder.relative_attention_bias.weight[buckets]
    return plain("q", "k")(model, module, states, layer) + bias.permute(2, 0, 1)


def turned(states, base, pairs):
    """Each pair of a head's numbers as one complex number, turned by position / base ** (pair / pairs)."""
    angles = torch.arange(LENGTH)[:, None] / base ** (torch.arange(pairs) / pairs)
    return states * torch.polar(torch.ones_like(angles), angles)


def rotated(query, key, base, neighbours):
    """Scores of queries and keys that are turned in pairs of `neighbours`, or of one half's numbers and the other's."""
    shape = (-1, 2) if neighbours else (2, -1)
    size = query.shape[-1]
    query, key = (x.unflatten(-1, shape).movedim(-1 if neighbours else -2, -1).contiguous() for x in (query, key))
    query, key = (turned(torch.view_as_complex(x), base, size // 2) for x in (query, key))
    return (query @ key.mH).real / size**0.5


def roformer(model, module, states, layer):
    return rotated(heads(module.query(states)), heads(module.key(states)), 10_000, neighbours=True)


def rotary(model, module, states, layer):
    base = model.config.rope_parameters["rope_theta"]
    query, key = heads(module.q_proj(states)), module.k_proj(states)
    key = heads(key, key.shape[-1] // query.shape[-1])
    return rotated(query, torch.cat([key[:, [k * key.shape[1] // 4]] for k in range(4)], 1), base, neighbours=False)


def modernbert(model, module, states, layer):
    query, key, _ = module.Wqkv(states).chunk(3, dim=-1)
    base = model.config.rope_parameters[model.config.layer_types[layer]]["rope_theta"]
    return rotated(heads(query), heads(key), base, neighbours=False)


def disentangled(query, key, position_query, position_key, places):
    """DeBERTa's sum: content to content, content to position, position to content; `places`: of query i, key j."""
    total = query @ key.mT
    for i in range(LENGTH):
        for j in range(LENGTH):
            total[..., i, j] += (query[:, :, i] * position_key[:, :, places[i, j]]).sum(-1)
            total[..., i, j] += (key[:, :, j] * position_query[:, :, places[i, j]]).sum(-1)
    return total / (3 * query.shape[-1]) ** 0.5


def deberta(model, module, states, layer):
    query, key, _ = heads(states @ module.in_proj.weight.mT).chunk(3, dim=-1)
    query = query + heads(module.q_bias[None, None])
    positions = model.deberta.encoder.rel_embeddings.weight[None]
    return disentangled(query, key, heads(module.pos_q_proj(positions)), heads(module.pos_proj(positions)), BEHIND + 64)


def deberta_v2(model, module, states, layer):
    positions = model.deberta.encoder.get_rel_embedding()[None]
    shared = model.config.share_att_key
    position_query = (module.query_proj if shared else module.pos_query_proj)(positions)
    position_key = (module.key_proj if shared else module.pos_key_proj)(positions)

    def bucket(distance):
        # Of 8 buckets to either side the first 4 have one distance each, the others grow up to a distance of 63.
        far = math.ceil(math.log(max(abs(distance), 4) / 4) / math.log(63 / 4) * 3) + 4
        return distance if abs(distance) <= 4 else math.copysign(far, distance)

    places = torch.tensor([[int(bucket(d)) + 8 for d in row] for row in BEHIND.tolist()]).clamp(0, 15)
    query, key = heads(module.query_proj(states)), heads(module.key_proj(states))
    return disentangled(query, key, heads(position_query), heads(position_key), places)


# Name -> model type, configuration, the attention modules' class, their scores from their input.
V2 = DISENTANGLED | {"position_buckets": 8, "norm_rel_ebd": "layer_norm"}
WINDOWS = {"global_attn_every_n_layers": 3, "local_attention": 4}
MODELS = {
    "big_bird": ("big_bird", {"attention_type": "original_full"}, "BigBirdSelfAttention", plain()),
    "convbert": ("convbert", EMBEDDING | {"head_ratio": 2}, "ConvBertSelfAttention", plain(count=2)),
    "deberta": ("deberta", DISENTANGLED, "DisentangledSelfAttention", deberta),
    "deberta-v2": ("deberta-v2", V2 | {"share_att_key": False}, "DisentangledSelfAttention", deberta_v2),
    "deberta-v3": ("deberta-v2", V2 | {"share_att_key": True}, "DisentangledSelfAttention", deberta_v2),
    "megatron-bert": ("megatron-bert", {}, "MegatronBertSelfAttention", plain()),
    "mpnet": ("mpnet", {}, "MPNetSelfAttention", mpnet),
    "rembert": ("rembert", {"input_embedding_size": 8}, "RemBertSelfAttention", plain()),
    "roformer": ("roformer", {"embedding_size": 16}, "RoFormerSelfAttention", roformer),
    "squeezebert": ("squeezebert", {"embedding_size": 16}, "SqueezeBertSelfAttention", convolved),
    "eurobert": ("eurobert", {"num_key_value_heads": 2}, "EuroBertAttention", rotary),
    "gte": ("gte", {}, "GteAttention", rotary),
    "modernbert": ("modernbert", WINDOWS, "ModernBertAttention", modernbert),
    "nomic_bert": ("nomic_bert", {}, "NomicBertAttention", rotary),
}


def build(model_type, **changes):
    """With weights that are large enough to make attention uneven, biases too."""
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(model_type, **SIZES, **changes))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


def batch():
    ids = torch.randint(5, 50, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    ids[1, 6:] = mask[1, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def real_pairs():
    mask = batch()["attention_mask"].bool()
    return (mask[:, :, None] & mask[:, None])[:, None]


def scores_of(attention):
    return attention if attention.dim() == 4 else attention[0] @ attention[1].mT


def test_every_architecture_of_the_table_is_tested_and_described():
    assert {model_type for model_type, *_ in MODELS.values()} >= FROM_SOFTMAX
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    assert all(f"`{model_type}`" in page for model_type, *_ in MODELS.values())


@pytest.mark.parametrize("max_seq_length", [LONGEST_SCORES, LONGEST_SCORES + 1])
@pytest.mark.parametrize("name", MODELS)
def test_scores_are_those_of_the_weights(name, max_seq_length):
    model_type, changes, attention_class, by_hand = MODELS[name]
    model, states = build(model_type, **changes), []
    expose_attention(model, "--teacher_model", max_seq_length)
    modules = [module for module in model.modules() if type(module).__name__ == attention_class]
    for module in modules:
        module.register_forward_pre_hook(
            lambda module, args, kwargs: states.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
    outputs = layer_outputs(model, ALL, **batch())
    assert len(outputs.attention) == len(modules) == 3 and len(outputs.hidden_states) == 4
    has_factors = model_type not in FROM_SOFTMAX and attention_windows(model.config) is None
    assert outputs.attention[0].dim() == (5 if has_factors and max_seq_length > LONGEST_SCORES else 4)
    for layer, attention in enumerate(outputs.attention):
        expected = by_hand(model, modules[layer], states[layer], layer)
        assert attention.shape[-3] == expected.shape[1] == attention_heads(model.config)
        real = real_pairs().expand_as(expected)
        torch.testing.assert_close(scores_of(attention)[real], expected[real], rtol=1e-4, atol=1e-4)
        assert expected[real].std() > 0.1
        if model_type in FROM_SOFTMAX:
            masked = ~batch()["attention_mask"].bool()[:, None, None].expand_as(expected)
            assert (attention[masked] == 0).all()


@pytest.mark.parametrize("name", MODELS)
def test_their_softmax_is_the_model_s_own_attention_and_nothing_else_changes(name):
    model_type, changes, *_ = MODELS[name]
    model = build(model_type, **changes)
    model.set_attn_implementation("eager")
    before = model(**batch(), output_attentions=True)
    expose_attention(model, "--teacher_model", LONGEST_SCORES)
    outputs = layer_outputs(model, ALL, **batch())
    torch.testing.assert_close(outputs.logits, before.logits, rtol=1e-4, atol=1e-4)
    windows = attention_windows(model.config) or ([math.inf] * 3,)
    for scores, own, window in zip(outputs.attention, before.attentions, *windows, strict=True):
        if model_type == "squeezebert":  # which gives masked scores out as attentions
            own = own.softmax(-1)
        seen = real_pairs() & (BEHIND.abs() <= window)
        probabilities = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        real = real_pairs().expand_as(own)
        torch.testing.assert_close(probabilities[real], own[real], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_reach_every_layer_that_makes_scores(name):
    model_type, changes, attention_class, _ = MODELS[name]
    model = build(model_type, **changes)
    expose_attention(model, "--student_model", LONGEST_SCORES)
    with torch.no_grad():
        assert not layer_outputs(model, ALL, **batch()).attention[-1].requires_grad
    modules = [module for module in model.modules() if type(module).__name__ == attention_class]
    for layer in range(len(modules)):
        model.zero_grad()
        layer_outputs(model, ALL, **batch()).attention[layer].square().mean().backward()
        reached = [
            any(weight.grad is not None and weight.grad.abs().max() > 0 for weight in module.parameters())
            for module in modules
        ]
        assert reached == [k <= layer for k in range(len(modules))]


@pytest.mark.parametrize("name", [name for name in MODELS if name != "deberta"])
def test_scores_in_bfloat16_are_near(name):
    model_type, changes, *_ = MODELS[name]
    model = build(model_type, **changes)
    expose_attention(model, "--teacher_model", LONGEST_SCORES)
    exact = layer_outputs(model, ALL, **batch()).attention[0]
    with torch.autocast("cpu", torch.bfloat16):
        rounded = layer_outputs(model, ALL, **batch()).attention[0].float()
    real = real_pairs().expand_as(exact)
    torch.testing.assert_close(rounded[real], exact[real], rtol=0.05, atol=0.05 * exact[real].std().item())


def test_scores_are_the_same_when_compiled():
    model = build("mpnet")
    as_it_is = layer_outputs(model, ALL, **batch()).attention
    model.compile(dynamic=True, backend="eager")
    for ours, theirs in zip(layer_outputs(model, ALL, **batch()).attention, as_it_is, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    "model_type, changes",
    [
        ("gpt2", {}),
        ("llama", {"num_key_value_heads": 2}),
        ("qwen3", {"num_key_value_heads": 1, "head_dim": 4}),
        ("doge", {"num_key_value_heads": 2}),
        *[(name, {"is_decoder": True}) for name in ("bert", "rembert", "roformer", "megatron-bert")],
        ("big_bird", {"is_decoder": True, "attention_type": "original_full"}),
    ],
)
def test_decoders_are_refused(model_type, changes):
    with pytest.raises(InputError, match=r"--teacher_model: .* is a decoder, .* --use_att False"):
        expose_attention(build(model_type, **changes), "--teacher_model", 128)


def test_other_attention_is_refused():
    with pytest.raises(InputError, match=r"--student_model: Longf.* does not hand out its attention scores; use"):
        expose_attention(build("longformer", attention_window=4), "--student_model", 128)


def test_windows_that_are_not_known_are_refused():
    gemma = build("gemma3_text", use_bidirectional_attention=True, head_dim=4, num_key_value_heads=2)
    with pytest.raises(
        InputError, match=r"--teacher_model: in some layers of Gemma3.* only its neighbours, .* use --use"
    ):
        expose_attention(gemma, "--teacher_model", 128)


def save(model_type, folder, **changes):
    """A tiny "fine-tuned" teacher for RTE with its tokenizer."""
    vocabulary = SPECIAL + WORDS
    names = get_task("RTE").kind.output_names
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: k for k, name in enumerate(names)}}
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **SIZES | changes | labels | {"vocab_size": len(vocabulary)})
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    BertTokenizer(vocab={word: k for k, word in enumerate(vocabulary)}).save_pretrained(folder)
    return folder


def distil(teacher, glue_dir, out, *more):
    argv = [
        *("--teacher_model", teacher, "--task_name", "RTE", "--data_dir", glue_dir / "RTE", "--output_dir", out),
        *("--max_seq_length", 32, "--num_train_epochs", 1, "--train_batch_size", 8, "--no_cuda", *more),
    ]
    main([str(argument) for argument in argv])
    return json.loads((out / "eval_results.json").read_text())["history"][-1]


@pytest.mark.training
@pytest.mark.parametrize("name", ["convbert", "deberta-v3", "mpnet", "squeezebert", "eurobert"])
def test_students_of_their_own_layers_learn_attention(name, glue_dir, tmp_path):
    model_type, changes, *_ = MODELS[name]
    teacher = save(model_type, tmp_path / "teacher", **changes)
    own = "--student_layers", "1,3", "--teacher_cache", "memory", "--num_train_epochs", 2
    assert distil(teacher, glue_dir, tmp_path / "out", *own)["attention_loss"] > 0


@pytest.mark.training
@pytest.mark.parametrize("model_type, changes", [("deberta-v2", V2), ("modernbert", WINDOWS)])
def test_a_student_that_has_factors_learns_from_a_teacher_that_has_scores(model_type, changes, glue_dir, tmp_path):
    teacher = save(model_type, tmp_path / "teacher", **changes, max_position_embeddings=512)
    student = save("bert", tmp_path / "student", max_position_embeddings=512, num_hidden_layers=2)
    long = "--student_model", student, "--max_seq_length", LONGEST_SCORES + 1
    assert distil(teacher, glue_dir, tmp_path / "out", *long)["attention_loss"] > 0


@pytest.mark.training
@pytest.mark.parametrize(
    "model_type, changes",
    [("deberta", DISENTANGLED), ("xmod", {"languages": ["en_XX"], "default_language": "en_XX"})],
)
def test_models_that_cannot_do_with_bfloat16_run_in_float32(model_type, changes, glue_dir, tmp_path, capsys):
    teacher = save(model_type, tmp_path / "teacher", **changes)
    entry = distil(teacher, glue_dir, tmp_path / "out", "--student_layers", "1,3", "--bf16", True)
    assert entry["attention_loss"] > 0
    # Once for the teacher, once for the student.
    told = "ForSequenceClassification computes in float32: transformers' code for it knows no lower precision"
    assert capsys.readouterr().out.count(told) == 2
    tuned = tmp_path / "tuned"
    argv = [
        *("--model_name_or_path", teacher, "--task_name", "RTE", "--data_dir", glue_dir / "RTE", "--output_dir", tuned),
        *("--max_seq_length", 32, "--num_train_epochs", 1, "--no_cuda", "--bf16", True, "--do_train", "--do_eval"),
    ]
    run_glue([str(argument) for argument in argv])
    assert capsys.readouterr().out.count(told) == 1


def test_a_decoder_s_attention_ends_a_run_before_data_is_read(tmp_path, exits_with_2):
    teacher = save("llama", tmp_path / "teacher", num_key_value_heads=2)
    for split in ("train", "dev"):
        (tmp_path / f"{split}.tsv").write_text("not what RTE's files are")
    argv = "--teacher_model", teacher, "--student_model", teacher, "--task_name", "RTE", "--data_dir", tmp_path
    told = exits_with_2(main, *argv, "--max_seq_length", 32, "--no_cuda", "--output_dir", tmp_path / "out")
    assert "LlamaForSequenceClassification is a decoder" in told
