"""A classifier as an ONNX graph, and that graph with int8 weights."""

import contextlib
import errno
import inspect
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import torch
from google.protobuf.message import DecodeError
from onnxruntime.quantization import QuantType, quantize_dynamic
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bert_finetune.errors import InputError, reason
from deploy.classify import ENGINES
from deploy.formats import Quantization

Inputs = dict[str, torch.Tensor]

# What logits of the graph may differ from PyTorch's, in float32.
TOLERANCE = 1e-4


class _Logits(torch.nn.Module):
    """A classifier whose inputs come in the order of their `names`, and that answers with its logits alone."""

    def __init__(self, model: PreTrainedModel, names: list[str]):
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.model(**dict(zip(self.names, inputs, strict=True))).logits


def input_names(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What a tokenizer gives that a model takes, as the graph's inputs are called."""
    taken = inspect.signature(model.forward).parameters
    return [name for name in tokenizer.model_input_names if name in taken]


def made_up_inputs(model: PreTrainedModel, names: list[str], rows: int, length: int) -> Inputs:
    """A batch (rows, length) of tokens drawn at random; the last of several rows is half padding."""
    ids = torch.randint(min(model.config.vocab_size, 1000), (rows, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if rows > 1:
        mask[-1, (length + 1) // 2 :] = 0
    # Some architectures count positions from what is not padding.
    padding = model.config.pad_token_id or 0
    ids[ids == padding] += 1
    ids[mask == 0] = padding
    inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    return {name: inputs[name] for name in names}


def write_onnx(model: PreTrainedModel, names: list[str], path: Path) -> int:
    """Write a classifier into one file: inputs `names`, output `logits`, axes `batch` and `sequence`.

    Returns the opset. Raises InputError for an architecture that cannot be traced.
    """
    example = made_up_inputs(model, names, 3, 17)
    axes = tuple({0: "batch", 1: "sequence"} for _ in names)
    try:
        with _quietly():
            program = torch.onnx.export(
                _Logits(model, names).eval(),
                tuple(example.values()),
                dynamo=True,
                dynamic_shapes={"inputs": axes},
                input_names=names,
                output_names=["logits"],
                external_data=False,
                verbose=False,
            )
            program.save(path, external_data=False)
    except OSError:
        raise
    except Exception as error:  # of torch's exporter, which raises whatever an architecture's code leads to
        raise InputError(
            f"{type(model).__name__}: cannot be traced to ONNX ({reason(error)}); students of BERT, DistilBERT, "
            "RoBERTa and ELECTRA can: make one with --student_layers from such a teacher"
        ) from error
    return next(found.version for found in onnx.load(path).opset_import if not found.domain)


def write_openvino(source: Path, target: Path) -> None:
    """Write an ONNX graph as an OpenVINO model, its weights in a .bin file beside it, in float32."""
    import openvino

    openvino.save_model(openvino.Core().read_model(source), target, compress_to_fp16=False)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without what the exporter says of itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def open_graph(path: Path) -> Callable[[Inputs], np.ndarray]:
    """What computes a batch's logits with a written graph, in as many threads as PyTorch, with which it takes turns:
    so they do not spin."""
    graph = ENGINES[path.suffix].open(path, torch.get_num_threads(), spin=False)
    return lambda inputs: graph({name: values.numpy() for name, values in inputs.items()})


@torch.inference_mode()
def largest_difference(model: PreTrainedModel, path: Path, names: list[str], longest: int) -> float:
    """Between a graph's logits and the model's, over shapes that graphs go wrong at."""
    graph, found = open_graph(path), []
    for rows, length in ((1, 1), (1, 7), (2, 16), (3, min(128, longest)), (1, longest)):
        inputs = made_up_inputs(model, names, rows, min(length, longest))
        found.append(np.abs(graph(inputs) - model(**inputs).logits.numpy()).max())
    return float(max(found))


def quantize(source: Path, target: Path, way: Quantization) -> None:
    """Write a graph with int8 weights; activations are quantised as they come (dynamically)."""
    try:
        with _quietly():
            quantize_dynamic(
                source,
                target,
                weight_type=QuantType.QInt8,
                per_channel=way.per_channel,
                nodes_to_exclude=_embeddings_and_head(onnx.load(source).graph) if way.kept else None,
            )
    except DecodeError as error:  # of a file on the way, which is written without a look at how that went
        raise OSError(errno.ENOSPC, "what was written cannot be read back, as on a full disk") from error


def _embeddings_and_head(graph: onnx.GraphProto) -> list[str]:
    """The names of the nodes that look up embeddings, and of those that multiply after the encoder's last layer."""
    last = max(k for k, node in enumerate(graph.node) if node.op_type == "LayerNormalization")
    return [
        node.name
        for k, node in enumerate(graph.node)
        if node.op_type == "Gather" or (k > last and node.op_type in ("MatMul", "Gemm"))
    ]
