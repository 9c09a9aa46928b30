"""Models in and out: loading with the task's classes in the task's order, saving without half-written files.

Weights are written under the names that the model has today, whatever names they were loaded under; they are read
through transformers, which knows the old ones.
"""

import copy
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file, logging

from bert_finetune.architectures import attend_fully, check_architecture, check_classifier
from bert_finetune.errors import InputError, loading_reason, reading, writing
from bert_finetune.files import flush, rename
from bert_finetune.glue import Task
from bert_finetune.hub import HUB_FAILURES, hub_options, hub_reason
from bert_finetune.task_kinds import MultiLabel, plain

# What a checkpoint may hold beside a classifier, by the beginning of its name: the heads that encoders are pre-trained
# or fine-tuned with elsewhere, TinyBERT's maps to its teacher, and a pooler that this classifier does not look at.
_OTHER_HEADS = re.compile(
    r"(cls|lm_head|decoder|predictions|sop_classifier|(discriminator|generator|lm|mask|entity)_predictions"
    r"|generator_lm_head|vocab_(transform|layer_norm|projector)|pred_layer|logits_proj|qa_outputs|qa_classifier"
    r"|fit_denses|fit_dense|share_fit_dense)\."
    r"|([^.]+\.)?pooler\.|(.+\.)?position_ids$"
)
# Under these keys training frameworks keep the weights, with an optimizer and more beside them.
_WEIGHTS_WITHIN = ("state_dict", "model_state_dict", "model")
# What a file is that is fetched apart from a repository, by its name, and how a file begins that stands in its place.
_FETCHED = {".safetensors": "the weights were", ".bin": "the weights were", ".json": "it was", ".txt": "it was"}
_LFS_POINTER = "version https://git-lfs.github.com/spec/v1"


def load_config(name_or_path: str, option: str) -> PreTrainedConfig:
    """The configuration of a model folder or hub name; `option` is named in the error when there is none.

    One without a `model_type`, as general-distilled students were published, is a BERT's. Class names that are a list,
    or that have their numbers as values, are taken as what they are meant to be.
    """
    config = _mended_config(name_or_path, option) or _from_pretrained(AutoConfig, name_or_path, option)
    _check_thresholds(config, f"{option} {name_or_path}")
    config._attn_implementation = None  # what a checkpoint asks for here can be code on the hub
    return config


def load_classifier_config(name_or_path: str, option: str, fine_tuned: bool = False) -> PreTrainedConfig:
    """The configuration of a model that is to classify texts, or, `fine_tuned`, does so already. Raises InputError for
    one that cannot."""
    config = load_config(name_or_path, option)
    check_classifier(config, f"{option} {name_or_path}", fine_tuned)
    return config


def load_encoder_config(name_or_path: str, option: str) -> PreTrainedConfig:
    """The configuration of a model that is to give hidden states of a text's tokens. Raises InputError for one that
    cannot."""
    config = load_config(name_or_path, option)
    check_architecture(config, f"{option} {name_or_path}")
    return config


def _mended_config(name_or_path: str, option: str) -> PreTrainedConfig | None:
    """The configuration, where transformers could not read it by itself; else None."""
    settings, _ = _from_pretrained(PreTrainedConfig, name_or_path, option, loader="get_config_dict")
    if not settings or not isinstance(settings, dict):
        return None
    what, mended = f"{option} {name_or_path}", {"model_type": "bert"} | settings
    if "id2label" in settings:
        mended["id2label"] = _by_number(settings["id2label"], what)
    if mended == settings or mended["model_type"] not in CONFIG_MAPPING:
        return None
    with reading(what, Exception):  # nothing of ours runs in there
        return CONFIG_MAPPING[mended["model_type"]].from_dict(mended, name_or_path=name_or_path)


def _check_thresholds(config: PreTrainedConfig, what: str) -> None:
    """Raise InputError for thresholds of several labels a text that are not one probability for each of the classes."""
    found = getattr(config, "thresholds", None)
    if found is None or config.problem_type != MultiLabel.problem_type:
        return
    good = isinstance(found, list) and all(isinstance(one, int | float) and 0 <= one <= 1 for one in found)
    if not good or len(found) != config.num_labels:
        raise InputError(
            f"{what}: thresholds of its config.json is {json.dumps(found)[:100]}; it must be a list of "
            f"{config.num_labels} numbers from 0 to 1, one for each class"
        )


