"""From where a student of the teacher's architecture starts, one table. Nothing here imports torch: the command line
reads the names for --help."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Start:
    """`what` the start is, for --help; whether it takes the teacher's `embeddings`, and its chosen `layers` and head,
    all projected to the student's width. What is not taken is drawn by the seed."""

    what: str
    embeddings: bool = True
    layers: bool = True


STARTS = {
    "layers": Start("the teacher's embeddings, chosen layers and head"),
    "embeddings": Start("its embeddings; layers and head are new", layers=False),
    "random": Start("all weights are new", embeddings=False, layers=False),
}
