"""The options of transformers' `TrainingArguments`, read from its source: importing the class takes torch, and seconds,
which nobody should wait for who asks for --help or has mistyped an option."""

import ast
import functools
import importlib.util
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TrainerOption:
    """`type`: of its value, for numbers; None where that is for `TrainingArguments` to say. `switch`: True or False,
    and True if left out. `default`: as the source writes it."""

    name: str
    help: str
    default: str
    type: type | None
    switch: bool


@functools.cache
def trainer_options() -> tuple[TrainerOption, ...]:
    """All of them, in the source's order."""
    package = importlib.util.find_spec("transformers").submodule_search_locations[0]
    module = ast.parse(Path(package, "training_args.py").read_text(encoding="utf-8"))
    (arguments,) = (node for node in module.body if getattr(node, "name", None) == "TrainingArguments")
    fields = (node for node in arguments.body if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Call))
    return tuple(_option(node) for node in fields if not any(_is_init_off(keyword) for keyword in node.value.keywords))


def _option(node: ast.AnnAssign) -> TrainerOption:
    given = {keyword.arg: keyword.value for keyword in node.value.keywords}
    metadata = given.get("metadata", ast.Dict([], []))
    described = {ast.unparse(key): value for key, value in zip(metadata.keys, metadata.values, strict=True)}.get(
        "'help'"
    )
    # Some texts are put together from pieces, such as the names of all log levels; the constant ones tell enough.
    texts = [part.value for part in ast.walk(described or metadata) if isinstance(part, ast.Constant)]
    default = ast.unparse(given["default"]) if "default" in given else ""
    annotation = ast.unparse(node.annotation)
    plain = {"int": int, "float": float}.get(annotation.removesuffix(" | None"))
    switch = default == "True" and annotation in ("bool", "bool | None")
    return TrainerOption(
        node.target.id, " ".join(text for text in texts if isinstance(text, str)), default, plain, switch
    )


def _is_init_off(keyword: ast.keyword) -> bool:
    return keyword.arg == "init" and ast.unparse(keyword.value) == "False"
