"""The conversion of the original release: the right weights in the right places, and every wrong input named."""

import json
import os
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import erf
from tf_checkpoint_writer import field, write_checkpoint
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForPreTraining,
    PreTrainedModel,
)

from bert_finetune import convert_bert_original_tf_checkpoint_to_pytorch as script
from bert_finetune import tf_conversion
from bert_finetune.errors import InputError

GOLDEN = Path(__file__).parent / "golden" / "tf_checkpoint"
VARIABLES = dict(np.load(GOLDEN / "vars.npz"))
WITHOUT_HEADS = {name: values for name, values in VARIABLES.items() if not name.startswith("cls/")}
HEADS = 2
CONFIG = {
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 16,
    "initializer_range": 0.02,
    "intermediate_size": 32,
    "max_position_embeddings": 24,
    "num_attention_heads": HEADS,
    "num_hidden_layers": 2,
    "type_vocab_size": 2,
    "vocab_size": 50,
}
WORD_PIECES = ["[PAD]", "[unused1]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "earth", "mover", "##s", "distance", "é"]
WORD_PIECES += [f"word{number}" for number in range(50 - len(WORD_PIECES))]
CASED_PIECES = [*WORD_PIECES[:-1], "Earth"]
FIRST_LAYER = "bert/encoder/layer_0"


def make_release(folder: Path, variables=VARIABLES, config=CONFIG, word_pieces=WORD_PIECES, **write) -> Path:
    folder.mkdir(parents=True)
    write_checkpoint(folder / "bert_model.ckpt", variables, **write)
    (folder / "bert_config.json").write_text(json.dumps(config))
    (folder / "vocab.txt").write_text("".join(f"{piece}\n" for piece in word_pieces), encoding="utf-8")
    return folder


def convert(release: Path, dump: Path | None = None, **options) -> Path:
    dump = dump or release.parent / "dump"
    tf_conversion.convert_tf_checkpoint_to_pytorch(release, None, dump, **options)
    return dump


def load(model_class: type[PreTrainedModel], folder: Path) -> tuple[PreTrainedModel, set[str], set[str]]:
    """The model, the parameters missing in the folder, those in the folder that the model has no place for."""
    model, report = model_class.from_pretrained(folder, output_loading_info=True)
    assert not report["mismatched_keys"]
    return model.eval(), set(report["missing_keys"]), set(report["unexpected_keys"])


@pytest.fixture(scope="module")
def golden_dump(tmp_path_factory) -> Path:
    release = make_release(tmp_path_factory.mktemp("releases") / "uncased_L-2_H-16_A-2")
    for name in ("bert_model.ckpt.index", "bert_model.ckpt.data-00000-of-00001"):
        shutil.copyfile(GOLDEN / name, release / name)
    return convert(release)


def numpy_bert(variables, input_ids, token_type_ids, attention_mask):
    """BERT's forward pass as the paper and the original modeling.py have it: the two heads' scores, in float64."""
    variables = {name: values.astype(np.float64) for name, values in variables.items()}

    def dense(x, scope):
        return x @ variables[f"{scope}/kernel"] + variables[f"{scope}/bias"]

    def layer_norm(x, scope):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-12)
        return x * variables[f"{scope}/LayerNorm/gamma"] + variables[f"{scope}/LayerNorm/beta"]

    def gelu(x):
        return x * 0.5 * (1 + erf(x / np.sqrt(2)))

    def heads(x):
        return x.reshape(*x.shape[:2], HEADS, -1).swapaxes(1, 2)

    words = variables["bert/embeddings/word_embeddings"]
    x = words[input_ids] + variables["bert/embeddings/token_type_embeddings"][token_type_ids]
    x = layer_norm(x + variables["bert/embeddings/position_embeddings"][: input_ids.shape[1]], "bert/embeddings")
    for number in range(CONFIG["num_hidden_layers"]):
        layer = f"bert/encoder/layer_{number}"
        query, key, value = (heads(dense(x, f"{layer}/attention/self/{part}")) for part in ("query", "key", "value"))
        scores = query @ key.swapaxes(-1, -2) / np.sqrt(query.shape[-1]) - 1e4 * (1 - attention_mask[:, None, None])
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        context = (weights @ value).swapaxes(1, 2).reshape(x.shape)
        x = layer_norm(x + dense(context, f"{layer}/attention/output/dense"), f"{layer}/attention/output")
        inner = gelu(dense(x, f"{layer}/intermediate/dense"))
        x = layer_norm(x + dense(inner, f"{layer}/output/dense"), f"{layer}/output")
    pooled = np.tanh(dense(x[:, 0], "bert/pooler/dense"))
    transformed = gelu(dense(x, "cls/predictions/transform/dense"))
    transformed = layer_norm(transformed, "cls/predictions/transform")
    next_sentence = pooled @ variables["cls/seq_relationship/output_weights"].T
    return (
        transformed @ words.T + variables["cls/predictions/output_bias"],
        next_sentence + variables["cls/seq_relationship/output_bias"],
    )


