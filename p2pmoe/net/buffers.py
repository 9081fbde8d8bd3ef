"""Memory for payloads that come in."""

from __future__ import annotations

import mmap
from contextlib import suppress

HUGE_PAGE = 2 * 1024 * 1024  # bytes, of x86-64 and of ARM with pages of 4 KiB


def allocate(size: int) -> memoryview:
    """A writable buffer that takes memory only as it is filled; aligned to a page.

    A long one is filled by huge pages where there are any: a seventh of the time.
    """
    huge = size >= HUGE_PAGE // 2 and hasattr(mmap, "MADV_HUGEPAGE")
    room = -(-size // HUGE_PAGE) * HUGE_PAGE if huge else size
    memory = mmap.mmap(-1, room, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if huge:
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)[:size]
