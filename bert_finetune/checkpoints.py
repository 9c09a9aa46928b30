"""Models in and out: loading with the task's classes in the task's order, saving without half-written files."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file, logging

from bert_finetune.errors import InputError, loading_reason, writing
from bert_finetune.glue import Task
from bert_finetune.hub import HUB_FAILURES, hub_options, hub_reason


def load_config(name_or_path: str, option: str) -> PreTrainedConfig:
    """The configuration of a model folder or hub name; `option` is named in the error when there is none.

    One without a `model_type`, as general-distilled students were published, is a BERT's.
    """
    config = _from_pretrained(_config_class(name_or_path, option), name_or_path, option)
    config._attn_implementation = None  # what a checkpoint asks for here can be code on the hub
    return config


def load_tokenizer(name_or_path: str, option: str, do_lower_case: bool | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model; `do_lower_case` None leaves it as it was saved."""
    kwargs = {} if do_lower_case is None else {"do_lower_case": do_lower_case}
    if _config_class(name_or_path, option) is BertConfig:
        kwargs["config"] = load_config(name_or_path, option)
    tokenizer = _from_pretrained(AutoTokenizer, name_or_path, option, **kwargs)
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # so transformers reads a model without one
        raise InputError(f"{option} {name_or_path}: has no vocabulary; it needs a tokenizer.json or vocab.txt")
    return tokenizer


def _config_class(name_or_path: str, option: str) -> type:
    settings, _ = _from_pretrained(PreTrainedConfig, name_or_path, option, loader="get_config_dict")
    return BertConfig if settings and "model_type" not in settings else AutoConfig


def load_classifier(name_or_path: str, task: Task, option: str, fine_tuned: bool = False) -> PreTrainedModel:
    """A sequence classifier with the task's classes, in the task's order and under the task's names.

    A head whose class names are the task's in another order has its rows reordered, so that logit k always belongs to
    `task.kind.output_names[k]`. With `fine_tuned` (a teacher) the checkpoint must bring a head that fits the task;
    otherwise a head that is missing or has another number of classes is made new, which is printed.
    Raises InputError, naming `option`, for a model that cannot be loaded, or whose head does not fit.
    """
    config, kind = load_config(name_or_path, option), task.kind
    order = kind.output_order(class_names(config), f"{option} {name_or_path}", task.name, fine_tuned)
    config.num_labels, config.problem_type = kind.outputs, kind.problem_type
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its report of missing weights is given below, in one line
    try:
        model, info = _from_pretrained(
            AutoModelForSequenceClassification,
            name_or_path,
            option,
            config=config,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            dtype=torch.float32,
        )
    finally:
        logging.set_verbosity(verbosity)
    for key, stored, wanted in sorted(info["mismatched_keys"]):
        if fine_tuned or key.startswith(f"{model.base_model_prefix}."):
            raise InputError(
                f"{option} {name_or_path}: its weights and its configuration do not fit: {key} is {tuple(stored)}, not "
                f"{tuple(wanted)}"
            )
    fresh = sorted(info["missing_keys"] | {key for key, *_ in info["mismatched_keys"]})
    if fresh and fine_tuned:
        raise InputError(
            f"{option} {name_or_path}: not a fine-tuned classifier, it has no weights for {', '.join(fresh)}; "
            "fine-tune it first with bert_finetune/run_glue.py"
        )
    if fresh:
        print(f"{name_or_path}: new weights for {', '.join(fresh)}")
    else:
        reorder_classes(model, order)
    model.config.id2label = dict(enumerate(kind.output_names))
    model.config.label2id = {name: k for k, name in model.config.id2label.items()}
    return model