def test_forward_pass_equals_numpy(golden_dump):
    chance = np.random.default_rng(0)
    input_ids = chance.integers(0, 50, (3, 24))
    token_type_ids = chance.integers(0, 2, (3, 24))
    attention_mask = (np.arange(24) < np.array([[24], [11], [5]])).astype(np.int64)
    words, next_sentence = numpy_bert(VARIABLES, input_ids, token_type_ids, attention_mask)
    model, _, _ = load(BertForPreTraining, golden_dump)
    with torch.no_grad():
        out = model(*map(torch.from_numpy, (input_ids, attention_mask, token_type_ids)))
    np.testing.assert_allclose(out.prediction_logits.numpy(), words, rtol=0, atol=1e-5)
    np.testing.assert_allclose(out.seq_relationship_logits.numpy(), next_sentence, rtol=0, atol=1e-5)


def test_every_weight_is_its_source(golden_dump):
    model, _, _ = load(BertForPreTraining, golden_dump)
    used = set()
    for name, parameter in model.named_parameters():
        source = tf_conversion.tf_name(name)
        expected = VARIABLES[source].T if source.endswith("kernel") else VARIABLES[source]
        np.testing.assert_array_equal(parameter.detach().numpy(), expected, err_msg=source, strict=True)
        used.add(source)
    assert used == set(VARIABLES)
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight


def test_golden_dump_loads_in_every_class(golden_dump):
    assert {file.name for file in golden_dump.iterdir()} == tf_conversion.WRITTEN_FILES
    _, missing, unexpected = load(BertForPreTraining, golden_dump)
    assert not missing and not unexpected
    _, missing, unexpected = load(AutoModel, golden_dump)
    assert not missing and all(name.startswith("cls.") for name in unexpected)
    _, missing, unexpected = load(AutoModelForSequenceClassification, golden_dump)
    assert missing == {"classifier.weight", "classifier.bias"} and all(name.startswith("cls.") for name in unexpected)
    assert json.loads((golden_dump / "config.json").read_text())["architectures"] == ["BertForPreTraining"]


def test_checkpoint_without_heads_becomes_a_bert_model(tmp_path):
    dump = convert(make_release(tmp_path / "release", WITHOUT_HEADS))
    assert json.loads((dump / "config.json").read_text())["architectures"] == ["BertModel"]
    model, missing, unexpected = load(AutoModel, dump)
    assert not missing and not unexpected
    for name, parameter in model.named_parameters():
        source = tf_conversion.tf_name(f"bert.{name}")
        expected = VARIABLES[source].T if source.endswith("kernel") else VARIABLES[source]
        np.testing.assert_array_equal(parameter.detach().numpy(), expected, err_msg=source, strict=True)
    _, missing, unexpected = load(AutoModelForSequenceClassification, dump)
    assert missing == {"classifier.weight", "classifier.bias"} and not unexpected


@pytest.mark.parametrize(
    "variables, write",
    [
        (VARIABLES, {"shards": 3, "pairs_per_block": 7}),
        ({name: values.astype(np.float64) for name, values in VARIABLES.items()}, {}),
    ],
    ids=["three shards", "float64"],
)
def test_same_model_from_other_files(tmp_path, golden_dump, variables, write):
    dump = convert(make_release(tmp_path / "uncased_release", variables, **write))
    for name in ("model.safetensors", "config.json"):
        assert (dump / name).read_bytes() == (golden_dump / name).read_bytes()


def test_half_precision_is_widened(tmp_path):
    dump = convert(make_release(tmp_path / "r", {name: values.astype("float16") for name, values in VARIABLES.items()}))
    model, _, _ = load(AutoModel, dump)
    bias = VARIABLES["bert/pooler/dense/bias"].astype("float16").astype("float32")
    np.testing.assert_array_equal(model.pooler.dense.bias.detach().numpy(), bias, strict=True)