def _by_number(names: object, what: str) -> dict[str, str] | None:
    """`id2label` as configurations have it, number in digits -> name. Raises InputError for what is nothing like it."""
    by_number = names
    if isinstance(names, list):
        by_number = {str(k): name for k, name in enumerate(names)}
    elif isinstance(names, dict) and set(names) != _digits(names) and all(type(k) is int for k in names.values()):
        by_number = {str(k): name for name, k in names.items()}
    if names and not (isinstance(by_number, dict) and set(by_number) == _digits(names)):
        raise InputError(
            f"{what}: id2label of its config.json is {json.dumps(names)[:100]}; it must say a name for each of the "
            'model\'s outputs, counted from 0, as {"0": "negative", "1": "positive"}'
        )
    return by_number


def _digits(names: dict | list) -> set[str]:
    return {str(k) for k in range(len(names))}


def load_tokenizer(name_or_path: str, option: str, do_lower_case: bool | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model; `do_lower_case` None leaves it as it was saved."""
    kwargs = {} if do_lower_case is None else {"do_lower_case": do_lower_case}
    if (config := _mended_config(name_or_path, option)) is not None:
        kwargs["config"] = config
    tokenizer = _from_pretrained(AutoTokenizer, name_or_path, option, **kwargs)
    if _LFS_POINTER in tokenizer.get_vocab():  # the pointer's lines, taken for words
        raise InputError(f"{option} {name_or_path}, its tokenizer: {_pointer(name_or_path)}")
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # so transformers reads a model without one
        raise InputError(f"{option} {name_or_path}: has no vocabulary; it needs a tokenizer.json or vocab.txt")
    return tokenizer


def load_classifier(
    name_or_path: str, task: Task, option: str, fine_tuned: bool = False, output_names: list[str] | None = None
) -> PreTrainedModel:
    """A sequence classifier with the task's classes, in the task's order and under the task's names.

    A head whose class names are the task's in another order has its rows reordered, so that logit k always belongs to
    `task.kind.output_names[k]`. With `fine_tuned` (a teacher) the checkpoint must bring a head that fits the task, and
    nothing that its architecture would leave out; otherwise a head that is missing or has another number of classes is
    made new, which is printed. output_names: what the outputs of a fine-tuned model are called, see `name_outputs`.
    Raises InputError, naming `option`, for a model that cannot be loaded, or whose head does not fit.
    """
    config = load_classifier_config(name_or_path, option, fine_tuned)
    kind, what = task.kind, f"{option} {name_or_path}"
    if fine_tuned and config.problem_type not in (None, kind.problem_type):
        raise InputError(
            f"{what}: was trained for another kind of task, its problem_type is {config.problem_type}; "
            f"{task.name} is {kind.problem_type}"
        )
    if output_names:
        config = name_outputs(config, output_names)
    order = kind.output_order(class_names(config), what, task.name, fine_tuned)
    config.num_labels, config.problem_type = kind.outputs, kind.problem_type
    model, info = _load_weights(AutoModelForSequenceClassification, name_or_path, config, option)
    _check_encoder(model, info, what, mismatches="" if fine_tuned else f"{model.base_model_prefix}.")
    fresh = sorted(info["missing_keys"] | {key for key, *_ in info["mismatched_keys"]})
    if fresh and fine_tuned:
        raise InputError(
            f"{what}: not a fine-tuned classifier, it has no weights for {_listed(fresh)}; "
            "fine-tune it first with bert_finetune/run_glue.py"
        )
    left_out = sorted(key for key in info["unexpected_keys"] if not _OTHER_HEADS.match(key))
    if left_out and fine_tuned:
        raise InputError(
            f"{what}: would not answer as it was trained to: {type(model).__name__} of this version of transformers "
            f"has no place for its weights {_listed(left_out)}"
        )
    if left_out:
        print(f"{name_or_path}: not used, {type(model).__name__} has no place for {_listed(left_out)}")
    if fresh:
        print(f"{name_or_path}: new weights for {_listed(fresh)}")
        vars(model.config).pop("thresholds", None)  # of another task's head
    else:
        reorder_classes(model, order)
    if not fine_tuned:
        model.config.update(kind.settings)  # the teacher's, to begin with
    check_finite(dict(model.named_parameters()), what)
    model.config.id2label = dict(enumerate(kind.output_names))
    model.config.label2id = {name: k for k, name in model.config.id2label.items()}
    return model


def load_pretrained(kind: type, name_or_path: str, option: str) -> PreTrainedModel:
    """A model as it was pre-trained, by the class of transformers' that makes it (`AutoModelForMaskedLM`), in float32
    and evaluation mode.

    Raises InputError, naming `option`, for one that cannot be loaded, or has not all the weights, a pooler's apart.
    """
    what, config = f"{option} {name_or_path}", load_config(name_or_path, option)
    with _silently():
        model, info = _from_pretrained(
            kind, name_or_path, option, config=config, output_loading_info=True, dtype=torch.float32
        )
    if missing := sorted(key for key in info["missing_keys"] if "pooler." not in key):
        raise InputError(
            f"{what}: has no weights for {_listed(missing)}, which {type(model).__name__} needs; give a model as it "
            "was pre-trained, such as bert-base-uncased"
        )
    check_finite(dict(model.named_parameters()), what)
    return model.eval()


def load_encoder(name_or_path: str, option: str) -> PreTrainedModel:
    """A model without a head, of a checkpoint with any head or none; a pooler that it does not bring is made new.

    Raises InputError, naming `option`, for a model that cannot be loaded, or whose encoder is not whole.
    """
    config, what = load_encoder_config(name_or_path, option), f"{option} {name_or_path}"
    model, info = _load_weights(AutoModel, name_or_path, config, option)
    _check_encoder(model, info, what)
    check_finite(dict(model.named_parameters()), what)
    return model


def _check_encoder(model: PreTrainedModel, info: dict, what: str, mismatches: str = "") -> None:
    """Raise InputError for an encoder that is not whole, or weights that do not fit, of names that begin with
    `mismatches`."""
    for key, stored, wanted in sorted(info["mismatched_keys"]):
        if key.startswith(mismatches):
            raise InputError(
                f"{what}: its weights and its configuration do not fit: {key} is {tuple(stored)}, not {tuple(wanted)}"
            )
    if missing := _missing_of_encoder(model, info):
        others = sorted(info["unexpected_keys"])
        raise InputError(
            f"{what}: has no weights for {_listed(missing)}, which {type(model).__name__} needs"
            + (f"; under other names it has {_listed(others)}" if others else "")
        )


def _load_weights(kind: type, name_or_path: str, config: PreTrainedConfig, option: str) -> tuple[PreTrainedModel, dict]:
    """The model, of one of transformers' Auto classes, and what transformers reports of its loading.

    Where one prefix before all names of weights explains why the encoder is not found, it is left out, which is
    printed.
    """
    attend_fully(config, name_or_path)
    settings = {"config": config, "output_loading_info": True, "ignore_mismatched_sizes": True, "dtype": torch.float32}
    with _silently():
        model, info = _from_pretrained(kind, name_or_path, option, **settings)
        if not _missing_of_encoder(model, info):
            return model, info
        weights = read_weights(name_or_path, lambda key: True)
        for prefix in _common_prefixes(weights):
            bare = {key.removeprefix(prefix): value for key, value in weights.items()}
            with reading(f"{option} {name_or_path}", Exception):  # nothing of ours runs in there
                renamed, report = type(model).from_pretrained(None, state_dict=bare, **settings)
            if not _missing_of_encoder(renamed, report):
                if prefix:
                    print(f"{name_or_path}: {prefix!r} before the names of all its weights is left out")
                renamed.config.name_or_path = name_or_path
                return renamed, report
    return model, info


def _missing_of_encoder(model: PreTrainedModel, info: dict) -> list[str]:
    """What a checkpoint lacks beyond a head; a pooler counts as part of that, few pre-training heads have one."""
    encoder = "" if model.base_model is model else f"{model.base_model_prefix}."
    return sorted(key for key in info["missing_keys"] if key.startswith(encoder) and ".pooler." not in f".{key}")


def _common_prefixes(keys: Iterable[str]) -> list[str]:
    """The prefixes that all keys have in common, in whole parts, from none on: "", "module.", "module.bert."."""
    parts = next(iter(keys), "").split(".")[:-1]
    prefixes = ["".join(f"{part}." for part in parts[:count]) for count in range(len(parts) + 1)]
    return [prefix for prefix in prefixes if all(key.startswith(prefix) for key in keys)]


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


@contextmanager
def _silently() -> Iterator[None]:
    """Without transformers' own report of missing weights, and its bar."""
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def check_finite(weights: dict[str, torch.Tensor], what: str) -> None:
    """Raise InputError where a tensor of `what` holds NaN or infinity."""
    for name, value in weights.items():
        if not torch.isfinite(value).all():
            raise InputError(f"{what}: its weights {name} hold NaN or infinity; the training that made it went wrong")


def read_weights(
    name_or_path: str,
    wanted: Callable[[str], bool],
    files: tuple[str, ...] = ("model.safetensors", "pytorch_model.bin"),
) -> dict[str, torch.Tensor]:
    """The tensors whose names are `wanted` of a model's weights, in one file or several, under the names given there;
    `files`: the first of these that is there.

    Of safetensors nothing else is read; pytorch_model.bin is read as weights and nothing else, also where a training
    framework keeps them under a key of its own.
    """

    def find(name: str) -> str | None:
        options = hub_options(name_or_path)
        return cached_file(name_or_path, name, _raise_exceptions_for_missing_entries=False, **options)

    for name in files:
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
        weights = next((weights[key] for key in _WEIGHTS_WITHIN if isinstance(weights.get(key), dict)), weights)
        return {key: value for key, value in weights.items() if isinstance(value, torch.Tensor) and wanted(key)}
    with safe_open(path, framework="pt") as weights:
        return {key: weights.get_tensor(key) for key in weights.keys() if wanted(key)}  # noqa: SIM118


def reorder_classes(model: PreTrainedModel, order: list[int]) -> None:
    """Reorder a classifier's classes in place: class k of the result is class `order[k]` of the model as it was."""
    with torch.no_grad():
        for parameter in output_layer(model).parameters():
            parameter.copy_(parameter[order].clone())
    if thresholds := getattr(model.config, "thresholds", None):
        model.config.thresholds = [thresholds[k] for k in order]


def output_layer(model: PreTrainedModel) -> nn.Linear:
    """The linear layer that makes a classifier's logits: the last one outside the transformer itself."""
    body = set(model.base_model.modules())
    return [module for module in model.modules() if isinstance(module, nn.Linear) and module not in body][-1]


def save_weights(model: PreTrainedModel, folder: str | Path) -> None:
    """Save a model's weights, under their names of today, and its configuration into `folder`."""
    # By default transformers 5 goes back to the names that the weights were loaded under, even LayerNorm.gamma.
    model.save_pretrained(folder, save_original_format=False)


def restore_weights(model: PreTrainedModel, folder: str | Path) -> None:
    """Take over the weights that were saved in `folder`, also under names of old.

    Raises InputError where they are not just this model's.
    """
    with _silently(), reading(str(folder)):
        saved, info = type(model).from_pretrained(
            folder, config=model.config, output_loading_info=True, dtype=model.dtype, attn_implementation="eager"
        )
    wrong = sorted({*info["missing_keys"], *info["unexpected_keys"]})
    if wrong:
        raise InputError(f"{folder}: its weights are not just those of the model that is trained: {_listed(wrong)}")
    model.load_state_dict(saved.state_dict())


def save_classifier(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Save for `from_pretrained`, each file complete or not there: written aside, then renamed into `folder`."""
    folder = Path(folder)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=folder, prefix=".saving-"))
        try:
            save_weights(model, aside)
            tokenizer.save_pretrained(aside)
            # The weights come last: a folder with weights has everything.
            for file in sorted(aside.iterdir(), key=lambda file: "model" in file.name):
                flush(file)
                rename(file, folder / file.name)
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
    if pointer := _pointer(name_or_path):
        return pointer
    if "trust_remote_code" in str(error):
        return "cannot be loaded: needs code of its own, which is never run here; use an architecture of transformers'"
    if "Weights only load failed" in str(error):
        return "cannot be loaded: its pytorch_model.bin is damaged, or holds code, which is never run here"
    return loading_reason(error) if Path(name_or_path).is_dir() else hub_reason(error, name_or_path)


def _pointer(folder: str) -> str | None:
    """That a file of a model's folder is a Git LFS pointer, in words; None where none is, or it is no folder."""
    for path in sorted(Path(folder).glob("*")):
        if path.suffix in _FETCHED and path.is_file() and _begins(path) == _LFS_POINTER:
            return f"{path.name} is a Git LFS pointer, {_FETCHED[path.suffix]} not fetched (git lfs pull)"
    return None


def _begins(path: Path) -> str | None:
    """As much of a file's beginning as shows a pointer; None where it cannot be read, which others report."""
    try:
        with open(path, "rb") as file:
            return file.read(len(_LFS_POINTER)).decode(errors="replace")
    except OSError:
        return None


def name_outputs(config: PreTrainedConfig, names: list[str]) -> PreTrainedConfig:
    """A fine-tuned model's configuration with its outputs called `names`, which `--class_names` gives in their order.

    Raises InputError for another number of names, or names that the model has itself in another order.
    """
    said, own = f"--class_names {','.join(names)}", class_names(config)
    if len(names) != len(own):
        raise InputError(f"{said}: gives {len(names)} names, the model has {len(own)} outputs ({', '.join(own)})")
    alike, own_alike = [plain(name) for name in names], [plain(name) for name in own]
    if alike != own_alike and sorted(alike) == sorted(own_alike):
        raise InputError(f"{said}: the model itself has these names in another order: {', '.join(own)}")
    config = copy.deepcopy(config)
    config.id2label = dict(enumerate(names))
    return config


def class_names(config: PreTrainedConfig) -> list[str]:
    """A model's class names in its order; a class without one is LABEL_k."""
    return [str(config.id2label.get(k, f"LABEL_{k}")) for k in range(config.num_labels)]
