"""A few rounds of `scripts/torture`: the daemon is killed at random moments."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.timeout(300)  # each round starts the daemon anew
def test_the_daemon_survives_ten_rounds(tmp_path: Path) -> None:
    command = ["-m", "tests.torture", "--rounds", "10", "--seed", "1", "--folder", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "survived 10 rounds" in done.stdout
    assert list(tmp_path.iterdir()) == []
