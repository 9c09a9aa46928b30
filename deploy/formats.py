"""What exports are written as, and the ways to int8 weights. Light, to be read before anything heavy is imported."""

from dataclasses import dataclass

from deploy.classify import FLOAT, OPENVINO


@dataclass(frozen=True)
class Quantization:
    """A way to int8 weights. `what` it is; per_channel: a scale for each output of a matrix, and not for all; kept: the
    embeddings and the head stay in float."""

    what: str
    per_channel: bool = False
    kept: bool = False


# From the smallest and fastest on.
QUANTIZATIONS = (
    Quantization("one scale for each matrix"),
    Quantization("a scale for each channel", per_channel=True),
    Quantization("a scale for each channel, embeddings and head in float", per_channel=True, kept=True),
)


@dataclass(frozen=True)
class Format:
    """What it is `called`. folder: of an export, beside the model. file: the graph in float32. packages: what writing
    it takes, and where they are pinned. quantizations: the ways to int8, none where there is no such model."""

    called: str
    folder: str
    file: str
    packages: tuple[str, ...]
    requirements: str
    quantizations: tuple[Quantization, ...] = ()


_ONNX = ("onnx", "onnxscript", "onnxruntime")
FORMATS = {
    "onnx": Format("ONNX", "onnx", FLOAT, _ONNX, "requirements-deploy.txt", QUANTIZATIONS),
    "openvino": Format("OpenVINO", "openvino", OPENVINO, (*_ONNX, "openvino"), "requirements-openvino.txt"),
}
