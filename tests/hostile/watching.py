"""What was opened in a folder, by anybody and any library: told by the kernel (inotify)."""

import ctypes
import os
import struct
from pathlib import Path

IN_OPEN = 0x20
_LIBC = ctypes.CDLL(None, use_errno=True)


class OpenWatch:
    """Notes every file that is opened in a folder (not below it) while the watch lasts.

    An audit hook of Python would miss the libraries that open weights and tokenizers themselves.
    """

    def __init__(self, folder: Path) -> None:
        self.descriptor = _LIBC.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self.descriptor < 0 or (
            _LIBC.inotify_add_watch(self.descriptor, os.fsencode(folder), IN_OPEN) < 0
        ):
            raise OSError(ctypes.get_errno(), f"{folder} cannot be watched")

    def opened(self) -> list[str]:
        """Return the names opened since the last call; the folder itself is an empty name."""
        names = []
        while True:
            try:
                data = os.read(self.descriptor, 2**16)
            except BlockingIOError:
                return names
            at = 0
            while at < len(data):
                _, _, _, length = struct.unpack_from("iIII", data, at)
                names.append(data[at + 16 : at + 16 + length].rstrip(b"\0").decode())
                at += 16 + length

    def close(self) -> None:
        os.close(self.descriptor)
