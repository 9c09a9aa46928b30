"""The original TensorFlow release of a BERT as a transformers model: names, shapes, tokenizer."""

import json
import os
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import BertConfig, BertForPreTraining, BertModel, BertTokenizer, PreTrainedModel
from transformers.activations import ACT2FN

from bert_finetune.errors import InputError, writing
from bert_finetune.tf_checkpoint import TFCheckpoint

# From a parameter's name in transformers to the variable's in the release, applied in this order.
TF_SPELLING = (
    ("encoder.layer.", "encoder/layer_"),
    ("_embeddings.weight", "_embeddings"),
    ("LayerNorm.weight", "LayerNorm/gamma"),
    ("LayerNorm.bias", "LayerNorm/beta"),
    ("predictions.bias", "predictions/output_bias"),
    ("seq_relationship.weight", "seq_relationship/output_weights"),
    ("seq_relationship.bias", "seq_relationship/output_bias"),
    (".weight", "/kernel"),
    (".", "/"),
)
OPTIMIZER_VARIABLE = re.compile(
    r"(^|/)(global_step|beta[12]_power|Adam(_1)?|AdamWeightDecayOptimizer(_1)?)$|(adam|lamb)_[mv]"
)

# The numbers in the release's bert_config.json: type, smallest, largest. The largest are beyond any BERT: a wrong file
# should fail at once, not by filling the memory.
CONFIG_NUMBERS = {
    "vocab_size": (int, 1, 1 << 20),
    "hidden_size": (int, 1, 1 << 16),
    "num_hidden_layers": (int, 1, 1000),
    "num_attention_heads": (int, 1, 1 << 16),
    "intermediate_size": (int, 1, 1 << 18),
    "max_position_embeddings": (int, 1, 1 << 20),
    "type_vocab_size": (int, 1, 1 << 20),
    "hidden_dropout_prob": (float, 0, 1),
    "attention_probs_dropout_prob": (float, 0, 1),
    "initializer_range": (float, 0, 1),
}

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WRITTEN_FILES = {"model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt"}


def find_checkpoint(path: str | os.PathLike) -> Path:
    """The prefix of the checkpoint that `path` means: itself a prefix, an .index file, or a folder that holds one."""
    path = Path(path)
    if path.is_dir():
        found = sorted(path.glob("*.index"))
        if len(found) != 1:
            names = ", ".join(file.name for file in found) or "none"
            raise InputError(f"{path}: needs one .index file, found {names}; give --tf_checkpoint_path the prefix")
        return found[0].with_suffix("")
    prefix = path.with_suffix("") if path.suffix == ".index" else path
    if not Path(f"{prefix}.index").is_file():
        raise InputError(f"{prefix}.index: no such file; give the release's folder or prefix as --tf_checkpoint_path")
    return prefix


def read_config(path: Path) -> tuple[BertConfig, bool | None, list[str]]:
    """The release's bert_config.json: the configuration, its `do_lower_case` if it has one, the fields not used.

    Raises `InputError` that names the field. The sizes must be there; the rest has the original's defaults.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; give the release's bert_config.json as --bert_config_file")
    try:
        fields = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise InputError(f"{path}: not a JSON object")
    lower_case = fields.pop("do_lower_case", None)
    if not isinstance(lower_case, bool | None):
        raise InputError(f"{path}: 'do_lower_case' is {lower_case!r}, should be true or false")
    hidden_act = fields.pop("hidden_act", "gelu")
    if hidden_act not in tuple(ACT2FN):
        raise InputError(f"{path}: 'hidden_act' is {hidden_act!r}, should be one of {', '.join(ACT2FN)}")
    config = BertConfig(hidden_act=hidden_act)
    for name, (kind, smallest, largest) in CONFIG_NUMBERS.items():
        value = fields.pop(name, None if kind is int else getattr(config, name))
        if type(value) not in (int, kind) or not smallest <= value <= largest:
            what = "a whole number" if kind is int else "a number"
            raise InputError(f"{path}: {name!r} is {value!r}, should be {what} from {smallest} to {largest}")
        setattr(config, name, kind(value))
    if config.hidden_size % config.num_attention_heads:
        raise InputError(f"{path}: 'hidden_size' should be a multiple of 'num_attention_heads'")
    return config, lower_case, sorted(fields)


def read_vocabulary(path: Path, size: int) -> dict[str, int]:
    """The word pieces of vocab.txt, one a line, and their numbers; read as the original tokenization.py reads them."""
    try:
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8: {error}") from error
    if len(lines) != size:
        raise InputError(
            f"{path}: {len(lines)} lines, but 'vocab_size' of the configuration is {size}; they must agree"
        )
    vocabulary = {line.strip(): number for number, line in enumerate(lines)}
    for token in SPECIAL_TOKENS:
        if token not in vocabulary:
            raise InputError(f"{path}: no line {token}; is it the vocabulary of a BERT?")
    return vocabulary


def detect_casing(folders: list[Path], vocabulary: dict[str, int]) -> tuple[bool, str]:
    """Whether a release lower-cases its input, and what says so: a folder's name, or else the word pieces."""
    for folder in folders:
        if match := re.search(r"(?:^|[_-])(un)?cased(?:[_-]|$)", folder.name):
            return bool(match[1]), f"folder {folder.name}"
    for token in vocabulary:
        if token != token.lower() and not re.fullmatch(r"\[.*\]", token):
            return False, f"word piece {token!r}"
    return True, "no upper-case word pieces"


def tf_name(parameter: str) -> str:
    """The release's name of a parameter of `BertForPreTraining`; the matrices named `kernel` are stored transposed."""
    for ours, theirs in TF_SPELLING:
        parameter = parameter.replace(ours, theirs)
    return parameter


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(map(repr, names[:5])) + more


