"""Architectures beside BERT, tiny and random: their layers cut out, their limits, and those that are refused."""

import sys

import pytest
import torch
from conftest import SPECIAL, save_bert
from datasets import Dataset
from glue_files import WORDS
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertTokenizer,
)

from bert_emd.emd_task_distill import main as distil
from bert_emd.general_distill import main as general_distil
from bert_emd.narrow_student import make_student, start_from_teacher
from bert_emd.starts import STARTS, Shape
from bert_emd.student import layer_stack, make_projections, student_from_teacher
from bert_finetune.architectures import check_inputs, check_length, check_vocabulary, longest_input
from bert_finetune.checkpoints import load_classifier, save_weights
from bert_finetune.errors import InputError
from bert_finetune.glue import get_task
from bert_finetune.run_glue import main as run_glue

RTE = get_task("RTE")
VOCABULARY = SPECIAL + WORDS
_CLASSIFIER = AutoModelForSequenceClassification
SIZES = {"vocab_size": len(VOCABULARY), "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 4}
SIZES |= {"intermediate_size": 32, "max_position_embeddings": 40, "pad_token_id": 0, "bos_token_id": 2}
SIZES |= {"eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
MORE = {
    "convbert": {"embedding_size": 16},
    "funnel": {"block_sizes": [2, 2], "num_hidden_layers": None, "max_position_embeddings": None},
    "gte": {"type_vocab_size": 2},
    "longformer": {"attention_window": [4, 8, 4, 8]},
    "mobilebert": {"intra_bottleneck_size": 16, "embedding_size": 16, "true_hidden_size": 16},
    "modernbert": {"global_attn_every_n_layers": 3, "local_attention": 4},  # as the hub's configurations have it
    "squeezebert": {"embedding_size": 16},
    "xlnet": {"d_inner": 32, "d_head": 4, "max_position_embeddings": None},
    "xmod": {"languages": ["en_XX", "de_DE", "fr_FR", "it_IT"], "default_language": "en_XX"},
}

TEXTS = {"input_ids": [[2, *range(5 + k, 15 + k), 3] for k in range(20)], "attention_mask": [[1] * 12] * 20}


def tokenizer_of_words():
    return BertTokenizer(vocab={word: k for k, word in enumerate(VOCABULARY)})


def config_of(kind: str, **changes):
    settings = SIZES | MORE.get(kind, {}) | changes
    return CONFIG_MAPPING[kind](**{name: value for name, value in settings.items() if value is not None})


def model_of(kind: str, **changes):
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(config_of(kind, **changes)).eval()


def save(folder, kind: str, head=_CLASSIFIER, tokenizer=None, **changes):
    """A model's folder, with names for RTE's classes."""
    config = config_of(kind, **changes)
    config.id2label = dict(enumerate(RTE.kind.output_names))
    config.label2id = {name: k for k, name in config.id2label.items()}
    torch.manual_seed(0)
    head.from_config(config).save_pretrained(folder)
    (tokenizer or tokenizer_of_words()).save_pretrained(folder)
    return folder


def inputs(length: int = 12) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, len(VOCABULARY), (2, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    ids[1, length - 4 :], mask[1, length - 4 :] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


# Layers


def calls_of_layers(model) -> list[tuple]:
    """What each layer is given in a forward pass, and what it answers."""
    calls = []

    def watch(layer):
        forward = layer.forward  # which SqueezeBERT calls itself

        def watched(*args, **kwargs):
            output = forward(*args, **kwargs)
            calls.append((args, kwargs, output))
            return output

        layer.forward = watched
        return lambda: vars(layer).pop("forward")

    undo = [watch(layer) for layer in layer_stack(model)[1]]
    with torch.no_grad():
        model(**inputs())
    for put_back in undo:
        put_back()
    return calls


def as_tensor(output) -> torch.Tensor:
    while not torch.is_tensor(output):
        output = next(iter(output.values())) if isinstance(output, dict) else output[0]
    return output


@pytest.mark.parametrize(
    "kind",
    """bert distilbert roberta camembert electra mobilebert data2vec-text roberta-prelayernorm eurobert deberta
    deberta-v2 mpnet rembert squeezebert convbert roformer modernbert nomic_bert gte longformer xmod xlnet
    ibert""".split(),
)
def test_a_kept_layer_computes_what_it_computed(kind, tmp_path):
    teacher, layers = (
        model_of(kind, **({"n_layer": 4, "num_hidden_layers": None} if kind == "xlnet" else {})),
        [1, 3, 4],
    )
    save_weights(student_from_teacher(teacher, layers), tmp_path)
    student = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    calls, kept = calls_of_layers(teacher), layer_stack(student)[1]
    assert student.config.num_hidden_layers == len(kept) == 3 and len(calls) == 4
    for layer, number in zip(kept, layers, strict=True):
        args, kwargs, output = calls[number - 1]
        with torch.no_grad():
            assert torch.equal(as_tensor(layer(*args, **kwargs)), as_tensor(output)), number
    assert student(**inputs()).logits.shape == (2, 2)


def test_settings_of_layers_are_cut_with_them():
    modernbert = student_from_teacher(model_of("modernbert", num_hidden_layers=6), [1, 4, 6])
    assert modernbert.config.layer_types == ["full_attention", "full_attention", "sliding_attention"]
    assert [layer.attention_type for layer in modernbert.model.layers] == modernbert.config.layer_types
    assert student_from_teacher(model_of("longformer"), [2, 3]).config.attention_window == [8, 4]
    # As long as the number of layers, and not theirs.
    assert student_from_teacher(model_of("xmod"), [1, 2]).config.languages == MORE["xmod"]["languages"]
    teacher = model_of("bert")
    teacher.config.thresholds = [0.1, 0.2, 0.3, 0.4]
    assert student_from_teacher(teacher, [1]).config.thresholds == [0.1, 0.2, 0.3, 0.4]


def test_shared_layers_are_gone_through_fewer_times():
    teacher = model_of("albert", embedding_size=8)
    student = student_from_teacher(teacher, [2, 4]).eval()
    assert len(student(**inputs(), output_hidden_states=True).hidden_states) == 3
    states = [model(**inputs(), output_hidden_states=True).hidden_states[:3] for model in (student, teacher)]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*states, strict=True))


@pytest.mark.parametrize(
    ("kind", "changes", "layers", "said"),
    [
        (
            "modernbert",
            {},
            [2, 4],
            "the layers of ModernBert.* are not all alike, see model.layers.0.attn_norm.weight;",
        ),
        ("flaubert", {}, [1, 3], "the layers of Flaubert.* are not all alike, see transformer.layer_norm1.2.weight;"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, [1, 3], "layer 3 of GPT2.* would compute something else"),
        ("esm", {"mask_token_id": 4}, [1, 3], "EsmFor.* cannot have fewer layers: size mismatch for .*contact_head"),
        ("albert", {"num_hidden_groups": 2}, [1, 3], "cannot find the 4 layers of Albert"),
    ],
)
def test_what_cannot_be_cut_is_refused(kind, changes, layers, said):
    with pytest.raises(InputError, match=f"^--student_layers.*: .*{said}|^--student_layers: {said}") as error:
        student_from_teacher(model_of(kind, **changes), layers)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", "deberta deberta-v2 nomic_bert modernbert albert eurobert longformer ibert".split())
def test_narrow_students_of_other_architectures(kind):
    teacher = model_of(kind)
    narrowed(teacher, STARTS["embeddings"])
    with pytest.raises(InputError, match="--student_start layers: does not know how to narrow the layers of"):
        make_student(teacher, [1, 3], Shape(width=8), STARTS["layers"])


def narrowed(teacher, start):
    student = make_student(teacher, [1, 3], Shape(width=8), start)
    assert student.training
    projections = make_projections(student, 16)
    start_from_teacher(student, projections, teacher, [1, 3], start, Dataset.from_dict(TEXTS), tokenizer_of_words())
    models = student.eval(), teacher.eval()
    states, theirs = (model(**inputs(), output_hidden_states=True).hidden_states for model in models)
    assert len(states) == 3 and {state.shape[-1] for state in states} == {8}
    real = inputs()["attention_mask"].bool()
    left_out = (projections[0](states[0]) - theirs[0])[real].square().sum() / theirs[0][real].square().sum()
    assert left_out < 0.5, left_out  # half of the directions of random embeddings; without them it would be 1


def test_big_bird_attends_to_all_pairs_from_the_start(tmp_path, capsys):
    settings = {"attention_type": "block_sparse", "block_size": 4, "num_random_blocks": 1}
    teacher = save(tmp_path / "big_bird", "big_bird", **settings)
    model = load_classifier(str(teacher), RTE, "--x", fine_tuned=True)
    assert capsys.readouterr().out == f"{teacher}: attends to all pairs of tokens, not to blocks of them\n"
    assert model.config.attention_type == "original_full"
    states = model(**inputs(30), output_hidden_states=True).hidden_states  # blocks would make 32 of them
    assert {state.shape[1] for state in states} == {30}
    narrowed(model, STARTS["layers"])


@pytest.mark.parametrize(
    ("kind", "start", "others"), [("mobilebert", "embeddings", "random"), ("roformer", "layers", "e")]
)
def test_what_cannot_be_narrowed_is_refused(kind, start, others):
    with pytest.raises(InputError, match=rf"--student_width 8: .* narrow all of .*; use --student_start {others}"):
        make_student(model_of(kind), [1, 3], Shape(width=8), STARTS[start])


def test_a_narrow_student_has_fewer_keys_for_its_fewer_heads():
    eurobert = model_of("eurobert", num_key_value_heads=2)
    config = make_student(eurobert, [1], Shape(width=8, heads=2), STARTS["random"]).config
    assert (config.num_attention_heads, config.num_key_value_heads) == (2, 1)


@pytest.mark.parametrize("kind", ["eurobert", "gte", "nomic_bert", "modernbert", "roformer"])
def test_odd_sizes_of_heads_with_rotary_positions_are_refused(kind):
    with pytest.raises(InputError, match=r"--student_width: .* cannot be made 12 wide with 4 heads: ") as error:
        make_student(model_of(kind), [1, 3], Shape(width=12), STARTS["random"])
    assert "\n" not in str(error.value)


# Lengths


@pytest.mark.parametrize(
    ("kind", "longest"),
    [
        *[("bert", 40), ("distilbert", 40), ("electra", 40), ("convbert", 40), ("gpt2", 40)],
        *[("roberta", 38), ("camembert", 38), ("data2vec-text", 38), ("xmod", 38), ("mpnet", 38), ("ibert", 38)],
        ("longformer", 38),
    ],
)
def test_the_longest_input_can_be_read_and_no_longer_one(kind, longest):
    model = model_of(kind, pad_token_id=1)  # MPNet counts from there whatever the configuration says
    assert longest_input(model) == longest
    for length in (longest, longest + 1):
        ids = torch.full((1, length), 6)
        if length > longest:
            with pytest.raises((IndexError, RuntimeError)):
                model(input_ids=ids, attention_mask=torch.ones_like(ids))
        else:
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
    check_length(model, longest)
    with pytest.raises(InputError, match=f"--max_seq_length {longest + 1}: the model has only {longest} positions"):
        check_length(model, longest + 1)


def test_a_model_without_positions_reads_any_length():
    model = model_of("xlnet", n_layer=2, num_hidden_layers=None)
    assert longest_input(model) == sys.maxsize
    check_length(model, 100_000)


def test_pieces_are_counted_by_their_numbers():
    tokenizer = BertTokenizer(vocab={word: 2 * k for k, word in enumerate(VOCABULARY)})
    most = 2 * len(VOCABULARY) - 1
    check_vocabulary(model_of("bert", vocab_size=most), tokenizer, "--x")
    with pytest.raises(
        InputError, match=f"--x: the tokenizer has {most} pieces, and the model embeddings for {most - 1}"
    ):
        check_vocabulary(model_of("bert", vocab_size=most - 1), tokenizer, "--x")


# Runs. There is no data: whoever looked for it would say so.


def fine_tuned(model, tmp_path, *more):
    return run_glue, "--model_name_or_path", model, "--do_train", *_task(tmp_path), *more


def distilled(model, tmp_path, *more):
    return distil, "--teacher_model", model, "--student_layers", 2, *_task(tmp_path), *more


def _task(tmp_path):
    command = ["--task_name", "RTE", "--data_dir", tmp_path / "none", "--max_seq_length", 32]
    return [*command, "--output_dir", tmp_path / "out"]


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("t5", "a t5 has an encoder and a decoder"),
        ("bart", "a bart has an encoder and a decoder"),
        ("fnet", "a fnet mixes padding into every token"),
        ("canine", "a canine reads characters"),
        ("funnel", "a funnel shortens its sequences"),
        ("splinter", "transformers has no text classifier of a splinter"),
        ("clip", "a clip reads more than text"),
        ("gemma3", "a gemma3 reads more than text"),
    ],
)
def test_architectures_are_refused_by_name(kind, said, tmp_path, exits_with_2):
    model = save(tmp_path / "model", kind, AutoModel if kind in ("splinter", "clip", "gemma3") else _CLASSIFIER)
    assert f"error: --model_name_or_path {model}: {said}" in exits_with_2(*fine_tuned(model, tmp_path))
    assert f"error: --teacher_model {model}: {said}" in exits_with_2(*distilled(model, tmp_path))
    assert f"error: --student_model {model}: {said}" in exits_with_2(
        distil, "--teacher_model", model, "--student_model", model, *_task(tmp_path)
    )
    if kind in ("t5", "gemma3"):
        line = exits_with_2(
            general_distil, "--teacher_model", model, "--student_layers", 2, "--corpus", model / "config.json",
            "--recipe", "tinybert", "--output_dir", tmp_path / "out",
        )  # fmt: skip
        assert f"--teacher_model {model}: {said}" in line


