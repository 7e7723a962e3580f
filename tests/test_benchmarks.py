"""The measurements still work; how fast anything is no test can say on a shared machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.remotes.samba import why_not

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "figure"),
    [
        ("restore", "restore, HTTPS: whole run"),
        ("incremental", "merge of 25 % into a directory, each block"),
        ("encrypted", "key backup to a directory: export, gcm"),
        ("nbd", "NBD over TLS"),
        ("objects", "delta of 25 % to S3: transfer"),
        pytest.param(
            "smb",
            "SMB, sealed: read",
            marks=pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
        ),
        ("listing", "listing 40 backups of 4 VMs, cached"),
        ("waiters", "50 waiters: change to the last answer"),
    ],
)
def test_a_benchmark_measures(name: str, figure: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", "--quick", "--folder", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"| {figure} |" in done.stdout
    assert list(tmp_path.iterdir()) == []
