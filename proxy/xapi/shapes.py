"""Whether an answer of a host has the shape that it should have."""

from __future__ import annotations

from typing import Any, TypeGuard


def is_list(value: object) -> TypeGuard[list[Any]]:
    return isinstance(value, list)


def is_map(value: object) -> TypeGuard[dict[str, Any]]:
    """A JSON object: its names are strings."""
    return isinstance(value, dict)
