"""What processes that torchrun or accelerate launched together share."""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

_T = TypeVar("_T")


def is_main_process() -> bool:
    """Whether this process prints: always, unless several were launched together."""
    return int(os.environ.get("RANK", 0)) == 0


def mean_over_processes(values: "torch.Tensor") -> "torch.Tensor":
    """The mean of a tensor over all processes of a distributed run; the tensor itself in a single process."""
    import torch

    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return values
    values = values.clone()
    torch.distributed.all_reduce(values)
    return values / torch.distributed.get_world_size()


def found_by_first(find: Callable[[], _T]) -> _T:
    """What the first of several processes finds, for all of them; the others wait for it."""
    import torch

    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return find()
    found = [find() if is_main_process() else None]
    torch.distributed.broadcast_object_list(found)
    return found[0]


def leave_group() -> None:
    """Close the connections to the other processes at the end of a run: a process that ends with their threads running
    may be aborted."""
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def share_of_step(rows: "torch.Tensor") -> "torch.Tensor":
    """Rows of this process's batch against the mean over processes, a scalar; 1 in a single process.

    A batch's mean times its share has, as its mean over processes, the mean over all rows of the step: in an epoch's
    last step some processes have a row more than others.
    """
    import torch

    count = torch.tensor(float(len(rows)), device=rows.device)
    return count / mean_over_processes(count)