def read_weights(name_or_path: str, wanted: Callable[[str], bool]) -> dict[str, torch.Tensor]:
    """The tensors whose names are `wanted` of a model's weights, in one file or several.

    Of safetensors nothing else is read; pytorch_model.bin is read as weights and nothing else.
    """

    def find(name: str) -> str | None:
        options = hub_options(name_or_path)
        return cached_file(name_or_path, name, _raise_exceptions_for_missing_entries=False, **options)

    for name in ("model.safetensors", "pytorch_model.bin"):
        if path := find(name):
            return _read_file(path, wanted)
        if index := find(f"{name}.index.json"):
            files = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
            shards = sorted({file for key, file in files.items() if wanted(key)})
            return {key: value for shard in shards for key, value in _read_file(find(shard), wanted).items()}
    return {}


def _read_file(path: str, wanted: Callable[[str], bool]) -> dict[str, torch.Tensor]:
    if path.endswith(".bin"):
        weights = torch.load(path, map_location="cpu", weights_only=True)
        return {key: value for key, value in weights.items() if wanted(key)}
    with safe_open(path, framework="pt") as weights:
        return {key: weights.get_tensor(key) for key in weights.keys() if wanted(key)}  # noqa: SIM118


def check_length(config: PreTrainedConfig, max_seq_length: int) -> None:
    """Raise InputError for inputs longer than the model has positions."""
    # RoBERTa and its kin number positions from padding id + 1.
    positions = config.max_position_embeddings - (config.pad_token_id + 1 if "roberta" in config.model_type else 0)
    if max_seq_length > positions:
        raise InputError(f"--max_seq_length {max_seq_length}: the model has only {positions} positions")


def reorder_classes(model: PreTrainedModel, order: list[int]) -> None:
    """Reorder a classifier's classes in place: class k of the result is class `order[k]` of the model as it was."""
    with torch.no_grad():
        for parameter in output_layer(model).parameters():
            parameter.copy_(parameter[order].clone())


def output_layer(model: PreTrainedModel) -> nn.Linear:
    """The linear layer that makes a classifier's logits: the last one outside the transformer itself."""
    body = set(model.base_model.modules())
    return [module for module in model.modules() if isinstance(module, nn.Linear) and module not in body][-1]


def save_classifier(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Save for `from_pretrained`, each file complete or not there: written aside, then renamed into `folder`."""
    folder = Path(folder)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=folder, prefix=".saving-"))
        try:
            model.save_pretrained(aside)
            tokenizer.save_pretrained(aside)
            # The weights come last: a folder with weights has everything.
            for file in sorted(aside.iterdir(), key=lambda file: "model" in file.name):
                os.replace(file, folder / file.name)
        finally:
            shutil.rmtree(aside)


def _from_pretrained(kind: type, name_or_path: str, option: str, loader: str = "from_pretrained", **kwargs):
    if name_or_path.startswith((".", "/", "~")) and not Path(name_or_path).is_dir():
        raise InputError(f"{option} {name_or_path}: no such folder")
    part = ", its tokenizer" if kind is AutoTokenizer else ""
    try:
        options = hub_options(name_or_path)
    except HUB_FAILURES as error:
        raise InputError(f"{option} {name_or_path}{part}: {_reason(error, name_or_path)}") from error
    try:
        return getattr(kind, loader)(name_or_path, trust_remote_code=False, **options, **kwargs)
    # Nothing of ours runs in there. transformers takes what a configuration says for right, so that one with a list for
    # a number, say, shows as whatever that leads to.
    except Exception as error:
        raise InputError(f"{option} {name_or_path}{part}: {_reason(error, name_or_path)}") from error


def _reason(error: Exception, name_or_path: str) -> str:
    if "trust_remote_code" in str(error):
        return "cannot be loaded: needs code of its own, which is never run here; use an architecture of transformers'"
    if "Weights only load failed" in str(error):
        return "cannot be loaded: its pytorch_model.bin is damaged, or holds code, which is never run here"
    return loading_reason(error) if Path(name_or_path).is_dir() else hub_reason(error, name_or_path)


def class_names(config: PreTrainedConfig) -> list[str]:
    """A model's class names in its order; a class without one is LABEL_k."""
    return [str(config.id2label.get(k, f"LABEL_{k}")) for k in range(config.num_labels)]
