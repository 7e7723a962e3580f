"""The methods, a file per namespace (``backup`` has three), in the order of their listing."""

from __future__ import annotations

from proxy.rpc.methods import (
    appliance,
    authentication,
    backup,
    event,
    metadata_backup,
    remote,
    sweep,
    system,
    task,
    test,
)
from proxy.rpc.registry import Registry


def standard(*more: Registry) -> Registry:
    """Every method of this room, and ``more``."""
    registry = Registry()
    for module in (
        system,
        test,
        appliance,
        authentication,
        backup,
        metadata_backup,
        sweep,
        remote,
        event,
        task,
    ):
        registry.include(module.methods)
    for methods in more:
        registry.include(methods)
    return registry
