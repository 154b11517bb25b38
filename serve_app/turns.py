"""One generation at a time, off the event loop, for many clients that wait in line."""

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

from serve_app.errors import ApiError
from serve_app.text import Piece

_Item = Piece | Exception | None  # None ends a generation


class Turns:
    """A line of at most `waiting` requests in front of one worker thread, first come first served.

    `timeout` is in seconds per request, its wait in line included.
    """

    def __init__(self, waiting: int, timeout: float) -> None:
        self._most, self._timeout = waiting + 1, timeout
        self._present = 0
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="generate")

    async def stream(self, start: Callable[[], Generator[Piece]]) -> AsyncGenerator[Piece]:
        """The pieces of one generation as they are made.

        Closing or cancelling this, as a client's disconnect does, ends the generation within a token.

        Raises:
            ApiError: 429 when the line is full, 408 when the time is up.
        """
        if self._present >= self._most:
            raise ApiError("The server is busy and its queue is full; try again later.", 429, retry_after=5)
        items: asyncio.Queue[_Item] = asyncio.Queue()
        gone = threading.Event()
        self._present += 1
        job = self._worker.submit(_run, start, items, asyncio.get_running_loop(), gone)
        try:
            async for piece in self._until_the_end(items):
                yield piece
        finally:
            gone.set()
            job.cancel()
            self._present -= 1

    async def _until_the_end(self, items: "asyncio.Queue[_Item]") -> AsyncGenerator[Piece]:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._timeout
        while True:
            try:
                item = await asyncio.wait_for(items.get(), deadline - loop.time())
            except TimeoutError:
                raise ApiError(f"The request took longer than {self._timeout:g} seconds.", 408) from None
            if item is None:
                return
            if isinstance(item, Exception):
                raise item
            yield item


def _run(
    start: Callable[[], Generator[Piece]],
    items: "asyncio.Queue[_Item]",
    loop: asyncio.AbstractEventLoop,
    gone: threading.Event,
) -> None:
    end: _Item = None
    try:
        with closing(start()) as pieces:
            for piece in pieces:
                if gone.is_set():
                    return
                loop.call_soon_threadsafe(items.put_nowait, piece)
    except Exception as error:
        end = error
    loop.call_soon_threadsafe(items.put_nowait, end)
