"""Texts of many requests, classified together: what makes a server of deploy/classify.py's `Classifier` fast."""

import asyncio
import contextlib
import itertools
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from deploy.classify import Texts

# A batch is chosen from so many times as many texts as it has.
_CHOICE = 8


class QueueFull(Exception):
    """More texts than may wait."""


@dataclass
class _Waiting:
    texts: Texts
    logits: asyncio.Future
    since: float

    @property
    def length(self) -> int:
        """In characters, near enough to tokens."""
        return sum(map(len, self.texts))


class Batcher:
    """Gathers texts into batches.

    classify: logits (texts, outputs) of a list of texts; it runs in a thread of its own, one batch at a time, while
    more texts gather. A batch is the text that has waited longest and those that are nearest to it in length, which
    need the least padding, of the first that wait. It has `max_batch` texts, or fewer if its first one has waited for
    `max_wait` seconds. At most `max_queue` texts wait. gathered: called with the size of each batch.
    """

    def __init__(
        self,
        classify: Callable[[list[Texts]], np.ndarray],
        max_batch: int,
        max_wait: float,
        max_queue: int,
        gathered: Callable[[int], None] = lambda size: None,
    ):
        self.classify, self.gathered = classify, gathered
        self.max_batch, self.max_wait, self.max_queue = max_batch, max_wait, max_queue
        self._queue: deque[_Waiting] = deque()
        self._news = asyncio.Event()
        self._closing = False

    def __len__(self) -> int:
        """How many texts wait."""
        return len(self._queue)

    async def logits(self, texts: list[Texts]) -> list[np.ndarray]:
        """Of each text, in their order. Raises QueueFull, and whatever `classify` raises."""
        if len(self._queue) + len(texts) > self.max_queue:
            raise QueueFull
        loop = asyncio.get_running_loop()
        own = [_Waiting(pair, loop.create_future(), loop.time()) for pair in texts]
        self._queue.extend(own)
        self._news.set()
        return await asyncio.gather(*(waiting.logits for waiting in own))

    async def run(self) -> None:
        """Classify batches until `close`, and then what waits."""
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(1) as thread:
            while await self._gather():
                batch = [waiting for waiting in self._take() if not waiting.logits.cancelled()]  # by who did not wait
                if not batch:
                    continue
                self.gathered(len(batch))
                try:
                    found = await loop.run_in_executor(thread, self.classify, [waiting.texts for waiting in batch])
                except Exception as error:  # theirs, and not of the batches to come
                    found = [error] * len(batch)
                for waiting, logits in zip(batch, found, strict=True):
                    _answer(waiting.logits, logits)

    async def _gather(self) -> bool:
        """Wait for a batch. Returns whether there is one; there is none once all is closed."""
        # News are forgotten before a look at what there is, and not after it.
        while not self._queue and not self._closing:
            self._news.clear()
            await self._news.wait()
        while self._queue and len(self._queue) < self.max_batch and not self._closing:
            left = self._queue[0].since + self.max_wait - asyncio.get_running_loop().time()
            if left <= 0:
                break
            self._news.clear()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._news.wait(), left)
        return bool(self._queue)

    def _take(self) -> list[_Waiting]:
        """A batch out of the queue."""
        first, *others = itertools.islice(self._queue, _CHOICE * self.max_batch)
        others.sort(key=lambda waiting: abs(waiting.length - first.length))
        batch = [first, *others[: self.max_batch - 1]]
        taken = set(map(id, batch))
        self._queue = deque(waiting for waiting in self._queue if id(waiting) not in taken)
        return batch

    def close(self) -> None:
        """Let `run` end when nothing waits any more."""
        self._closing = True
        self._news.set()


def _answer(future: asyncio.Future, found: np.ndarray | Exception) -> None:
    if future.done():  # cancelled meanwhile
        return
    if isinstance(found, Exception):
        future.set_exception(found)
    else:
        future.set_result(found)