@pytest.mark.parametrize(
    ("head", "said"),
    [
        (AutoModelForTokenClassification, "a token classifier, not a text classifier"),
        (AutoModelForQuestionAnswering, "a model that finds answers in a text, not a text classifier"),
        (AutoModelForMultipleChoice, "a model that chooses among several texts, not a text classifier"),
    ],
)
def test_other_models_are_no_teachers(head, said, tmp_path, exits_with_2):
    model = save(tmp_path / "ner", "bert", head)
    assert f"--teacher_model {model}: {said}" in exits_with_2(*distilled(model, tmp_path))
    command = ["--model_name_or_path", model, "--do_eval", *_task(tmp_path)]
    assert f"--model_name_or_path {model}: {said}" in exits_with_2(run_glue, *command)
    load_classifier(str(model), RTE, "--student_model")  # whose head learns anew


def without_padding():
    tokenizer = tokenizer_of_words()
    tokenizer.pad_token = None
    return tokenizer


def test_a_configuration_is_told_which_piece_is_padding():
    tokenizer = tokenizer_of_words()
    model = model_of("gpt2", pad_token_id=None)
    with pytest.raises(ValueError, match="no padding token"):
        model(**inputs())
    check_inputs(model, tokenizer, "--x", pair=True)
    assert model.config.pad_token_id == 0 and model(**inputs()).logits.shape == (2, 2)


