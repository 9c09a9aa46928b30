"""What stands in for drawing, where a test is not about pictures: it takes longer than a small run trains."""

import struct
import zlib
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from bert_emd import pictures
from bert_finetune.files import replacing_file


def _chunk(kind: bytes, content: bytes) -> bytes:
    checked = kind + content
    return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))


PNG = b"\x89PNG\r\n\x1a\n" + b"".join(
    [
        _chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 6, 0, 0, 0)),  # one pixel of red, green, blue and opacity
        _chunk(b"IDAT", zlib.compress(bytes([0, 255, 255, 255, 255]))),
        _chunk(b"IEND", b""),
    ]
)
SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="1" height="1"/>\n'


def save_blank(figure: Figure, path: str | Path) -> Figure:
    """`bert_emd.pictures.save_picture`, but one white pixel is all that the files show."""
    for kind, content in (("png", PNG), ("svg", SVG)):
        with replacing_file(f"{path}.{kind}") as aside:
            aside.write_bytes(content)
    return figure


def draw_blank(run: Path, path: Path) -> Figure:
    """`draw_flow` and its like, of `bert_emd.pictures`."""
    return pictures.save_picture(Figure(), path)


def draw_blank_weights(run: Path, path: Path) -> Figure | None:
    """`bert_emd.pictures.draw_layer_weights`: nothing for a run without cost attention."""
    with np.load(run / "flows.npz") as arrays:
        return draw_blank(run, path) if any(name.endswith("_weights") for name in arrays) else None