def test_tokenizer(golden_dump):
    tokenizer = AutoTokenizer.from_pretrained(golden_dump)
    assert len(tokenizer) == 50 and tokenizer.model_max_length == 24 and tokenizer.pad_token_id == 0
    pieces = ["[CLS]", "earth", "mover", "##s", "[UNK]", "[SEP]", "distance", "[SEP]"]
    encoded = tokenizer("Earth movers café", "DISTANCE")
    assert encoded["input_ids"] == [WORD_PIECES.index(piece) for piece in pieces]
    assert encoded["token_type_ids"] == [0] * 6 + [1] * 2


def test_repeated_word_piece_keeps_its_last_number_as_in_the_original(tmp_path):
    pieces = [*WORD_PIECES[:-1], "earth"]
    tokenizer = AutoTokenizer.from_pretrained(convert(make_release(tmp_path / "r", WITHOUT_HEADS, word_pieces=pieces)))
    assert tokenizer.convert_tokens_to_ids(["earth", "mover"]) == [49, pieces.index("mover")]


@pytest.mark.parametrize(
    "folder, flag, word_pieces, option, lower_case",
    [
        ("uncased_L-2_H-16_A-2", None, CASED_PIECES, None, True),
        ("cased_L-2_H-16_A-2", None, WORD_PIECES, None, False),
        ("multi_cased_L-2_H-16_A-2", None, WORD_PIECES, None, False),
        ("wwm_uncased_L-2_H-16_A-2", None, CASED_PIECES, None, True),
        ("release", None, WORD_PIECES, None, True),
        ("release", None, CASED_PIECES, None, False),
        ("uncased_L-2_H-16_A-2", False, WORD_PIECES, None, False),
        ("cased_L-2_H-16_A-2", True, WORD_PIECES, None, True),
        ("uncased_L-2_H-16_A-2", True, WORD_PIECES, False, False),
        ("cased_L-2_H-16_A-2", False, WORD_PIECES, True, True),
    ],
)
def test_casing(tmp_path, folder, flag, word_pieces, option, lower_case):
    config = CONFIG if flag is None else {**CONFIG, "do_lower_case": flag}
    dump = convert(make_release(tmp_path / folder, WITHOUT_HEADS, config, word_pieces), do_lower_case=option)
    tokenizer = AutoTokenizer.from_pretrained(dump)
    assert tokenizer.do_lower_case is lower_case
    assert tokenizer.tokenize("DISTANCE É") == (["distance", "[UNK]"] if lower_case else ["[UNK]", "[UNK]"])


@pytest.mark.parametrize(
    "path", ["", "bert_model.ckpt", "bert_model.ckpt.index"], ids=["folder", "prefix", "index file"]
)
def test_ways_to_name_the_checkpoint(tmp_path, path):
    convert(make_release(tmp_path / "release", WITHOUT_HEADS) / path, tmp_path / "dump")


def test_configuration_and_vocabulary_elsewhere(tmp_path):
    release = make_release(tmp_path / "release", WITHOUT_HEADS)
    (tmp_path / "cased_other").mkdir()
    for name in ("bert_config.json", "vocab.txt"):
        (release / name).rename(tmp_path / "cased_other" / name)
    tf_conversion.convert_tf_checkpoint_to_pytorch(
        release, tmp_path / "cased_other" / "bert_config.json", tmp_path / "new" / "dump"
    )
    assert AutoTokenizer.from_pretrained(tmp_path / "new" / "dump").do_lower_case is False


def without(name):
    return {other: values for other, values in VARIABLES.items() if other != name}


KERNEL = f"{FIRST_LAYER}/intermediate/dense/kernel"
DECODER = "cls/predictions/transform/dense/bias"


