"""Which of several processes, launched together by torchrun or accelerate, this one is."""

import os


def is_main_process() -> bool:
    """Whether this process prints: always, unless several were launched together."""
    return int(os.environ.get("RANK", 0)) == 0
