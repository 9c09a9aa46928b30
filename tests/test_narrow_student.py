"""Students of the teacher's architecture and any width: their shape, what they take from it, their runs."""

import shutil

import pytest
import torch
from conftest import save_bert
from datasets import Dataset
from glue_files import WORDS
from test_run_checkpoints import stopped
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    MPNetConfig,
    MPNetForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from bert_emd import task_distillation
from bert_emd.emd_task_distill import main as distil
from bert_emd.narrow_student import _narrow_attention, _parts, make_student, narrow_config, start_from_teacher
from bert_emd.starts import STARTS, Shape
from bert_emd.student import make_projections
from bert_finetune.errors import InputError

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
RTE = ["entailment", "not_entailment"]
SIZES = {"vocab_size": len(VOCABULARY), "hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 48}
ELECTRA = ElectraForSequenceClassification, ElectraConfig
TEACHERS = {
    "BERT": (BertForSequenceClassification, BertConfig, {}),
    "RoBERTa": (RobertaForSequenceClassification, RobertaConfig, {"pad_token_id": 0}),
    "ELECTRA": (*ELECTRA, {"embedding_size": 16}),
    "ELECTRA of one width": (*ELECTRA, {"embedding_size": 24}),
    "DistilBERT": (DistilBertForSequenceClassification, DistilBertConfig, {"hidden_dim": 48}),
    "MPNet": (MPNetForSequenceClassification, MPNetConfig, {"pad_token_id": 0}),
}


def make(model, config, **changes):
    torch.manual_seed(1)
    # Larger weights than usual, so that a layer changes its input.
    return model(config(**SIZES | {"num_hidden_layers": 4, "initializer_range": 0.3} | changes)).eval()


@pytest.fixture(params=TEACHERS)
def teacher(request):
    model, config, changes = TEACHERS[request.param]
    return make(model, config, **changes)


@pytest.fixture(scope="module")
def tokenizer():
    return BertTokenizer(vocab={word: k for k, word in enumerate(VOCABULARY)})


@pytest.fixture(scope="module")
def train(tokenizer):
    generator = torch.Generator().manual_seed(0)
    ids = [
        [2, *torch.randint(5, len(VOCABULARY), (length,), generator=generator).tolist(), 3]
        for length in (3, 9, 6, 12) * 15
    ]
    return Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]})


def started(teacher, train, tokenizer, layers=(1, 2, 3, 4), start="layers", **shape):
    """A student as a run makes it, and its maps to the teacher's width."""
    torch.manual_seed(0)
    student = make_student(teacher, list(layers), Shape(**shape), STARTS[start])
    projections = make_projections(student, teacher.config.hidden_size)
    if start != "random":
        start_from_teacher(student, projections, teacher, list(layers), STARTS[start], train, tokenizer)
    return student.eval(), projections


@torch.no_grad()
def states(model, train):
    rows = [row["input_ids"] for row in train if len(row["input_ids"]) == 11]
    return model(torch.tensor(rows), output_hidden_states=True)


def distance(student, projections, teacher, train, layers, k):
    """|P x' - x|² / |x|² of layer k of the student, x' projected to the teacher's x."""
    ours = states(student, train).hidden_states[k]
    theirs = states(teacher, train).hidden_states[layers[k - 1] if k else 0]
    ours = projections[k](ours) if len(projections) else ours
    return ((ours - theirs).square().sum() / theirs.square().sum()).item()


def test_where_nothing_is_left_out_the_student_is_the_teacher(teacher, train, tokenizer):
    student, projections = started(teacher, train, tokenizer, width=24)
    assert len(projections) == 0
    ours, theirs = states(student, train), states(teacher, train)
    torch.testing.assert_close(ours.logits, theirs.logits)
    for mine, their in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        torch.testing.assert_close(mine, their)


