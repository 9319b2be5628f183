"""Keep the memory of batches on the CPU for the next ones."""

from __future__ import annotations

import ctypes
import functools


@functools.cache
def keep_freed_memory() -> None:
    """Let malloc keep freed memory: otherwise batches of tens of MB go back to the system and return as new pages, which took
    an eighth of all CPU time. It affects the whole process. Only the CPU needs it: for a GPU, DALI has memory pools.
    """
    libc = ctypes.CDLL(None)
    m_trim_threshold, m_mmap_max, m_arena_max = -1, -4, -8  # <malloc.h>
    libc.mallopt(m_mmap_max, 0)
    libc.mallopt(m_trim_threshold, 2**31 - 1)
    libc.mallopt(m_arena_max, 1)  # per-thread arenas cannot hold blocks of more than 64 MB
