"""Batches of examples of similar length, which waste little on padding."""

from collections.abc import Callable

import numpy as np
import torch
from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset
from torch.utils.data import BatchSampler, DataLoader, Sampler
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase
from transformers.trainer_pt_utils import LengthGroupedSampler


class LengthGroupedBatches(LengthGroupedSampler):
    """Random batches of examples of similar length, the same in epoch k whether or not the run was interrupted.

    `epoch()` says which epoch begins; wrappers around a sampler do not reliably pass that on.
    """

    def __init__(self, batch_size: int, dataset: Dataset, seed: int, epoch: Callable[[], int]):
        super().__init__(batch_size, lengths=_lengths(dataset), generator=torch.Generator())
        self._seed, self._epoch = seed, epoch

    def __iter__(self):
        self.generator.manual_seed(self._seed + self._epoch())
        return super().__iter__()


class Shuffled(Sampler):
    """So many rows in a random order, another one in each epoch; in epoch k the same whether or not the run was
    interrupted. It takes 8 bytes of memory a row; `epoch()` as in `LengthGroupedBatches`."""

    def __init__(self, rows: int, seed: int, epoch: Callable[[], int]):
        self._rows, self._seed, self._epoch = rows, seed, epoch

    def __iter__(self):
        return map(int, np.random.default_rng((self._seed, self._epoch())).permutation(self._rows))

    def __len__(self) -> int:
        return self._rows


class SharedBatches(BatchSampler):
    """The batches of a single process, each cut into one part for every process: accelerate deals the parts out.

    accelerate by itself fills an epoch's last batches up with rows of its first. Here they have what is left, and some
    processes a row less than others; a row is given twice only where fewer are left than there are processes.
    """

    def __init__(self, sampler: Sampler, batch_size: int, drop_last: bool, processes: int):
        super().__init__(sampler, batch_size * processes, drop_last)
        self._processes = processes

    def __iter__(self):
        for batch in super().__iter__():
            rows = np.resize(batch, max(len(batch), self._processes))
            yield from (part.tolist() for part in np.array_split(rows, self._processes))

    def __len__(self) -> int:
        return super().__len__() * self._processes


def share_batches(loader: DataLoader) -> None:
    """Let a training loader that accelerate prepared for several processes deal out `SharedBatches`."""
    shard = loader.batch_sampler
    if isinstance(shard, BatchSamplerShard) and not shard.split_batches:
        whole, shard.even_batches = shard.batch_sampler, False
        shard.batch_sampler = SharedBatches(whole.sampler, whole.batch_size, whole.drop_last, shard.num_processes)


def longest_first(dataset: Dataset) -> list[int]:
    """The examples' numbers, from the longest to the shortest."""
    lengths = _lengths(dataset)
    return sorted(range(len(lengths)), key=lambda k: -lengths[k])


def batches_longest_first(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> DataLoader:
    """All examples in padded batches, in the order of `longest_first`."""
    return DataLoader(dataset.select(longest_first(dataset)), batch_size, collate_fn=DataCollatorWithPadding(tokenizer))


def _lengths(dataset: Dataset) -> list[int]:
    return [len(ids) for ids in dataset["input_ids"]]
