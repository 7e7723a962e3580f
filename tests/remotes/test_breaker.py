from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import Unreachable
from proxy.remotes.breaker import Breaker, Circuit

DOWN = Unreachable("EIO: down", code="EIO")
HOSTLESS = Unreachable("EHOSTUNREACH: no way", code="EHOSTUNREACH")


def breaker() -> Breaker:
    return Breaker("nfs://h:/p", failures=3, pause=5, longest_pause=20)


def opened_at(now: float) -> Breaker:
    found = breaker()
    for _ in range(3):
        assert found.admit(now)
        found.failed(HOSTLESS, now)
    return found


def test_failures_in_a_row_open_it_and_it_says_why() -> None:
    found = opened_at(100)
    with pytest.raises(Unreachable) as caught:
        found.admit(102)
    assert caught.value.code == "EHOSTUNREACH"
    assert caught.value.message.startswith("nfs://h:/p does not answer since 20")
    assert "EHOSTUNREACH: no way; it is asked again in 3 s" in caught.value.message
    assert caught.value.data["retryIn"] == 3


def test_a_code_that_xen_orchestra_does_not_know_becomes_a_timeout() -> None:
    found = breaker()
    found.hangs(DOWN, 0)
    assert found.refusal(0).code == "ETIMEDOUT"


def test_an_answer_between_failures_keeps_it_closed() -> None:
    found = breaker()
    for _ in range(10):
        found.failed(DOWN, 0)
        found.failed(DOWN, 0)
        found.succeeded()
    assert found.circuit is Circuit.CLOSED
    assert found.outage is None


def test_one_caller_asks_after_the_pause() -> None:
    found = opened_at(100)
    assert not found.admit(105)
    with pytest.raises(Unreachable):
        found.admit(105)
    found.probed(None, 106)
    assert found.admit(106)
    assert found.outage is None


def test_pauses_grow_up_to_their_bound_and_start_anew() -> None:
    found = opened_at(0)
    now = 0.0
    pauses: list[float] = []
    for _ in range(4):
        start = now
        while True:
            try:
                assert not found.admit(now)
            except Unreachable:
                now += 1
            else:
                break
        pauses.append(now - start)
        found.probed(DOWN, now)
    assert pauses == [5, 10, 20, 20]
    assert not found.admit(now + 20)
    found.probed(None, now)
    found.hangs(DOWN, now)
    assert not found.admit(now + 5)


def test_a_cancelled_question_is_asked_by_the_next() -> None:
    found = opened_at(0)
    assert not found.admit(5)
    found.give_up_probe()
    assert not found.admit(5)


def test_what_ends_late_does_not_close_it() -> None:
    found = opened_at(0)
    found.succeeded()
    with pytest.raises(Unreachable):
        found.admit(1)


@given(st.lists(st.sampled_from(["fail", "hang", "succeed", "ask", "wait", "give up"])))
def test_only_a_good_answer_to_a_question_closes_it(events: list[str]) -> None:
    found, now = breaker(), 0.0
    for event in events:
        before = found.circuit
        if event == "fail":
            found.failed(DOWN, now)
        elif event == "hang":
            found.hangs(DOWN, now)
        elif event == "succeed":
            found.succeeded()
        elif event == "give up":
            found.give_up_probe()
        elif event == "ask":
            found.probed(DOWN, now)
        else:
            now += 30
        if before is not Circuit.CLOSED:
            assert found.circuit is not Circuit.CLOSED
            assert found.outage is not None
