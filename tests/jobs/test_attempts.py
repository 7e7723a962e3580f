"""Trying again: which targets, and whose failures go on to count."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any, cast

import pytest

from proxy.errors import Canceled, Many, Refused
from proxy.jobs.attempts import try_targets
from proxy.tasks import Task


class Log:
    """What a task hears of attempts."""

    cancel_requested = False

    def __init__(self) -> None:
        self.retries: list[tuple[dict[str, Any], set[object]]] = []

    def retry(self, message: str, data: dict[str, Any], *, kept: Container[object]) -> None:
        assert message == "again"
        self.retries.append((data, set(cast("set[object]", kept))))


async def attempts(
    *plan: set[str] | Exception, tries: int = 3, have: set[str] | None = None
) -> tuple[list[list[str]], Log]:
    """What each attempt was asked for, when each goes as ``plan`` says: who fails, or how."""
    log, asked = Log(), list[list[str]]()

    async def attempt(number: int, wanted: Mapping[str, None]) -> list[str]:
        asked.append(sorted(wanted))
        outcome = plan[number - 1]
        if isinstance(outcome, Exception):
            raise outcome
        return sorted(outcome)

    await try_targets(
        cast("Task", log),
        dict.fromkeys(("a+b", "c")),
        attempt,
        tries=tries,
        has=lambda target: target in (have or set()),
        message="again",
        export_ids=lambda target: target.split("+"),
    )
    return asked, log


async def test_only_what_failed_is_tried_again_and_the_rest_goes_on_to_count() -> None:
    asked, log = await attempts({"c"}, {"c"}, set())
    assert asked == [["a+b", "c"], ["c"], ["c"]]
    assert log.retries == [
        ({"attempt": 1, "error": "1 targets failed"}, {"a", "b"}),
        ({"attempt": 2, "error": "1 targets failed"}, {"a", "b"}),
    ]


async def test_an_attempt_of_which_nothing_came_is_made_again_for_who_has_nothing() -> None:
    asked, log = await attempts(Refused("no"), set(), have={"a+b"})
    assert asked == [["a+b", "c"], ["c"]]
    assert log.retries == [({"attempt": 1, "error": "no"}, {"a", "b"})]


async def test_the_last_error_is_raised_and_what_failed_beside_others_is_not() -> None:
    with pytest.raises(Refused, match="still no"):
        await attempts(Refused("no"), Refused("still no"), tries=2)
    assert (await attempts({"c"}, tries=1))[0] == [["a+b", "c"]]


async def test_trouble_after_every_backup_is_no_reason_for_another() -> None:
    with pytest.raises(Refused, match="afterwards"):
        await attempts(Refused("afterwards"), have={"a+b", "c"})


async def test_what_was_cancelled_is_not_tried_again() -> None:
    with pytest.raises(Canceled):
        await attempts(Canceled("stop"))


async def test_one_that_was_cancelled_while_another_failed_is_not_tried_again() -> None:
    failed = Many("all", [Canceled("stop"), Refused("no")])
    failed.canceled = frozenset({"a+b"})
    asked, log = await attempts(failed, set())
    assert asked == [["a+b", "c"], ["c"]]
    assert log.retries == [({"attempt": 1, "error": "all"}, {"a", "b"})]
    failed.canceled = frozenset({"a+b", "c"})
    with pytest.raises(Many):
        await attempts(failed)
