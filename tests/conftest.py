"""What every test folder shares."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest
import trio
import trio.testing

from tests.azurite import Azurite, running_azurite

if TYPE_CHECKING:
    from collections.abc import Iterator

# How long an example takes is the machine's affair, which others may be using.
hypothesis.settings.register_profile("house", deadline=None)
hypothesis.settings.load_profile("house")


def _on_virtual_clock(function: Any, *args: Any, **options: Any) -> Any:
    options["clock"] = trio.testing.MockClock(autojump_threshold=0)
    return trio.run(function, *args, **options)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """``virtual_clock`` runs a test's Trio loop on a clock that jumps over idle time.

    Such a test uses no real thread and no socket: Trio would see the wait as idleness.
    """
    for item in items:
        function = getattr(item, "obj", None)
        if item.get_closest_marker("virtual_clock") and inspect.iscoroutinefunction(function):
            item.add_marker(pytest.mark.trio(run=_on_virtual_clock), append=False)


@pytest.fixture(scope="session")
def azurite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Azurite]:
    """One emulator for all tests: each takes a container or a directory of its own."""
    with running_azurite(tmp_path_factory.mktemp("azurite")) as emulator:
        yield emulator
