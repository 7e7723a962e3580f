"""Trying again: only what failed, at once, as often as the settings say."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from proxy.errors import Canceled, Many

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Mapping

    from proxy.tasks import Task

T = TypeVar("T")


async def try_targets(
    task: Task,
    wanted: Mapping[str, T],
    attempt: Callable[[int, Mapping[str, T]], Awaitable[list[str]]],
    *,
    tries: int,
    has: Callable[[str], bool],
    message: str,
    export_ids: Callable[[str], Collection[str]] = lambda target: (target,),
) -> None:
    """Make up to ``tries`` attempts at the targets ``wanted``, each at those that are missing.

    ``attempt`` gets its number, from 1, and the targets; it returns the ids of those that failed
    and are worth another attempt, or raises when nothing came of it; ``Many.canceled`` then names
    those that are not.  ``has`` says whether a target has its backup from the present attempt.
    Each new attempt is a retry in the log of ``task``, with ``message``; what it says of targets
    that are not tried again, whose tasks have the ids that ``export_ids`` tells, goes on to count.
    Raises what the last attempt raised; targets that failed beside others that did not speak for
    themselves in the log.
    """
    missing = dict(wanted)
    for number in range(1, tries + 1):
        error: Exception | None = None
        try:
            failed = await attempt(number, missing)
        except Canceled:
            raise
        except Exception as caught:  # noqa: BLE001  raised below when no attempt is left
            canceled = caught.canceled if isinstance(caught, Many) else frozenset[str]()
            failed = [one for one in missing if not has(one) and one not in canceled]
            error = caught
        if error is None and not failed:
            return
        done = bool(missing) and not failed  # and the trouble came afterwards
        if done or number == tries or task.cancel_requested:
            if error is not None:
                raise error
            return
        reason = str(error) if error is not None else f"{len(failed)} targets failed"
        kept = {each for key in wanted.keys() - set(failed) for each in export_ids(key)}
        task.retry(message, {"attempt": number, "error": reason}, kept=kept)
        missing = {one: missing[one] for one in failed}
