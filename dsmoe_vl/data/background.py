"""A thread that works ahead of its caller."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Generic, TypeVar

T = TypeVar("T")


class BackgroundThread(Generic[T]):
    """Calls functions one after another in a daemon thread.

    Unlike a ThreadPoolExecutor it does not keep the process from ending while a call hangs. One hangs for ever if it
    reads from a worker that the system killed in the middle of sending.
    """

    def __init__(self) -> None:
        self._calls: SimpleQueue[tuple[Future[T], Callable[[], T]] | None] = SimpleQueue()
        threading.Thread(target=self._run, name="background", daemon=True).start()

    def submit(self, function: Callable[[], T]) -> Future[T]:
        """Call `function` after those that were submitted before."""
        result: Future[T] = Future()
        self._calls.put((result, function))
        return result

    def close(self) -> None:
        """End the thread after the calls that were submitted. Does not wait for them."""
        self._calls.put(None)

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            result, function = call
            try:
                result.set_result(function())
            except BaseException as error:
                result.set_exception(error)
            del call, result, function  # else the thread would keep the last result in memory while it waits
