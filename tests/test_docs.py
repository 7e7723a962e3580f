"""What the documents name is there, and what the code can answer is documented."""

from __future__ import annotations

import ast
import functools
import json
import re
from pathlib import Path
from typing import Any, cast

import click
import msgspec
import pytest

from proxy.cli import commands as program
from proxy.cli.call import parse_params
from proxy.jobs.metadata_job import MetadataSettings
from proxy.jobs.mirror.mirror_job import MirrorSettings
from proxy.jobs.settings import REPORT_KEYS, Settings
from proxy.rpc.methods import standard
from proxy.runtime.transport import CERTIFICATE_CODES
from tests.documents import (
    GUIDE,
    PAGES,
    ROOT,
    TROUBLESHOOTING,
    Command,
    anchors,
    commands,
    named_json,
    rows,
    section,
)

COMMANDS = [command for page in PAGES for command in commands(page)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_of_the_project_that_are_named_are_there(page: Path) -> None:
    text = page.read_text("utf-8")
    named = set(re.findall(r"`((?:tests|scripts|benchmarks|etc)/[\w./-]+)`", text))
    assert {name for name in named if not (ROOT / name).exists()} == set()


# -- codes -----------------------------------------------------------------------------------


@functools.cache
def _trees() -> list[ast.Module]:
    return [
        ast.parse(file.read_text("utf-8"))
        for file in (ROOT / "proxy").rglob("*.py")
        if not {"simulator", "cli"} & set(file.parts)
    ]


def _constants(trees: list[ast.Module]) -> dict[str, str]:
    """Module constants that are text, by name."""
    found: dict[str, str] = {}
    for tree in trees:
        for node in tree.body:
            match node:
                case (
                    ast.Assign(targets=[ast.Name(id=name)], value=ast.Constant(value=str(text)))
                    | ast.AnnAssign(target=ast.Name(id=name), value=ast.Constant(value=str(text)))
                ):
                    found[name] = text
                case _:
                    pass
    return found


def _codes(trees: list[ast.Module]) -> set[str]:
    """Every stable name that an error can carry, as far as it stands in the source."""
    constants = _constants(trees)
    found: set[str] = set(CERTIFICATE_CODES)
    for node in (node for tree in trees for node in ast.walk(tree)):
        match node:
            case ast.keyword(arg="code", value=ast.Constant(value=str(text))):
                found.add(text)
            case ast.keyword(arg="code", value=ast.Name(id=name)) if name in constants:
                found.add(constants[name])
            # in tables of what other programs answer, and as defaults of our errors
            case ast.Constant(value=str(text)) if re.fullmatch(r"E[A-Z]{3,}", text):
                found.add(text)
            case _:
                pass
    return {code for code in found if re.fullmatch(r"[A-Z][A-Z_]+", code)}


def test_every_code_that_is_answered_is_documented() -> None:
    """Clients decide by the codes, operators look them up."""
    found = _codes(_trees())
    assert {"EHTTP", "NO_NBD_AVAILABLE", "ENOSHARE", "CERT_REJECTED", "ELOCKED"} <= found
    table = rows(section(TROUBLESHOOTING, "Error codes"))
    told = {code for row in table for code in re.findall(r"`([A-Z_]+)…?`", row[0])}
    assert found - told == set()


def test_every_reason_of_a_full_is_documented() -> None:
    constants = _constants(_trees())
    found: set[str] = set()
    for node in (node for tree in _trees() for node in ast.walk(tree)):
        match node:
            case ast.Call(
                func=ast.Name(id="Whole" | "NoParent" | "Refusal"),
                args=[ast.Constant(value=str(reason)), *_],
            ):
                found.add(reason)
            case ast.Call(
                func=ast.Name(id="Whole" | "NoParent" | "Refusal"),
                args=[ast.Name(id=name), *_],
            ) if name in constants:
                found.add(constants[name])
            case _:
                pass
    table = rows(section(TROUBLESHOOTING, "A full instead of a delta"))
    told = {code for row in table for code in re.findall(r"`([A-Z0-9_]+)`", row[0])}
    assert found == told


@pytest.mark.parametrize("row", rows(TROUBLESHOOTING.read_text("utf-8")), ids=lambda row: row[0])
def test_every_row_says_something(row: list[str]) -> None:
    assert all(row)


# -- settings --------------------------------------------------------------------------------


def _settings(kind: str) -> dict[str, str]:
    """The default of each setting of a kind of job, as the guide tells it."""
    found: dict[str, str] = {}
    for name, kinds, _, default, *_ in rows(section(GUIDE, "Settings")):
        if kind in kinds.split(", "):
            general, *others = default.split("; ")
            special = [other for other in others if other.startswith(f"{kind} ")]
            found[name.strip("`")] = (special or [general])[0].removeprefix(f"{kind} ").strip("`")
    return found


def _shown(field: msgspec.structs.FieldInfo) -> str:
    default: Any = field.default
    if default is msgspec.NODEFAULT:
        assert callable(field.default_factory)
        default = cast("Any", field.default_factory())
    return "\N{EN DASH}" if default is None else json.dumps(default)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("backup", Settings), ("mirror", MirrorSettings), ("metadata", MetadataSettings)],
)
def test_the_guide_has_every_setting_with_its_default(
    kind: str, settings: type[msgspec.Struct]
) -> None:
    fields = msgspec.structs.fields(settings)
    internal = {"_warmMigration"}  # of a call that Xen Orchestra makes by itself
    expected = {
        field.encode_name: _shown(field) for field in fields if field.encode_name not in internal
    }
    assert _settings(kind) == expected


