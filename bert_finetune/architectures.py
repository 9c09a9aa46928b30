"""What of transformers' architectures classifies texts here, and what a model can read."""

import sys

from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from bert_finetune.errors import InputError

# Architectures that transformers has a text classifier of, and why they cannot be used, by `model_type`.
_UNFIT = {
    "canine": "reads characters, and shortens its sequences on the way",
    "fnet": "mixes padding into every token, so that its answers depend on a batch's other texts",
    "funnel": "shortens its sequences from block to block",
    "layoutlmv2": "reads pictures of pages",
    "layoutlmv3": "reads pictures of pages",
    "perceiver": "has no hidden state for each token",
    "reformer": "reads texts of certain lengths only",
    "tapas": "reads tables",
}
# Fine-tuned models that are no classifiers, by the end of their class's name. Language models are known by the weights
# that they lack: some who fine-tune one leave its name in the configuration.
_OTHER_MODELS = {
    "ForTokenClassification": "a token classifier",
    "ForQuestionAnswering": "a model that finds answers in a text",
    "ForMultipleChoice": "a model that chooses among several texts",
}


def check_architecture(config: PreTrainedConfig, what: str) -> None:
    """Raise InputError for an architecture whose hidden states are not those of a text's tokens."""
    kind = config.model_type
    if config.is_encoder_decoder:
        raise InputError(f"{what}: a {kind} has an encoder and a decoder; use a model that is one of the two")
    if kind in _UNFIT:
        raise InputError(f"{what}: a {kind} {_UNFIT[kind]}; use another architecture, such as BERT")
    if config.get_text_config() is not config:
        raise InputError(f"{what}: a {kind} reads more than text; use another architecture, such as BERT")


def attend_fully(config: PreTrainedConfig, name: str) -> None:
    """Have a BigBird attend to all pairs of tokens, and print that. Of itself it does so for good from its first short
    batch on, so that what it computes would depend on the order of batches."""
    if config.model_type == "big_bird" and config.attention_type == "block_sparse":
        config.attention_type = "original_full"
        print(f"{name}: attends to all pairs of tokens, not to blocks of them")


def check_classifier(config: PreTrainedConfig, what: str, fine_tuned: bool) -> None:
    """Raise InputError for an architecture that cannot classify texts here, and for a model that, `fine_tuned`, does
    something else."""
    check_architecture(config, what)
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise InputError(f"{what}: transformers has no text classifier of a {config.model_type}; use another model")
    for name in config.architectures or () if fine_tuned else ():
        for end, other in _OTHER_MODELS.items():
            if name.endswith(end):
                raise InputError(f"{what}: {other}, not a text classifier")


def longest_input(model: PreTrainedModel) -> int:
    """How many tokens a model has positions for; `sys.maxsize` where it needs none, as XLNet.

    RoBERTa and its kin number positions from that of padding + 1, which is seen in the embedding of positions itself.
    """
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return len(module.weight) - module.padding_idx - 1
    positions = getattr(model.config, "max_position_embeddings", None) or -1
    return positions if positions > 0 else sys.maxsize


def check_length(model: PreTrainedModel, max_seq_length: int) -> None:
    """Raise InputError for inputs longer than the model has positions."""
    positions = longest_input(model)
    if max_seq_length > positions:
        raise InputError(f"--max_seq_length {max_seq_length}: the model has only {positions} positions")


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, what: str) -> None:
    """Raise InputError where a tokenizer has pieces that the model has no embedding for."""
    embeddings, pieces = len(model.get_input_embeddings().weight), 1 + max(tokenizer.get_vocab().values())
    if pieces > embeddings:
        raise InputError(f"{what}: the tokenizer has {pieces} pieces, and the model embeddings for {embeddings}")


def check_inputs(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, what: str, pair: bool) -> None:
    """Raise InputError where a classifier cannot read batches of what the tokenizer gives: texts, or with `pair` pairs.

    Where the configuration does not say which piece is padding, it is told, for models that look for a text's end.
    """
    check_vocabulary(model, tokenizer, what)
    if tokenizer.pad_token is None:
        raise InputError(
            f"{what}: the tokenizer has no padding; give it one (tokenizer.pad_token = tokenizer.eos_token) and save it"
        )
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    segments = max(tokenizer("a", "a" if pair else None).get("token_type_ids", [0])) + 1
    known = getattr(model.config, "type_vocab_size", None) or segments
    if segments > known:
        raise InputError(
            f"{what}: the tokenizer numbers the texts of a pair, and the model knows one text only; give it a "
            "tokenizer without token_type_ids"
        )