def test_a_narrow_student_is_a_plain_model_of_its_width(teacher, train, tokenizer, tmp_path):
    student, projections = started(teacher, train, tokenizer, layers=(2, 4), width=12)
    config = student.config
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (2, 12, 3)
    assert {tuple(linear.weight.shape) for linear in projections} == {(24, 12)} and len(projections) == 3
    assert any(module.out_features == 24 for module in student.modules() if isinstance(module, nn.Linear))  # the ffn
    student.save_pretrained(tmp_path)
    loaded, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert states(student, train).hidden_states[-1].shape[-1] == 12
    torch.testing.assert_close(states(loaded.eval(), train).logits, states(student, train).logits)


@pytest.mark.slow
def test_each_start_is_nearer_to_the_teacher_than_the_next(teacher, train, tokenizer):
    near = {start: started(teacher, train, tokenizer, start=start, width=18) for start in STARTS}
    for k in (0, 1, 2):
        distances = {name: distance(*pair, teacher, train, [1, 2, 3, 4], k) for name, pair in near.items()}
        assert distances["layers"] < (1 if k == 0 else 0.9) * distances["random"], (k, distances)
        assert distances["embeddings"] < distances["random"] or k > 0, (k, distances)
        assert k == 0 or distances["layers"] < distances["embeddings"], (k, distances)


def test_maps_and_embeddings_lose_what_the_directions_lose(train, tokenizer, capsys):
    bert = make(*TEACHERS["BERT"][:2])
    with torch.no_grad():  # all that the embeddings hold lies in 8 of 24 dimensions, and so do they after their norm
        mix = torch.randn(8, 24)
        mix -= mix.mean(dim=1, keepdim=True)
        embeddings = bert.bert.embeddings
        for table in (embeddings.word_embeddings, embeddings.position_embeddings, embeddings.token_type_embeddings):
            table.weight.copy_(torch.randn(len(table.weight), 8) @ mix)
    student, projections = started(bert, train, tokenizer, start="embeddings", width=12)
    assert "12 of 24 directions keep 100% of the embeddings' energy" in capsys.readouterr().out
    assert distance(student, projections, bert, train, [1, 2, 3, 4], 0) < 0.2
    assert torch.equal(projections[0].weight, projections[2].weight) and not projections[0].bias.any()
    torch.testing.assert_close(projections[0].weight.T @ projections[0].weight, torch.eye(12))