def test_the_guide_names_what_is_read_by_xen_orchestra() -> None:
    text = section(GUIDE, "Settings")
    assert {key for key in REPORT_KEYS if f"`{key}`" not in text} == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_metrics_that_are_named_are_there(page: Path) -> None:
    source = (ROOT / "proxy/rpc/exposition.py").read_text("utf-8") + '"xo_proxy_info"'
    named = set(re.findall(r"xo_proxy_[a-z_]+", page.read_text("utf-8")))
    assert {name for name in named if f'"{name.removesuffix("_total")}"' not in source} == set()


# -- commands and calls ----------------------------------------------------------------------


def _parse(words: tuple[str, ...]) -> tuple[str, dict[str, Any]]:
    """The name of the command that these words are for, and its options and arguments.

    Raises ``click.UsageError`` as the program would, without looking at files.
    """
    command: click.Command = program
    context = click.Context(command, info_name="xo-proxy")
    rest: list[str] = list(words)
    path: list[str] = []
    while True:
        options, rest, _ = command.make_parser(context).parse_args(rest)
        if not isinstance(command, click.Group) or not rest:
            break
        path.append(rest.pop(0))
        found = command.get_command(context, path[-1])
        if found is None:
            raise click.UsageError(f"no such command {path[-1]}")
        command = found
        context = click.Context(command, parent=context, info_name=path[-1])
    if rest:
        raise click.UsageError(f"{rest} are too many")
    return " ".join(path), options


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_commands_and_their_options_are_there(command: Command) -> None:
    _parse(command.words)


def test_a_command_that_is_not_there_is_noticed() -> None:
    for words in (("tasks", "--folow"), ("backup", "list"), ("tasks", "show", "a", "b")):
        with pytest.raises(click.UsageError):
            _parse(words)


@pytest.mark.parametrize(
    "command",
    [each for each in COMMANDS if each.words[0] == "call" and len(each.words) > 1],
    ids=str,
)
def test_calls_meet_the_schema_of_their_method(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = named_json(GUIDE)
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    monkeypatch.chdir(tmp_path)
    _, given = _parse(command.words)
    method = standard()[given["method"]]
    objects = _several(given, "json_params")
    if {each.removeprefix("@") for each in objects} <= set(files):  # else of the reader's own
        method.read_params(parse_params(_several(given, "params"), objects))


def _several(given: dict[str, Any], name: str) -> tuple[str, ...]:
    """What was given for an option or argument, which may be nothing."""
    value = given.get(name)
    return tuple(cast("list[str]", value)) if isinstance(value, list | tuple) else ()


def test_every_json_of_the_guide_is_used_by_a_command() -> None:
    files = named_json(GUIDE)
    text = GUIDE.read_text("utf-8")
    assert len(files) == text.count("```json")
    used = {word[1:] for command in commands(GUIDE) for word in command.words if word[:1] == "@"}
    assert set(files) <= used
