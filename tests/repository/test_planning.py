"""The plan for a VDI directory, on values alone."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.disks.merge_state import CUT, MergeState, Phase, Step
from proxy.errors import Corrupt, Unreachable
from proxy.repository.chains import Lineage, StoredDisk, is_temporary
from proxy.repository.planning import Interrupted, Plan, plan

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

DIR = "xo-vm-backups/vm/vdis/job/vdi"


def p(name: str) -> str:
    return f"{DIR}/{name}"


def uuid(name: str) -> UUID:
    return UUID(bytes=name.encode().ljust(16, b"\0")[:16])


def disk(name: str, parent: str | None = None, *, alias: bool = False, **more: Any) -> StoredDisk:
    return StoredDisk(
        path=p(f"{name}.alias.vhd" if alias else f"{name}.vhd"),
        uuid=more.get("own", uuid(name)),
        parent_uuid=UUID(int=0) if parent is None else more.get("base", uuid(parent)),
        parent=None if parent is None else p(f"{parent}.alias.vhd" if alias else f"{parent}.vhd"),
        target=p(f"data/{more.get('data', name)}.vhd") if alias else None,
    )


def lineage(*disks: StoredDisk, **more: Any) -> Lineage:
    aliases = {each.path: each.target for each in disks if each.target is not None}
    return Lineage(
        directory=DIR,
        disks={each.path: each for each in disks},
        **{"aliases": aliases, "data": tuple(aliases.values()), **more},
    )


CHAIN = (disk("a"), disk("b", "a"), disk("c", "b"), disk("d", "c"))


def messages(result: Plan) -> list[str]:
    return [message for message, _ in result.warnings]


def test_nothing_to_do() -> None:
    assert plan(lineage(*CHAIN), [p("a.vhd"), p("b.vhd"), p("c.vhd"), p("d.vhd")]) == Plan()
    assert plan(lineage(), []) == Plan()


def test_consecutive_orphans_merge_in_one_pass() -> None:
    assert plan(lineage(*CHAIN), [p("c.vhd"), p("d.vhd")]).merge == (
        (p("a.vhd"), p("b.vhd"), p("c.vhd")),
    )
    result = plan(lineage(*CHAIN, disk("e", "d")), [p("b.vhd"), p("e.vhd")])
    assert result.merge == ((p("a.vhd"), p("b.vhd")), (p("c.vhd"), p("d.vhd"), p("e.vhd")))
    assert result.delete == ()


def test_what_nobody_needs_goes_children_first() -> None:
    result = plan(lineage(*CHAIN), [p("b.vhd")])
    assert result.delete == (p("d.vhd"), p("c.vhd"))
    assert result.merge == ((p("a.vhd"), p("b.vhd")),)
    assert plan(lineage(*CHAIN), []).delete == tuple(p(f"{name}.vhd") for name in "dcba")


def test_metadata_that_cannot_be_read_protects_everything() -> None:
    """Upstream removes such metadata, then its disks (remote-layout, weakness 3)."""
    assert plan(lineage(*CHAIN), [p("d.vhd")], protected=True) == Plan()


@pytest.mark.parametrize("error", [Corrupt("cut"), Unreachable("EIO")])
@pytest.mark.parametrize("broken", "abcd")
def test_a_disk_that_cannot_be_read_keeps_what_it_may_stand_on(broken: str, error: Any) -> None:
    """Upstream removes after any error of opening (remote-layout, weakness 4)."""
    disks = [each for each in CHAIN if each.path != p(f"{broken}.vhd")]
    result = plan(lineage(*disks, unreadable={p(f"{broken}.vhd"): error}), [p("d.vhd")])
    assert (result.delete, result.merge, result.data) == ((), (), ())
    assert messages(result)[0] == "failed to open disk"
    child = chr(ord(broken) + 1)
    assert broken == "d" or result.warnings[1] == (
        "disk broken: parent missing or broken",
        {"child": p(f"{child}.vhd"), "parent": p(f"{broken}.vhd")},
    )


def test_a_missing_parent_or_disk_keeps_everything() -> None:
    result = plan(lineage(CHAIN[0], CHAIN[2], CHAIN[3]), [p("d.vhd")])
    assert (result.delete, result.merge) == ((), ())
    assert result.warnings == (
        ("parent disk is missing", {"child": p("c.vhd"), "parent": p("b.vhd")}),
    )
    result = plan(lineage(*CHAIN), [p("e.vhd")])
    assert (result.delete, result.merge) == ((), ())


def test_a_parent_elsewhere_or_a_loop_keeps_everything() -> None:
    away = replace(disk("b", "a"), parent="xo-vm-backups/other/x.vhd")
    assert plan(lineage(disk("a"), away), [p("b.vhd")]).delete == ()
    loop = lineage(disk("a", "b"), disk("b", "a"), disk("c", "b"))
    assert plan(loop, [p("c.vhd")]).delete == ()


def test_unreadable_disks_nobody_needs_stay_and_hinder_nobody() -> None:
    result = plan(lineage(*CHAIN[:2], unreadable={p("x.vhd"): Corrupt("cut")}), [p("b.vhd")])
    assert result.merge == ((p("a.vhd"), p("b.vhd")),)
    assert result.delete == ()


def test_the_base_of_two_is_merged_into_neither() -> None:
    """Upstream goes on with the first child and loses the second."""
    forked = lineage(disk("a"), disk("b", "a"), disk("c", "a"))
    result = plan(forked, [p("b.vhd"), p("c.vhd")])
    assert (result.delete, result.merge) == ((), ())
    assert plan(forked, [p("c.vhd")]) == Plan(
        delete=(p("b.vhd"),), merge=((p("a.vhd"), p("c.vhd")),)
    )


def test_a_link_by_name_without_the_uuid_is_not_merged() -> None:
    odd = lineage(disk("a"), disk("b", "a", base=uuid("z")))
    result = plan(odd, [p("b.vhd")])
    assert (result.delete, result.merge) == ((), ())
    assert messages(result) == ["disk broken: parent missing or broken"]


def test_duplicates_are_told() -> None:
    result = plan(lineage(disk("a"), disk("b", own=uuid("a"))), [p("a.vhd"), p("b.vhd")])
    assert result.warnings == (
        (
            "duplicate disk UUID detected",
            {"uuid": str(uuid("a")), "path1": p("a.vhd"), "path2": p("b.vhd")},
        ),
    )


ALIASES = (disk("a", alias=True), disk("b", "a", alias=True), disk("c", "b", alias=True))
A, B, C = (each.path for each in ALIASES)


def test_data_without_alias_goes() -> None:
    data = (*(each.target or "" for each in ALIASES), p("data/x.vhd"), p("data/notes"))
    result = plan(lineage(*ALIASES, data=data), [A, B, C])
    assert result == Plan(data=(p("data/x.vhd"),))
    assert plan(lineage(*ALIASES, data=data), [A, B, C], elsewhere=[p("data/x.vhd/y")]) == Plan()
    assert plan(lineage(*ALIASES, data=None), [A, B, C]) == Plan()


@pytest.mark.parametrize("text", ["", ".", "data", "data/c.vhd", "../vdi/data/c.vhd/blocks"])
def test_an_alias_that_claims_too_much_takes_nothing_with_it(text: str) -> None:
    """Upstream removes what such an alias means, the whole directory (weakness 22)."""
    target = p(text) if text not in ("", ".") else DIR
    target = target.replace("../vdi/", "")
    odd = p("x.alias.vhd")
    look = lineage(
        *ALIASES,
        unreadable={odd: Corrupt("names nothing")},
        aliases={**{each.path: each.target for each in ALIASES}, odd: target},
    )
    result = plan(look, [C])
    assert odd not in result.delete
    assert result.merge == ()
    assert not look.owns(odd)
    assert not look.owns(C)
    assert result.data == ()


def test_aliases_of_nothing_go_alone() -> None:
    look = lineage(*ALIASES[:2], dangling={C: p("data/c.vhd")})
    assert plan(look, [B]).delete == (C,)
    result = plan(look, [C])
    assert (result.delete, result.merge) == ((), ())
    assert messages(result) == ["missing target of alias"]


@pytest.mark.parametrize("alias_first", [False, True])
def test_a_file_and_an_alias_are_not_merged_and_the_log_says_so(alias_first: bool) -> None:
    """Upstream loses both chains: it renames an alias to a disk's name, or makes an alias of
    the file and then removes the file."""
    oldest, newest = disk("a", alias=alias_first), disk("b", alias=not alias_first)
    newest = replace(newest, parent=oldest.path, parent_uuid=uuid("a"))
    result = plan(lineage(oldest, newest), [newest.path])
    assert (result.merge, result.delete) == ((), ())
    [(message, data)] = result.warnings
    assert "cannot be merged" in message
    assert "full backup" in message
    assert data == {"oldest": oldest.path, "newest": newest.path}
    gone = plan(lineage(oldest, newest), [])  # the chain has aged out
    assert gone.delete == (newest.path, oldest.path)
    between = replace(disk("c", alias=alias_first), parent=newest.path, parent_uuid=uuid("b"))
    [chain] = plan(lineage(oldest, newest, between), [between.path]).merge
    assert len(chain) == 3, "in between any kind is fine"


def state(*names: str, step: Step = Step.BLOCKS, **more: Any) -> dict[str, MergeState]:
    return {
        p(names[0]): MergeState(
            chain=names, step=step, parent_uuid=uuid(names[0][0]), child_uuid=uuid(names[-1][0]),
            **more,
        )
    }  # fmt: skip


ABC = state("a.alias.vhd", "b.alias.vhd", "c.alias.vhd")
DONE = state("a.alias.vhd", "b.alias.vhd", "c.alias.vhd", step=Step.CLEANUP)
MERGED = replace(ALIASES[0], uuid=uuid("c"))


def only(states: Mapping[str, MergeState]) -> MergeState:
    (found,) = states.values()
    return found


@pytest.mark.parametrize(
    ("disks", "states", "phase"),
    [
        (ALIASES, ABC, Phase.BLOCKS),
        ((MERGED, *ALIASES[1:]), ABC, Phase.BLOCKS),
        ((MERGED, *ALIASES[1:]), DONE, Phase.RENAME),
        (ALIASES, DONE, Phase.BLOCKS),  # the state came through a crash, the footer did not
        ((MERGED, ALIASES[2]), DONE, Phase.RENAME),
        ((MERGED,), DONE, Phase.RENAME),
        ((MERGED,), ABC, Phase.RENAME),
        ((MERGED, replace(MERGED, path=C)), DONE, Phase.RENAME),
        ((ALIASES[1], replace(MERGED, path=C)), DONE, Phase.REST),
        ((replace(MERGED, path=C),), DONE, Phase.REST),
    ],
)
def test_an_interrupted_merge_goes_on_where_the_disks_are(
    disks: Collection[StoredDisk], states: Mapping[str, MergeState], phase: Phase
) -> None:
    """Children removed before the parent is renamed lose the chain upstream (weakness 1);
    two aliases of one directory stop it (vhd, weakness 2)."""
    result = plan(lineage(*disks, states=states), [C])
    assert result.resume == (Interrupted((A, B, C), only(states), phase),)
    assert (result.delete, result.merge, result.forget, result.data) == ((), (), (), ())


@pytest.mark.parametrize(
    ("disks", "states"),
    [
        (ALIASES[1:], ABC),  # the oldest disk is lost, and what was moved into it
        ((ALIASES[0], ALIASES[2]), ABC),
        ((ALIASES[0], ALIASES[2]), DONE),
        ((ALIASES[0],), DONE),
        ((ALIASES[0], disk("b", alias=True), ALIASES[2]), ABC),
    ],
)
def test_a_state_that_the_disks_contradict_freezes_the_directory(
    disks: Collection[StoredDisk], states: Mapping[str, MergeState]
) -> None:
    result = plan(lineage(*disks, states=states), [C])
    assert replace(result, warnings=()) == Plan()
    assert "orphan merge state" in messages(result)


def test_a_merge_over_a_disk_that_a_backup_names_is_not_finished() -> None:
    result = plan(lineage(*ALIASES, states=ABC), [A, C])
    assert replace(result, warnings=()) == Plan()


def test_unreadable_states_freeze_the_directory() -> None:
    result = plan(
        lineage(*CHAIN, bad_states={p(".a.vhd.merge.json"): Corrupt("cut")}), [p("d.vhd")]
    )
    assert replace(result, warnings=()) == Plan()
    assert messages(result) == ["Issue loading .a.vhd.merge.json"]


def cut(name: str) -> dict[str, Corrupt]:
    return {p(f".{name}.merge.json"): Corrupt("cut", data={"what": CUT})}


def test_a_state_that_a_crash_cut_is_a_merge_to_do_again() -> None:
    """Xen Orchestra writes it in place.  Before, nothing was ever merged there any more."""
    for number, footer in enumerate(("a", "c", "d")):
        first = replace(CHAIN[0], uuid=uuid(footer))  # the footer of what was merged into it
        disks = (first, *CHAIN[1:], disk("e", "d"))
        result = plan(lineage(*disks, bad_states=cut("a.vhd")), [p("d.vhd"), p("e.vhd")])
        [interrupted] = result.resume
        assert interrupted.chain == tuple(p(f"{name}.vhd") for name in "abcd"), number
        assert interrupted.phase is Phase.BLOCKS
        assert interrupted.state.parent_uuid == uuid("a")
        assert interrupted.state.child_uuid == uuid("d")
        assert (result.delete, result.merge, result.data) == ((), (), ())


@pytest.mark.parametrize(
    ("disks", "active", "more"),
    [
        (CHAIN[1:], "d", {}),
        (CHAIN, "ad", {}),
        (CHAIN, "", {}),
        ((*CHAIN, disk("e", "b")), "de", {}),
        (CHAIN, "d", {"unreadable": {p("x.vhd"): Corrupt("header")}}),
        ((*CHAIN[:2], disk("c", "b", base=uuid("x")), CHAIN[3]), "d", {}),
        ((replace(CHAIN[0], uuid=uuid("x")), *CHAIN[1:]), "d", {}),
    ],
    ids=["gone", "named", "no target", "fork", "unreadable", "broken link", "foreign"],
)
def test_a_cut_state_freezes_what_cannot_be_told(
    disks: tuple[StoredDisk, ...], active: str, more: dict[str, Any]
) -> None:
    found = lineage(*disks, bad_states=cut("a.vhd"), **more)
    result = plan(found, [p(f"{name}.vhd") for name in active])
    assert replace(result, warnings=()) == Plan()
    assert "Issue loading .a.vhd.merge.json" in messages(result)


def test_a_state_without_its_disks_goes() -> None:
    states = state("x.vhd", "y.vhd")
    result = plan(lineage(*CHAIN, states=states), list(lineage(*CHAIN).disks))
    assert result.forget == (p(".x.vhd.merge.json"),)
    assert result.warnings == (("orphan merge state", {"path": p(".x.vhd.merge.json")}),)


@pytest.mark.parametrize("by", ["uuid", "link"])
def test_very_old_states_name_no_chain(by: str) -> None:
    child = uuid("c") if by == "uuid" else None
    states = {p("b.vhd"): MergeState(chain=None, child_uuid=child)}
    result = plan(lineage(*CHAIN, states=states), [p("a.vhd"), p("c.vhd"), p("d.vhd")])
    assert result.resume == (Interrupted((p("b.vhd"), p("c.vhd")), only(states), Phase.BLOCKS),)
    states = {p("b.vhd"): MergeState(chain=None, step=Step.CLEANUP)}
    merged = replace(CHAIN[1], uuid=uuid("c"))
    result = plan(
        lineage(CHAIN[0], merged, CHAIN[2], CHAIN[3], states=states),
        [p("a.vhd"), p("c.vhd"), p("d.vhd")],
    )
    assert result.resume[0].phase is Phase.RENAME


def test_other_chains_of_the_directory_are_planned_beside_an_open_merge() -> None:
    look = lineage(*CHAIN, disk("x"), disk("y", "x"), states=state("a.vhd", "b.vhd"))
    result = plan(look, [p("b.vhd"), p("y.vhd")])
    assert result.resume[0].chain == (p("a.vhd"), p("b.vhd"))
    assert result.delete == (p("d.vhd"), p("c.vhd"))
    assert result.merge == ((p("x.vhd"), p("y.vhd")),)


def test_unfinished_files_are_no_disks() -> None:
    """Upstream takes a leftover `.<ms>.<TS>.vhd` for a disk and destroys its parent."""
    for name in (
        ".1795485541901.20261124T015901Z.vhd",
        ".1795485541901.20261124T015901Z.vhd.tmp",
        ".1795485541901.20261124T015901Z.alias.vhd.tmp",
        ".1795485541901..20261124T015901Z.vhd.merge.json.tmp",
    ):
        assert is_temporary(name)
    for name in (".x.vhd", "20261124T015901Z.vhd", ".20261124T015901Z.vhd.merge.json"):
        assert not is_temporary(name)


@st.composite
def looks(draw: st.DrawFn) -> tuple[Lineage, frozenset[str]]:
    """A directory with any links, of which some disks are unreadable, dangling or missing."""
    count = draw(st.integers(1, 8))
    names = [f"{chr(97 + index)}.alias.vhd" for index in range(count)]
    disks: list[StoredDisk] = []
    for index, name in enumerate(names):
        parent = draw(st.none() | st.integers(0, count - 1))
        # mostly older ones, as it should be; sometimes anything, loops included
        if parent is not None and parent >= index and draw(st.integers(0, 9)):
            parent = index - 1 if index else None
        base = names[parent] if parent is not None else None
        disks.append(
            StoredDisk(
                path=p(name),
                uuid=uuid(name),
                parent_uuid=uuid(base) if base else UUID(int=0),
                parent=p(base) if base else None,
                target=p(f"data/{draw(st.sampled_from([name[0], name[0], name[0], 'a']))}.vhd"),
            )
        )
    fate = [
        draw(st.sampled_from(["ok"] * 9 + ["unreadable", "missing", "dangling"])) for _ in disks
    ]
    kept = {each.path: each for each, how in zip(disks, fate, strict=True) if how == "ok"}
    there = [each for each, how in zip(disks, fate, strict=True) if how != "missing"]
    states = {}
    if count >= 2 and draw(st.integers(0, 3)) == 0:
        start = draw(st.integers(0, count - 2))
        end = draw(st.integers(start + 2, count))
        states[p(names[start])] = MergeState(
            chain=tuple(names[start:end]),
            step=draw(st.sampled_from(Step)),
            child_uuid=uuid(names[end - 1]),
            parent_uuid=uuid(names[start]),
        )
    active = draw(st.frozensets(st.sampled_from([each.path for each in disks])))
    aliases = {each.path: each.target for each in there}
    return (
        Lineage(
            directory=DIR,
            disks=kept,
            unreadable={
                each.path: Corrupt("x")
                for each, how in zip(disks, fate, strict=True)
                if how == "unreadable"
            },
            dangling={
                each.path: each.target or ""
                for each, how in zip(disks, fate, strict=True)
                if how == "dangling"
            },
            aliases=aliases,
            states=states,
            data=[p(f"data/{name[0]}.vhd") for name in names],
        ),
        active,
    )


@given(looks())
def test_no_disk_that_is_needed_is_ever_touched(found: tuple[Lineage, frozenset[str]]) -> None:
    look, active = found
    result = plan(look, active)
    needed = {ancestor for path in active for ancestor in look.ancestors(path)}
    merging = {p(name) for state in look.states.values() for name in state.chain or ()}
    gone = set(result.delete)
    assert not gone & (needed | merging | look.unreadable.keys())
    # nothing that stays stands on what goes
    for each in look.disks.values():
        if each.parent in gone:
            assert each.path in gone
            assert result.delete.index(each.path) < result.delete.index(each.parent)
    touched = [path for chain in result.merge for path in chain]
    assert len(touched) == len(set(touched)), "two merges of one disk"
    assert not set(touched) & (gone | merging)
    for chain in result.merge:
        assert chain[-1] in active
        assert not active & set(chain[:-1])
        for parent, child in itertools.pairwise(chain):
            assert look.disks[child].parent == parent
            stay = [path for path in look.children(parent) if path not in gone]
            assert stay == [child]
        assert all(look.owns(path) for path in chain)
    for interrupted in result.resume:
        assert not active & set(interrupted.chain[:-1])
    claimed = set(look.aliases.values())
    assert not claimed & set(result.data)