@pytest.mark.parametrize(
    "variables, message",
    [
        (without(KERNEL), f"missing variable '{KERNEL}';"),
        (without("bert/pooler/dense/bias"), "missing variable 'bert/pooler/dense/bias';"),
        (without(DECODER), f"missing variable '{DECODER}';"),
        ({**VARIABLES, "output_weights": np.ones((2, 16), "f4")}, "unknown variable 'output_weights';"),
        ({**VARIABLES, "my/adamant": np.ones(3, "f4")}, "unknown variable 'my/adamant';"),
        ({**VARIABLES, KERNEL: VARIABLES[KERNEL].T}, rf"variable '{KERNEL}' has the shape \(32, 16\), not \(16, 32\);"),
        ({**VARIABLES, DECODER: np.ones(16, "i4")}, f"variable '{DECODER}' has the type int32"),
        ({"a/b": np.ones(2, "f4")}, "missing variable .* and 34 more; unknown variable 'a/b'"),
    ],
)
def test_wrong_variables_are_named(tmp_path, variables, message):
    with pytest.raises(InputError, match=rf"bert_model\.ckpt\.index: .*{message}"):
        convert(make_release(tmp_path / "release", variables))
    assert os.listdir(tmp_path) == ["release"]


@pytest.mark.parametrize("layers, message", [(1, "unknown variable 'bert/encoder/layer_1"), (3, "missing variable")])
def test_wrong_number_of_layers(tmp_path, layers, message):
    with pytest.raises(InputError, match=message):
        convert(make_release(tmp_path / "release", config={**CONFIG, "num_hidden_layers": layers}))


def test_partitioned_variable_and_damaged_data_are_named(tmp_path):
    with pytest.raises(InputError, match=f"'{DECODER}': is partitioned"):
        convert(make_release(tmp_path / "sliced", append={DECODER: field(7, b"\x0a\x00")}))
    release = make_release(tmp_path / "flipped")
    data = release / "bert_model.ckpt.data-00000-of-00001"
    data.write_bytes(data.read_bytes()[:-1] + b"?")
    with pytest.raises(
        InputError, match="data-00000-of-00001: variable 'cls/seq_relationship/output_weights': damaged"
    ):
        convert(release)
    assert not (tmp_path / "dump").exists()


def test_optimizer_variables_are_left_out_and_said_so(tmp_path, golden_dump, capsys):
    extra = {"global_step": np.array(7), "beta1_power": np.float32(0.9)}
    extra |= {f"{KERNEL}/{slot}": VARIABLES[KERNEL] for slot in ("adam_m", "adam_v", "Adam", "Adam_1")}
    dump = convert(make_release(tmp_path / "release", VARIABLES | extra))
    assert "left out 6 variables of the optimizer: " in capsys.readouterr().out
    assert (dump / "model.safetensors").read_bytes() == (golden_dump / "model.safetensors").read_bytes()


def test_unused_configuration_fields_are_said(tmp_path, capsys):
    dump = convert(make_release(tmp_path / "release", config={**CONFIG, "pooler_type": "x", "auto_map": {"a": "b"}}))
    assert "'auto_map', 'pooler_type'" in capsys.readouterr().out
    assert "auto_map" not in (dump / "config.json").read_text()


@pytest.mark.parametrize(
    "config, message",
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("\xff", "not JSON"),
        ("[]", "not a JSON object"),
        ({"hidden_size": None}, "'hidden_size' is None, should be a whole number from 1"),
        ({"hidden_size": "16"}, "'hidden_size' is '16'"),
        ({"hidden_size": True}, "'hidden_size' is True"),
        ({"hidden_size": 16.0}, r"'hidden_size' is 16\.0"),
        ({"num_hidden_layers": 10**9}, "'num_hidden_layers' is 1000000000"),
        ({"num_attention_heads": 3}, "multiple of 'num_attention_heads'"),
        ({"hidden_act": ["gelu"]}, "'hidden_act' is .* one of gelu"),
        ({"hidden_dropout_prob": float("nan")}, "'hidden_dropout_prob' is nan"),
        ({"do_lower_case": "no"}, "'do_lower_case' is 'no'"),
        ({"do_lower_case": 1}, "'do_lower_case' is 1"),
        ({"vocab_size": 51}, "vocab.txt: 50 lines, but 'vocab_size' of the configuration is 51"),
    ],
)
def test_wrong_configuration(tmp_path, config, message):
    release = make_release(tmp_path / "release")
    text = config if isinstance(config, str) else json.dumps({**CONFIG, **config})
    (release / "bert_config.json").write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match=message):
        convert(release)


