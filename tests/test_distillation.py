import pytest
import torch
from test_student import IDS, bert

from bert_emd.attention_scores import expose_attention
from bert_emd.distillation import Distillation
from bert_emd.layer_outputs import layer_outputs
from bert_emd.layer_transport import LayerTransport
from bert_emd.objectives import PARTS, LayerCosts, Objective
from bert_emd.student import make_projections
from bert_finetune.task_kinds import Classification

KIND = Classification({"0": "no", "1": "yes"})


class Seen(Objective):
    """An objective that returns the student's outputs in the place of the terms."""

    def __call__(self, mapping, student, teacher, attention_mask, labels):
        loss, _, matching = super().__call__(mapping, student, teacher, attention_mask, labels)
        return loss, student, matching


def distillation(width=36, projection="auto", parts=PARTS):
    model, teacher = bert(2), bert(3, hidden_size=width)
    for each in (model, teacher):
        expose_attention(each, "--student_model", 128)
    projections = make_projections(model, width, projection)
    objective = Seen(KIND, LayerCosts(), beta=1.0, looks_at=parts)
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    with torch.no_grad():
        answers = layer_outputs(teacher, parts, **inputs)
    return Distillation(model, objective, LayerTransport(2, 3), projections), inputs, answers


def train_step(whole, inputs, answers):
    """The student's outputs as the loss sees them, in training but without dropout."""
    whole.train()
    whole.student.eval()
    return whole(**inputs, teacher=answers)


@pytest.mark.parametrize(
    ("projection", "width", "maps"),
    [("auto", 24, 0), ("auto", 36, 3), ("per_layer", 24, 3), ("shared", 36, 1), ("none", 24, 0)],
)
def test_projections(projection, width, maps):
    whole, inputs, answers = distillation(width, projection)
    assert len(whole.projections) == maps
    outputs = train_step(whole, inputs, answers).terms
    own = whole.student(input_ids=IDS, output_hidden_states=True).hidden_states
    for k, (projected, state) in enumerate(zip(outputs.hidden_states, own, strict=True)):
        linear = whole.projections[0 if projection == "shared" else k] if maps else torch.nn.Identity()
        torch.testing.assert_close(projected, linear(state))
    assert len(outputs.attention) == 2
    torch.testing.assert_close(whole.eval()(input_ids=IDS).logits, outputs.logits)


def test_only_what_is_asked_for_is_returned():
    def seen(*parts):
        return train_step(*distillation(parts=frozenset(parts))).terms

    hidden = seen("hidden")
    assert hidden.logits is None and hidden.attention is None
    assert [state is None for state in hidden.hidden_states] == [True, False, False]
    embedding = seen("embedding", "logits")
    assert [state is None for state in embedding.hidden_states] == [False, True, True]
    assert seen("attention").hidden_states is None


def test_every_part_is_saved_and_restored(tmp_path):
    whole, inputs, answers = distillation()
    train_step(whole, inputs, answers).loss.backward()
    assert all(parameter.grad is not None for parameter in whole.projections.parameters())
    whole.save(tmp_path)
    weights = [vector.clone() for vector in whole.mapping.hidden_weights]
    assert not torch.allclose(weights[0], torch.full((2,), 0.5, dtype=torch.float64), atol=1e-4)
    other, *_ = distillation()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.restore(tmp_path)
    assert other.state_dict().keys() == whole.state_dict().keys()
    for name, value in whole.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name