def test_heads_keep_their_scores_in_half_the_dimensions_where_these_suffice():
    bert = make(*TEACHERS["BERT"][:2])
    layer = bert.bert.encoder.layer[0]
    with torch.no_grad():
        for head in range(3):  # its queries vary in 4 of 8 dimensions, and so does what it adds
            rows = slice(8 * head, 8 * head + 8)
            rank = torch.randn(8, 4)
            layer.attention.self.query.weight[rows] = rank @ torch.randn(4, 24)
            layer.attention.self.query.bias[rows] = rank @ torch.randn(4)
            layer.attention.output.dense.weight[:, rows] = torch.randn(24, 4) @ torch.randn(4, 8)
    narrow = torch.nn.ModuleDict({k: nn.Linear(24, 12) for k in ("query", "key", "value")})
    narrow["context"] = nn.Linear(12, 24)
    x = torch.randn(400, 24)
    both = torch.cat((x, torch.ones(400, 1)), dim=1).double()
    with torch.no_grad():
        parts = _parts(layer)
        _narrow_attention(narrow, parts, torch.eye(24).double(), both.T @ both / 400, heads=3)

        def scores(part, size):
            q, k = (part[name](x).unflatten(1, (3, size)).movedim(1, 0) for name in ("query", "key"))
            return q @ k.mT / size**0.5

        torch.testing.assert_close(scores(narrow, 4), scores(parts, 8), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(
            narrow["context"](narrow["value"](x)), parts["context"](parts["value"](x)), rtol=1e-3, atol=1e-3
        )


def test_the_same_start_twice_is_the_same(train, tokenizer):
    bert = make(*TEACHERS["BERT"][:2])
    one, other = (started(bert, train, tokenizer, layers=(2, 4), width=12)[0].state_dict() for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert bert.training is False


def test_new_layers_may_be_more_and_wider_than_the_teacher_s(train, tokenizer):
    bert = make(*TEACHERS["BERT"][:2])
    student, projections = started(bert, train, tokenizer, layers=range(1, 5), start="random", width=36, heads=6)
    assert (student.config.hidden_size, student.config.num_attention_heads) == (36, 6)
    assert projections[0].weight.shape == (24, 36)
    student, _ = started(bert, train, tokenizer, layers=[1, 1, 2, 3, 4, 4], start="embeddings", width=12, ffn=20)
    assert student.config.num_hidden_layers == 6 and student.config.intermediate_size == 20


def test_layers_that_have_other_parts_are_refused_and_their_embeddings_taken(train, tokenizer):
    albert = make(AlbertForSequenceClassification, AlbertConfig, embedding_size=16)
    student, _ = started(albert, train, tokenizer, layers=(1, 2), start="embeddings", width=12)
    assert torch.equal(student.get_input_embeddings().weight, albert.get_input_embeddings().weight)
    special = {"pad_token_id": 0, "bos_token_id": 2, "cls_token_id": 2, "eos_token_id": 3, "sep_token_id": 3}
    modern = make(ModernBertForSequenceClassification, ModernBertConfig, **special)
    started(modern, train, tokenizer, layers=(2, 4), start="embeddings", width=12)
    with pytest.raises(InputError, match="layers: does not know how to narrow the layers of ModernBert"):
        started(modern, train, tokenizer, layers=(2, 4), width=12)


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ({"width": 10}, "--student_width 10: 3 attention heads do not divide it; give a multiple of 3, or --student_h"),
        ({"width": 36}, "--student_width 36: the teacher is only 24 wide; a wider student starts with --student_start"),
        ({"width": 0}, "--student_width 0: must be at least 1"),
        ({"ffn": -1}, "--student_ffn -1: must be at least 1"),
        ({"ffn": 49}, "--student_ffn 49: the teacher's layers have 48"),
        ({"heads": 4}, "--student_heads 4: the teacher's layers have 3 heads"),
    ],
    ids=str,
)
def test_shapes_that_cannot_be(shape, said):
    with pytest.raises(InputError, match=said):
        narrow_config(BertConfig(**SIZES), [1, 2], Shape(**shape), STARTS["layers"])


@pytest.mark.training
def test_a_run_and_its_continuation(glue_dir, tmp_path, monkeypatch, capsys):
    fine_tuned = save_bert(tmp_path / "teacher", RTE)

    def run(out, *more):
        options = f"--teacher_model {fine_tuned} --student_layers 2 --student_width 12 --task_name RTE --no_cuda"
        options += f" --data_dir {glue_dir / 'RTE'} --output_dir {out} --max_seq_length 32 --train_batch_size 8"
        options += " --num_train_epochs 2 --eval_step 2 --save_total_limit 9 --learning_rate 1e-3"
        distil([*options.split(), *more])

    run(tmp_path / "whole")
    said = capsys.readouterr().out
    assert "student from the teacher's layers 2, 4\n" in said and "12 of 24 directions keep" in said
    model, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole", output_loading_info=True)
    assert not any(info.values()) and model.config.hidden_size == 12
    assert (tmp_path / "whole" / "tokenizer.json").exists()
    out = stopped(tmp_path / "whole", tmp_path / "out", 2)
    monkeypatch.setattr(task_distillation, "start_from_teacher", lambda *_: pytest.fail("filled once more"))
    run(out, "--resume_from_checkpoint")
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
    shutil.rmtree(out)
    capsys.readouterr()
    run(out, "--student_start", "random", "--student_layers", "6", "--layer_mapping", "uniform")
    assert "energy" not in capsys.readouterr().out
    assert AutoModelForSequenceClassification.from_pretrained(out).config.num_hidden_layers == 6