@pytest.mark.parametrize(
    "vocabulary, message",
    [
        (None, "vocab.txt: no such file"),
        (b"\xff\n", "not UTF-8"),
        (b"word\n" * 50, r"no line \[PAD\]"),
        (b"\n" * 49, "49 lines"),
    ],
)
def test_wrong_vocabulary(tmp_path, vocabulary, message):
    release = make_release(tmp_path / "release")
    (release / "vocab.txt").unlink()
    if vocabulary is not None:
        (release / "vocab.txt").write_bytes(vocabulary)
    with pytest.raises(InputError, match=message):
        convert(release)


def test_missing_or_ambiguous_files(tmp_path):
    release = make_release(tmp_path / "release")
    with pytest.raises(InputError, match=r"nothing\.index: no such file"):
        convert(release / "nothing", tmp_path / "dump")
    with pytest.raises(InputError, match=r"other.json: no such file; .* --bert_config_file"):
        tf_conversion.convert_tf_checkpoint_to_pytorch(release, release / "other.json", tmp_path / "dump")
    write_checkpoint(release / "model.ckpt-10", VARIABLES)
    with pytest.raises(InputError, match=r"found bert_model\.ckpt\.index, model\.ckpt-10\.index; give"):
        convert(release)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="found none"):
        convert(tmp_path / "empty")


def test_dump_folder_is_replaced_only_when_told(tmp_path):
    release, dump = make_release(tmp_path / "release"), tmp_path / "dump"
    dump.mkdir()
    convert(release)  # an empty folder may be there
    before = (dump / "tokenizer_config.json").read_text()
    with pytest.raises(InputError, match=r"dump: not empty; .* --overwrite"):
        convert(release, do_lower_case=False)
    assert (dump / "tokenizer_config.json").read_text() == before
    convert(release, do_lower_case=False, overwrite=True)
    assert (dump / "tokenizer_config.json").read_text() != before
    (dump / "thesis.tex").write_text("")
    with pytest.raises(InputError, match=r"dump: holds 'thesis\.tex'"):
        convert(release, overwrite=True)
    with pytest.raises(InputError, match=r"release: holds 'bert_config\.json'"):
        convert(release, release, overwrite=True)
    with pytest.raises(InputError, match=r"vocab\.txt: not a folder"):
        convert(release, release / "vocab.txt", overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["dump", "release"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_interrupted_conversion_leaves_nothing_behind(tmp_path, monkeypatch, error):
    def interrupt(self, folder):
        (folder / "model.safetensors").write_bytes(b"half")
        raise error

    release, dump = make_release(tmp_path / "release"), tmp_path / "dump"
    with monkeypatch.context() as patch, pytest.raises(error):
        patch.setattr(PreTrainedModel, "save_pretrained", interrupt)
        convert(release)
    assert os.listdir(tmp_path) == ["release"]
    before = (convert(release) / "model.safetensors").read_bytes()
    with monkeypatch.context() as patch, pytest.raises(error):
        patch.setattr(PreTrainedModel, "save_pretrained", interrupt)
        convert(release, overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["dump", "release"]
    assert (dump / "model.safetensors").read_bytes() == before


def test_failed_swap_puts_the_old_folder_back(tmp_path, monkeypatch):
    release = make_release(tmp_path / "release")
    dump, rename = convert(release), Path.rename

    def fail_on_the_new(self, target):
        if self.name.endswith(".new"):
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_on_the_new)
    with pytest.raises(OSError, match="no"):
        convert(release, overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["dump", "release"]
    assert {file.name for file in dump.iterdir()} == tf_conversion.WRITTEN_FILES


def test_main(tmp_path, monkeypatch, capsys):
    release = make_release(tmp_path / "cased_release")
    for name in ("bert_model.ckpt.index", "bert_model.ckpt.data-00000-of-00001"):
        shutil.copyfile(GOLDEN / name, release / name)
    command = ["convert.py", "--tf_checkpoint_path", str(release), "--pytorch_dump_path", str(tmp_path / "dump")]
    monkeypatch.setattr(sys, "argv", [*command, "--do_lower_case", "true"])
    runpy.run_path(script.__file__, run_name="__main__")
    out = capsys.readouterr().out
    assert "BertForPreTraining" in out and "lower-cased (--do_lower_case)" in out
    assert AutoTokenizer.from_pretrained(tmp_path / "dump").do_lower_case is True

    with pytest.raises(SystemExit) as stop:
        script.main(command[1:])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert f"error: {tmp_path / 'dump'}: not empty" in error

    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stop:
        script.main([*command[1:-1], str(tmp_path / "file" / "dump")])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "Not a directory" in error
