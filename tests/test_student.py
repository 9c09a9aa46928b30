import json

import pytest
import torch
from transformers import (
    BertConfig,
    BertForPreTraining,
    BertForSequenceClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
)

from bert_emd.student import (
    StoredProjections,
    make_projections,
    parse_student_layers,
    stored_projections,
    student_from_teacher,
    use_relu_head,
)
from bert_finetune.checkpoints import load_classifier
from bert_finetune.errors import InputError
from bert_finetune.glue import get_task

SIZES = {"vocab_size": 60, "hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 32}
IDS = torch.tensor([[2, 10, 11, 3]])


def bert(layers=6, **changes):
    torch.manual_seed(layers)
    return BertForSequenceClassification(BertConfig(**SIZES | {"num_hidden_layers": layers} | changes)).eval()


def test_student_layers_option():
    assert parse_student_layers("3", 6) == [2, 4, 6]
    assert parse_student_layers("1,3,5", 6) == [1, 3, 5]
    assert parse_student_layers("5,", 6) == [5]
    assert parse_student_layers("6", 6) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("text", ["7", "0", "-1", "1,7", "0,2", "three", "", "1.5", ",", "1,1,1,1,1,1,1"])
def test_bad_student_layers(text):
    with pytest.raises(InputError, match=f"--student_layers {text}: "):
        parse_student_layers(text, 6)


@pytest.mark.parametrize(
    "teacher",
    [bert(), ElectraForSequenceClassification(ElectraConfig(**SIZES, num_hidden_layers=6, embedding_size=12)).eval()],
    ids=lambda model: type(model).__name__,
)
def test_student_is_the_teacher_s_own_layers(teacher):
    student = student_from_teacher(teacher, [2, 4, 6])
    assert student.config.num_hidden_layers == 3
    assert teacher.config.num_hidden_layers == 6
    for position, layer in enumerate([2, 4, 6]):
        ours = student.base_model.encoder.layer[position].state_dict()
        theirs = teacher.base_model.encoder.layer[layer - 1].state_dict()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert torch.equal(student.get_input_embeddings().weight, teacher.get_input_embeddings().weight)
    with torch.no_grad():
        student.get_input_embeddings().weight.zero_()
    assert teacher.get_input_embeddings().weight.any()  # a copy
    all_layers = student_from_teacher(teacher, list(range(1, 7))).eval()
    torch.testing.assert_close(all_layers(input_ids=IDS).logits, teacher(input_ids=IDS).logits)


@pytest.mark.parametrize(
    ("projection", "width", "maps"),
    [("auto", 24, 0), ("auto", 36, 3), ("per_layer", 24, 3), ("shared", 36, 1), ("none", 24, 0)],
)
def test_number_of_maps(projection, width, maps):
    assert len(make_projections(bert(2), width, projection)) == maps


def test_no_projection_needs_equal_widths():
    with pytest.raises(InputError, match="--projection none: the student is 24 wide, the teacher 36"):
        make_projections(bert(2), 36, "none")


def test_stored_maps_are_used():
    maps = {k: (torch.full((36, 24), float(k)), torch.full((36,), -float(k))) for k in range(4)}
    both = StoredProjections({k: maps[k] for k in range(3)}, maps[3])
    for projection in ("auto", "per_layer"):
        for k, linear in enumerate(make_projections(bert(2), 36, projection, both)):
            assert (linear.weight == k).all() and (linear.bias == -k).all()
    for projection, stored in (("shared", both), ("auto", StoredProjections({}, maps[3]))):
        (linear,) = make_projections(bert(2), 36, projection, stored)
        assert (linear.weight == 3).all()
    square = {0: (torch.zeros(24, 24), torch.zeros(24))}
    assert len(make_projections(bert(2), 24, "auto", StoredProjections(square, None))) == 3


def general_distilled(folder, maps, old_names=True):
    """A student's checkpoint as TinyBERT publishes them: pytorch_model.bin of a pre-training model with maps."""
    torch.manual_seed(0)
    config = BertConfig(**SIZES, num_hidden_layers=2)
    model = BertForPreTraining(config)
    weights = {}
    for key, value in model.state_dict().items():
        if old_names:
            key = key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        weights[key] = value.clone()
    for name in maps:
        weights |= {f"{name}.weight": torch.randn(36, 24), f"{name}.bias": torch.randn(36)}
    folder.mkdir()
    torch.save(weights, folder / "pytorch_model.bin")
    settings = {key: value for key, value in config.to_dict().items() if key in SIZES or key == "num_hidden_layers"}
    # Fields of their configuration file that no library knows.
    settings |= {"model_type": "bert", "cell": {}, "structure": [], "emb_size": 24}
    (folder / "config.json").write_text(json.dumps(settings))
    return weights


V1, V2 = ["fit_dense"], ["fit_denses.0", "fit_denses.1", "fit_denses.2"]


@pytest.mark.parametrize("maps", [V1, V2, []], ids=["v1", "v2", "none"])
@pytest.mark.parametrize("old_names", [True, False], ids=["gamma", "weight"])
def test_general_distilled_checkpoints(maps, old_names, tmp_path):
    weights = general_distilled(tmp_path / "tinybert", maps, old_names)
    model = load_classifier(str(tmp_path / "tinybert"), get_task("RTE"), "--student_model")
    loaded = model.state_dict()
    for key, value in weights.items():
        key = key.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        if key.startswith("bert."):
            assert torch.equal(loaded[key], value), key
    stored = stored_projections(str(tmp_path / "tinybert"), 36)
    projections = make_projections(model, 36, "auto", stored)
    names = maps or V2
    assert len(projections) == len(names)
    for name, linear in zip(maps, projections, strict=False):
        assert torch.equal(linear.weight, weights[f"{name}.weight"])
        assert torch.equal(linear.bias, weights[f"{name}.bias"])


@pytest.mark.parametrize(
    ("name", "projection", "used"),
    [
        ("fit_dense", "auto", True),
        ("fit_dense", "shared", False),  # the authors' code looks for another name, and so begins at random
        ("share_fit_dense", "shared", True),
        ("share_fit_dense", "auto", True),
    ],
)
def test_one_map_for_all_layers(name, projection, used, tmp_path):
    weights = general_distilled(tmp_path / "student", [name])
    stored = stored_projections(str(tmp_path / "student"), 36)
    (linear,) = make_projections(bert(2), 36, projection, stored)
    assert torch.equal(linear.weight, weights[f"{name}.weight"]) == used


def test_maps_that_do_not_fit_the_student_are_refused(tmp_path):
    general_distilled(tmp_path / "student", [*V2, "fit_denses.3"])
    stored = stored_projections(str(tmp_path / "student"), 36)
    with pytest.raises(InputError, match=r"--student_model: its checkpoint has fit_denses\.3, but only 2 layers"):
        make_projections(bert(2), 36, "auto", stored)
    file = tmp_path / "student" / "pytorch_model.bin"
    weights = torch.load(file, weights_only=True)
    del weights["fit_denses.1.bias"]
    torch.save(weights, file)
    with pytest.raises(InputError, match=r"--student_model .*student: it has no fit_denses\.1\.bias beside the rest"):
        stored_projections(str(tmp_path / "student"), 36)


def test_relu_head_has_no_dropout_and_can_be_taken_back():
    model = bert(2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, classifier_dropout=0.5)
    own = model(IDS).logits
    with torch.no_grad():
        by_hand = model.classifier(torch.relu(model.bert(IDS).pooler_output))
    handles = use_relu_head(model)
    assert not torch.allclose(by_hand, own, atol=1e-4)
    for mode in (True, False):
        torch.testing.assert_close(model.train(mode)(IDS).logits, by_hand)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(model(IDS).logits, own)
    assert not torch.equal(model.train()(IDS).logits, own)


def test_maps_to_another_width_are_said_and_not_used(tmp_path, capsys):
    general_distilled(tmp_path / "tinybert", V2)
    stored = stored_projections(str(tmp_path / "tinybert"), 48)
    assert stored == StoredProjections({}, None)
    assert "its projections are to width [36], not to the teacher's 48: not used" in capsys.readouterr().out


def test_a_file_that_is_more_than_weights_is_refused(tmp_path):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "written by the pickle"), "w"))

    general_distilled(tmp_path / "tinybert", V2)
    torch.save({"bert.pooler.dense.weight": Payload()}, tmp_path / "tinybert" / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"--student_model .*tinybert: cannot be loaded"):
        load_classifier(str(tmp_path / "tinybert"), get_task("RTE"), "--student_model")
    assert not (tmp_path / "written by the pickle").exists()
