"""Files of a shared app: which visitor may read which, and how much each may upload.

Gradio keeps every upload and every file that it hands out in one folder, and gives each to whoever
knows its address.
"""

import posixpath
import re
import time
from collections import OrderedDict, deque
from typing import Any

from starlette.types import Message, Send

UPLOADED_SECONDS = 4_300  # until Gradio has deleted what was uploaded (`delete_cache`)
LEAST_COUNTED = 2**16  # bytes of an upload: what is remembered of very many is bounded too
MAX_UPLOADED_BY_ONE = 128 * 2**20  # bytes within that time
MAX_UPLOADED = 2 * 2**30  # of all together: visitors of a Space cost nothing
MAX_FILES = 20_000  # whose first readers are remembered
# In an answer; a text that a visitor wrote there has a backslash before its quotes.
NAMED = re.compile(rb'(?<!\\)"path":\s*"(/[^"\\]{1,400})"')
UPLOADED = re.compile(rb'(?<!\\)"(/[^"\\]{1,400})"')
TAIL = 1024  # bytes of an answer that the next piece is read with


class Files:
    """Who was told of which file of Gradio's cache, whose addresses come in answers only.

    A file that nobody was told of here (the page's own) is open to all.
    """

    def __init__(self) -> None:
        self.readers: OrderedDict[str, set[str]] = OrderedDict()

    def may_read(self, user: str | None, path: str) -> bool:
        readers = self.readers.get(posixpath.normpath("/" + path.lstrip("/")))
        return readers is None or user in readers

    def watch(self, send: Send, user: str, named: re.Pattern[bytes]) -> Send:
        """Return a `send` that notes the files which an answer names."""
        tail = b""

        async def send_watched(message: Message) -> None:
            nonlocal tail
            if message["type"] == "http.response.body":
                seen = tail + message.get("body", b"")
                tail = seen[-TAIL:]
                for found in named.findall(seen):
                    path = posixpath.normpath(found.decode("utf-8", "replace"))
                    self.readers.setdefault(path, set()).add(user)
                    self.readers.move_to_end(path)
                while len(self.readers) > MAX_FILES:
                    self.readers.popitem(last=False)
            await send(message)

        return send_watched


class Uploads:
    """What was uploaded lately, by whom: the folder that it lies in is everybody's."""

    def __init__(self) -> None:
        self.taken: deque[tuple[float, str, int]] = deque()

    def take(self, user: str, num_bytes: int) -> bool:
        """Count an upload in; False where it is more than this user, or all, may leave here."""
        now, num_bytes = time.monotonic(), max(num_bytes, LEAST_COUNTED)
        while self.taken and now - self.taken[0][0] > UPLOADED_SECONDS:
            self.taken.popleft()
        own = sum(size for _, name, size in self.taken if name == user)
        everything = sum(size for _, _, size in self.taken)
        if own + num_bytes > MAX_UPLOADED_BY_ONE or everything + num_bytes > MAX_UPLOADED:
            return False
        self.taken.append((now, user, num_bytes))
        return True


def named_files(flat: Any) -> set[str]:
    """Return every path that a request's values name, as Gradio names a file."""
    found, left = set(), [flat]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            if isinstance(value.get("path"), str):
                found.add(value["path"])
            left += value.values()
        elif isinstance(value, list):
            left += value
    return found
