"""The C library is told once, and a library without the switch is no error."""

from __future__ import annotations

import ctypes
from typing import Any
from unittest import mock

from proxy.runtime.allocator import set_up_heaps


def test_another_c_library_is_no_error() -> None:
    class Other:
        def __getattr__(self, name: str) -> Any:
            raise AttributeError(name)

    with mock.patch.object(ctypes, "CDLL", return_value=Other()):
        set_up_heaps()


def test_two_heaps_that_keep_some_blocks_are_asked_for() -> None:
    library = mock.Mock()
    with mock.patch.object(ctypes, "CDLL", return_value=library):
        set_up_heaps()
    m_arena_max, m_mmap_threshold, m_trim_threshold = -8, -3, -1  # of glibc's malloc.h
    assert dict(call.args for call in library.mallopt.call_args_list) == {
        m_arena_max: 2,
        m_mmap_threshold: 32 * 1024 * 1024,
        m_trim_threshold: 16 * 1024 * 1024,
    }
