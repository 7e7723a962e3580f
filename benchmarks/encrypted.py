"""Backups to encrypted remotes, each beside the same backup to a plain one in the same round.

Floors: of the ciphers, OpenSSL's authenticated encryption in one piece (of AES for both of its
modes); of the backups, the plain remote.
"""

from __future__ import annotations

import json
import os
import time
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

from benchmarks.incremental import SHARE, change, changing_pool
from benchmarks.lab import (
    MIB,
    PIECE,
    Daemon,
    Figures,
    Options,
    Run,
    daemon,
    empty,
    job,
    main,
    remote_spec,
    run,
    scratch,
    settle,
)
from proxy.formats.encrypted import Algorithm, FileCipher

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from benchmarks.lab import Pool

KEY = "0123456789abcdef0123456789abcdef"
ONE_PIECE: dict[Algorithm, Any] = {
    Algorithm.CHACHA20_POLY1305: ChaCha20Poly1305,
    Algorithm.AES_256_GCM: AESGCM,
    Algorithm.AES_256_CBC: AESGCM,
}
DELTAS = 3
"""In one round: a single one is too short."""
NAMES = {"plain": None, "chacha": Algorithm.CHACHA20_POLY1305, "gcm": Algorithm.AES_256_GCM}


def measure(chosen: Options) -> list[Figures]:
    size = (32 if chosen.quick else 1024) * MIB
    return [*ciphers(chosen), *backups(chosen, size)]


def ciphers(chosen: Options) -> list[Figures]:
    rows: list[Figures] = []
    content = os.urandom(PIECE)
    for algorithm in Algorithm:
        cipher = FileCipher(algorithm, KEY)
        floor = partial(ONE_PIECE[algorithm](KEY.encode()).encrypt, bytes(12), content, None)
        into = memoryview(bytearray(PIECE + 16))
        works: dict[str, Callable[[], object]] = {
            "encrypts blocks": partial(cipher.encrypt, content),
            "decrypts blocks": partial(cipher.decrypt, bytes(cipher.encrypt(content))),
            "encrypts a stream": partial(cipher.encryption().update_into, content, into),
        }
        for name, work in works.items():
            row = Figures(f"{algorithm} {name}, one core", "MB/s")
            for _ in range(chosen.rounds):
                before = rate(floor)
                row.add(rate(work), (before + rate(floor)) / 2)
            rows.append(row)
    return rows


def rate(work: Callable[[], object]) -> float:
    count = 64
    began = time.perf_counter()
    for _ in range(count):
        work()
    return count * PIECE / (time.perf_counter() - began) / 1e6


def backups(chosen: Options, size: int) -> list[Figures]:
    encrypted = [name for name in NAMES if name != "plain"]
    figures = [
        {name: Figures(f"{what}, {name}", unit, goal=goal(name, unit)) for name in encrypted}
        for what, unit in (
            ("full backup: export to durable", "MB/s"),
            ("key backup to a directory: export", "MB/s"),
            ("delta of 25 % to a directory: export", "MB/s"),
            ("full backup: daemon's CPU per GiB", "s"),
            ("key backup to a directory: daemon's CPU per GiB", "s"),
        )
    ]
    with (
        scratch(chosen) as folder,
        changing_pool(folder, size=size) as pool,
        daemon(folder) as proxy,
    ):
        specs = {name: spec_of(folder, name) for name in NAMES}
        for spec in specs.values():
            to_archive(proxy, pool, spec)  # the first one opens connections and loads code
        for number in range(chosen.rounds):
            found: dict[str, tuple[float, ...]] = {}
            # what comes later finds a busier disk: each has each place in its turn
            order = deque(specs.items())
            order.rotate(number)
            for name, spec in order:
                empty(folder / name / "xo-vm-backups")
                settle()
                used = proxy.program.cpu
                done = to_archive(proxy, pool, spec)
                archive = done.transferred() / done.spans("export")[0] / 1e6
                archive_cpu = (proxy.program.cpu - used) / size * 2**30
                settle()
                used = proxy.program.cpu
                done = to_directory(proxy, pool, spec, fullInterval=1)
                whole = size / done.spans("export")[0] / 1e6
                whole_cpu = (proxy.program.cpu - used) / size * 2**30
                seconds = 0.0
                for _ in range(DELTAS):
                    change(pool, SHARE)
                    settle()
                    seconds += to_directory(proxy, pool, spec).spans("export")[0]
                part = DELTAS * size * SHARE / seconds / 1e6
                found[name] = (archive, whole, part, archive_cpu, whole_cpu)
            for name in encrypted:
                for rows, value, plain in zip(figures, found[name], found["plain"], strict=True):
                    rows[name].add(value, plain)
        peak = Figures("encrypted backups: daemon's peak RSS", "MiB", goal="< 200 MiB")
        peak.add(proxy.program.peak_memory / MIB)
    return [*(row for rows in figures for row in rows.values()), peak]


def goal(name: str, unit: str) -> str:
    return "≥ 90 % of plain" if name == "gcm" and unit == "MB/s" else "-"


def spec_of(folder: Path, name: str) -> dict[str, str]:
    """The algorithm of a new remote is the default, unless it says another one beforehand."""
    spec, algorithm = remote_spec(folder, name), NAMES[name]
    spec["url"] += "?useVhdDirectory=true"
    if algorithm is not None:
        (folder / name).mkdir()
        (folder / name / "encryption.json").write_text(json.dumps({"algorithm": algorithm}))
        spec["url"] += f"&encryptionKey={quote(json.dumps(KEY))}"
    return spec


def to_archive(proxy: Daemon, pool: Pool, spec: dict[str, str]) -> Run:
    return run(proxy, "backup.run", job(pool, spec, pool.vms))


def to_directory(proxy: Daemon, pool: Pool, spec: dict[str, str], **settings: Any) -> Run:
    params = job(pool, spec, pool.vms)
    params["job"] |= {"id": "d3a0d3a0-0000-4000-8000-000000000002", "mode": "delta"}
    params["job"]["settings"]["schedule"] |= {"exportRetention": 9, **settings}
    return run(proxy, "backup.run", params)


if __name__ == "__main__":
    main(__doc__, measure)
