"""Six whole training steps of the authors' code, from weights in to weights out, through this project's own loading,
objective, optimiser and trainer."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback, default_data_collator

from bert_emd.attention_scores import expose_attention
from bert_emd.distillation import Distillation
from bert_emd.layer_transport import LayerTransport
from bert_emd.objectives import Objective, PublishedCosts
from bert_emd.student import make_projections, stored_projections, use_relu_head
from bert_emd.trainer import DistillationTrainer
from bert_finetune.checkpoints import load_classifier
from bert_finetune.glue import get_task
from bert_finetune.run_arguments import RunArguments

GOLDEN = Path(__file__).parent / "golden"
STEPS = 6
TERMS = ("attention_loss", "hidden_loss", "embedding_loss", "soft_loss")


class Watched:
    """An objective that keeps what each step gave."""

    def __init__(self, objective: Objective):
        self.looks_at, self.needs_teacher = objective.looks_at, objective.needs_teacher
        self.weights, self.beta = objective.weights, objective.beta
        self.objective, self.seen = objective, []

    def __call__(self, mapping, student, teacher, *more):
        loss, terms, matching = self.objective(mapping, student, teacher, *more)
        weights = [vector.numpy().copy() for vector in mapping.hidden_weights]
        self.seen.append(
            {
                "loss": loss.item(),
                "logits": student.logits.detach(),
                "teacher": teacher.logits,
                "hidden_states": [[state.detach() for state in side.hidden_states] for side in (student, teacher)],
                "attention": [[scores.detach() for scores in side.attention] for side in (student, teacher)],
                "weights": weights,
            }
            | {name: terms[name].item() for name in TERMS}
        )
        return loss, terms, matching


class StopAfterSixSteps(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == STEPS


def save_published(values, who: str, prefix: str, folder: Path) -> str:
    """The model as its authors would publish it: pytorch_model.bin and their config.json, which has no model_type."""
    folder.mkdir()
    weights = {k.removeprefix(prefix): torch.tensor(values[k]) for k in values.files if k.startswith(prefix)}
    torch.save(weights, folder / "pytorch_model.bin")
    config = json.loads(str(values[f"{who}_config"]))
    config["num_labels"] = len(weights["classifier.bias"])
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.training
@pytest.mark.parametrize("max_seq_length", [128, 512])  # scores, and their factors
@pytest.mark.parametrize("case", ["classification_relu_head", "classification_plain_head", "regression_plain_head"])
def test_six_steps(case, max_seq_length, tmp_path):
    values = np.load(GOLDEN / f"train_steps_{case}.npz")
    task = get_task("STS-B" if "regression" in case else "MNLI")
    teacher_folder = save_published(values, "teacher", "teacher/", tmp_path / "teacher")
    student_folder = save_published(values, "student", "student/before/", tmp_path / "student")
    teacher = load_classifier(teacher_folder, task, "--teacher_model", fine_tuned=True)
    model = load_classifier(student_folder, task, "--student_model")
    for m in (teacher, model):
        expose_attention(m, "--teacher_model", max_seq_length)
        if "relu" in case:
            use_relu_head(m)
    projections = make_projections(model, 36, "shared", stored_projections(student_folder, 36))

    names = ("input_ids", "token_type_ids", "attention_mask", "labels")
    rows = {name: np.concatenate([values[f"step{k}/{name}"] for k in range(STEPS)]) for name in names}
    costs = PublishedCosts(max_seq_length=rows["input_ids"].shape[1], count_padding=True)
    objective = Watched(Objective(task.kind, costs, beta=0.01, mean_over_classes=True))
    args = RunArguments(
        output_dir=str(tmp_path / "out"),
        per_device_train_batch_size=4,
        max_steps=10,
        learning_rate=3e-4,
        warmup_steps=0.1,
        weight_decay=0.01,
        train_sampling_strategy="sequential",
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        use_cpu=True,
    )
    trainer = DistillationTrainer(
        Distillation(model, objective, LayerTransport(2, 4), projections),
        teacher,
        args,
        task,
        None,
        Dataset.from_dict({name: list(column) for name, column in rows.items()}),
        teacher_mode="train",
        optimizer="bert_adam",
        data_collator=default_data_collator,
        callbacks=[StopAfterSixSteps()],
    )
    trainer.train()

    assert len(objective.seen) == STEPS
    first, keys = objective.seen[0], values["step0/attention_mask"][:, None, None, :].astype(bool)
    for who, states, attention in zip(("student", "teacher"), first["hidden_states"], first["attention"], strict=True):
        name = "student_hidden_projected" if who == "student" else "teacher_hidden"
        for k, state in enumerate(states):
            np.testing.assert_allclose(state, values[f"step0/{name}/{k}"], atol=1e-5)
        for k, scores in enumerate(attention):
            scores = scores if scores.dim() == 4 else scores[0] @ scores[1].mT
            theirs = values[f"step0/{who}_scores/{k}"]
            np.testing.assert_allclose(np.where(keys, scores, 0), np.where(keys, theirs, 0), atol=1e-5)
    for k, step in enumerate(objective.seen):
        get = {name.split("/", 1)[1]: values[name] for name in values.files if name.startswith(f"step{k}/")}
        for name in TERMS:
            theirs = "prediction_loss" if name == "soft_loss" else name
            assert step[name] == pytest.approx(float(get[theirs]), rel=1e-5, abs=1e-7), (k, name)
        assert step["loss"] == pytest.approx(float(get["loss"]), rel=1e-5)
        np.testing.assert_allclose(step["logits"], get["student_logits"], atol=1e-5)
        np.testing.assert_allclose(step["teacher"], get["teacher_logits"], atol=1e-5)
        for ours, side in zip(step["weights"], ("student", "teacher"), strict=True):
            np.testing.assert_allclose(ours, get[f"{side}_weight"], atol=1e-5)
    after = {k.removeprefix("student/after/"): values[k] for k in values.files if k.startswith("student/after/")}
    ours = model.state_dict() | {
        f"share_fit_dense.{kind}": getattr(projections[0], kind).detach() for kind in ("weight", "bias")
    }
    compared = [name for name in after if not name.startswith("fit_denses.")]  # those are not trained
    assert set(compared) == set(ours)
    for name in compared:
        np.testing.assert_allclose(ours[name].numpy(), after[name], atol=1e-5, err_msg=name)
        assert name.endswith("key.bias") or not np.array_equal(after[name], values[f"student/before/{name}"]), name
