"""The C library is told once, and a library without the switch is no error."""

from __future__ import annotations

import ctypes
from typing import Any
from unittest import mock

from proxy.runtime.allocator import share_heaps


def test_another_c_library_is_no_error() -> None:
    class Other:
        def __getattr__(self, name: str) -> Any:
            raise AttributeError(name)

    with mock.patch.object(ctypes, "CDLL", return_value=Other()):
        share_heaps()


def test_two_heaps_are_asked_for() -> None:
    library = mock.Mock()
    with mock.patch.object(ctypes, "CDLL", return_value=library):
        share_heaps()
    library.mallopt.assert_called_once_with(-8, 2)
