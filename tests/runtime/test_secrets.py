"""Secrets in free text, also those that overlap."""

from __future__ import annotations

import pytest

from proxy.runtime.secrets import remember, scrub_text


@pytest.mark.parametrize(
    ("known", "text", "hidden"),
    [
        (["tail-of-it", "head-tail-of-it"], "a head-tail-of-it b", "a *** b"),
        (["abcdef77", "ef77ghij"], "<abcdef77ghij>", "<***>"),
        (["twice-66"], "twice-66 and twice-66", "*** and ***"),
        (["kkkkkkk"], "kkkkkkkkk", "***"),
        (["never-here"], "nothing of it", "nothing of it"),
    ],
)
def test_no_part_of_a_secret_is_left(known: list[str], text: str, hidden: str) -> None:
    for secret in known:
        remember(secret)
    assert scrub_text(text) == hidden