def load_model(checkpoint: TFCheckpoint, config: BertConfig) -> tuple[PreTrainedModel, list[str]]:
    """The model with the checkpoint's weights in float32, and the names of the optimizer's variables, left out.

    Raises `InputError` that names the variables (the first few) which are missing, unknown, or of another shape or type
    than `config` asks for, and for what `TFCheckpoint.read` refuses.
    """
    left_out = [name for name in checkpoint.variables if OPTIMIZER_VARIABLE.search(name)]
    stored = {name: checkpoint.variables[name] for name in checkpoint.variables.keys() - set(left_out)}
    has_heads = any(name.startswith("cls/") for name in stored)
    with torch.device("meta"):  # no time and memory for initial weights that are replaced
        model = BertForPreTraining(config) if has_heads else BertModel(config)
    # named_parameters lists tied parameters once, so the masked-word decoder is not among them.
    parameters = dict(model.named_parameters())
    source = {name: tf_name(name if has_heads else f"bert.{name}") for name in parameters}

    problems = []
    if missing := sorted(set(source.values()) - set(stored)):
        problems.append(f"missing variable {_listed(missing)}")
    if unknown := sorted(set(stored) - set(source.values())):
        problems.append(f"unknown variable {_listed(unknown)}")
    for name, parameter in parameters.items():
        shape = tuple(parameter.shape)[:: -1 if source[name].endswith("/kernel") else 1]
        variable = stored.get(source[name])
        if variable and variable.shape != shape:
            problems.append(f"variable {source[name]!r} has the shape {variable.shape}, not {shape}")
        if variable and "float" not in variable.dtype:
            problems.append(f"variable {source[name]!r} has the type {variable.dtype}, not float32")
    if problems:
        advice = "is this the original release, and the bert_config.json beside it?"
        raise InputError(f"{checkpoint.index_file}: {'; '.join(problems[:5])}; {advice}")

    weights = {}
    for name in parameters:
        values = torch.from_numpy(checkpoint.read(source[name])).float()
        weights[name] = values.T.contiguous() if source[name].endswith("/kernel") else values
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    return model.eval(), left_out


def check_replaceable(dump: Path, overwrite: bool) -> None:
    """Raise `InputError` unless `dump` is absent, empty, or, with `overwrite`, the result of an earlier conversion."""
    if not dump.exists():
        return
    if not dump.is_dir():
        raise InputError(f"{dump}: not a folder; choose another --pytorch_dump_path")
    names = {file.name for file in dump.iterdir()}
    if names and not overwrite:
        raise InputError(f"{dump}: not empty; choose another --pytorch_dump_path, or --overwrite to replace it")
    if foreign := sorted(names - WRITTEN_FILES):
        raise InputError(f"{dump}: holds {_listed(foreign)}, not of a conversion; choose another --pytorch_dump_path")


@contextmanager
def replacing(folder: Path):
    """Yields an empty folder beside `folder` that takes its place at the end, or goes away if an error comes."""
    new, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{kind}") for kind in ("new", "old"))
    try:
        new.mkdir(parents=True)
        yield new
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(new, ignore_errors=True)
        if old.exists() and not folder.exists():
            old.rename(folder)


def convert_tf_checkpoint_to_pytorch(
    tf_checkpoint_path: str | os.PathLike,
    bert_config_file: str | os.PathLike | None,
    pytorch_dump_path: str | os.PathLike,
    do_lower_case: bool | None = None,
    overwrite: bool = False,
) -> None:
    """Convert the checkpoint and print what was written and left out. None means: as the release says.

    Raises `InputError` if anything is wrong with the inputs, `OSError` if a file cannot be read or the result cannot be
    written; `pytorch_dump_path` is then as it was before.
    """
    # Links are not followed: a link may be what carries the release's name.
    prefix = Path(os.path.abspath(find_checkpoint(tf_checkpoint_path)))
    config_file = Path(os.path.abspath(bert_config_file or prefix.with_name("bert_config.json")))
    dump = Path(pytorch_dump_path).resolve()
    check_replaceable(dump, overwrite)
    config, says_lower_case, unused_fields = read_config(config_file)

    folders = [prefix.parent, config_file.parent]
    vocabulary_file = next((folder / "vocab.txt" for folder in folders if (folder / "vocab.txt").is_file()), None)
    if vocabulary_file is None:
        raise InputError(f"{prefix.parent / 'vocab.txt'}: no such file; put the release's vocab.txt there")
    vocabulary = read_vocabulary(vocabulary_file, config.vocab_size)
    if do_lower_case is not None:
        lower_case, why = do_lower_case, "--do_lower_case"
    elif says_lower_case is not None:
        lower_case, why = says_lower_case, config_file.name
    else:
        lower_case, why = detect_casing(folders, vocabulary)
    tokenizer = BertTokenizer(
        vocab=vocabulary, do_lower_case=lower_case, model_max_length=config.max_position_embeddings
    )
    config.pad_token_id = tokenizer.pad_token_id

    checkpoint = TFCheckpoint(prefix)
    model, left_out = load_model(checkpoint, config)
    with writing(dump), replacing(dump) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        shutil.copyfile(vocabulary_file, folder / "vocab.txt")

    print(f"{dump}: {type(model).__name__}, {model.num_parameters():,} parameters, all checksums match")
    print(f"tokenizer: {len(vocabulary):,} word pieces, {'lower-cased' if lower_case else 'cased'} ({why})")
    if left_out:
        print(f"left out {len(left_out)} variables of the optimizer: {_listed(left_out)}")
    if unused_fields:
        print(f"left out fields of {config_file.name} that the original BERT does not use: {_listed(unused_fields)}")
