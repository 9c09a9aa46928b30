"""From where a student of the teacher's architecture starts, one table. Nothing here imports torch: the command line
reads the names for --help."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Start:
    """`what` the start is, for --help; whether it takes the teacher's `embeddings`, and its chosen `layers` and head.
    Weights that are not taken are drawn by the seed."""

    what: str
    embeddings: bool = True
    layers: bool = True


STARTS = {
    "layers": Start("the teacher's embeddings, chosen layers and head"),
    "embeddings": Start("the teacher's embeddings, new layers", layers=False),
    "random": Start("new weights", embeddings=False, layers=False),
}


@dataclass(frozen=True)
class Shape:
    """Hidden width, feed-forward width and attention heads of a student; what is None follows the teacher."""

    width: int | None = None
    ffn: int | None = None
    heads: int | None = None