@pytest.mark.parametrize("run", [fine_tuned, distilled])
def test_a_model_without_padding(run, tmp_path, exits_with_2):
    model = save(tmp_path / "gpt2", "gpt2", tokenizer=without_padding(), pad_token_id=None)
    assert f"{model}: the tokenizer has no padding; give it one" in exits_with_2(*run(model, tmp_path))


@pytest.mark.parametrize("run", [fine_tuned, distilled])
@pytest.mark.parametrize(
    ("kind", "changes", "more", "said"),
    [
        ("camembert", {}, ["--max_seq_length", 40], "--max_seq_length 40: the model has only 39 positions"),
        ("bert", {"vocab_size": 20}, [], f"the tokenizer has {len(VOCABULARY)} pieces"),
        ("gte", {"type_vocab_size": 1}, [], "the tokenizer numbers the texts of a pair"),
    ],
)
def test_what_a_model_cannot_read(run, kind, changes, more, said, tmp_path, exits_with_2):
    assert said in exits_with_2(*run(save(tmp_path / "model", kind, **changes), tmp_path, *more))


def test_a_student_s_vocabulary_that_is_too_small(teacher, tmp_path, exits_with_2):
    student = save_bert(tmp_path / "student", None, vocab_size=20)
    line = exits_with_2(distil, "--teacher_model", teacher, "--student_model", student, *_task(tmp_path))
    assert (
        f"--student_model {student}: the tokenizer has {len(VOCABULARY)} pieces, and the model embeddings for 20"
        in line
    )


@pytest.mark.training
@pytest.mark.parametrize(
    ("kind", "layers"), [("albert", "2"), ("modernbert", "1,4"), ("nomic_bert", "2"), ("gte", "2"), ("longformer", "2")]
)
def test_a_student_of_its_teacher_s_layers_trains(kind, layers, glue_dir, tmp_path):
    teacher = save(tmp_path / "teacher", kind)
    command = ["--teacher_model", teacher, "--student_layers", layers, "--task_name", "RTE", "--data_dir", glue_dir]
    command += ["--max_seq_length", 32, "--max_steps", 1, "--use_att", False, "--no_cuda", "--report_to", "none"]
    distil([str(part) for part in (*command, "--output_dir", tmp_path / "out")])
    assert load_classifier(str(tmp_path / "out"), RTE, "--x", fine_tuned=True).config.num_hidden_layers == 2
