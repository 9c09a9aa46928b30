import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, ElectraConfig, ElectraForSequenceClassification

from bert_emd.attention_scores import expose_attention_scores
from bert_emd.student import Student, parse_student_layers, student_from_teacher
from bert_finetune.errors import InputError

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
def test_projections(projection, width, maps):
    model = bert(2)
    expose_attention_scores(model, "--student_model")
    student = Student(model, width, projection)
    assert len(student.projections) == maps
    outputs = student(input_ids=IDS, with_layers=True)
    own = model(input_ids=IDS, output_hidden_states=True).hidden_states
    for k, (projected, state) in enumerate(zip(outputs.hidden_states, own, strict=True)):
        linear = student.projections[0 if projection == "shared" else k] if maps else torch.nn.Identity()
        torch.testing.assert_close(projected, linear(state))
    assert len(outputs.attention_scores) == 2
    torch.testing.assert_close(student(input_ids=IDS).logits, outputs.logits)


def test_no_projection_needs_equal_widths():
    with pytest.raises(InputError, match="--projection none: the student is 24 wide, the teacher 36"):
        Student(bert(2), 36, "none")


def test_stored_maps_are_used():
    stored = {k: (torch.full((36, 24), float(k)), torch.full((36,), -float(k))) for k in range(3)}
    student = Student(bert(2), 36, "auto", stored)
    for k, linear in enumerate(student.projections):
        assert (linear.weight == k).all() and (linear.bias == -k).all()
    assert len(Student(bert(2), 24, "auto", {0: (torch.zeros(24, 24), torch.zeros(24))}).projections) == 3
