from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from proxy.config import Places


class Etc:
    """The four places in a temporary directory; ``write`` fills them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.explicit: list[Path] = []

    def places(self) -> Places:
        return Places(
            system=self.root / "etc",
            user=self.root / "home",
            current=self.root / "work",
            explicit=tuple(self.explicit),
        )

    def write(self, name: str, content: str | dict[str, Any]) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = content if isinstance(content, str) else json.dumps(content)
        path.write_text(text, "utf-8")
        path.chmod(0o600)
        return path

    def option(self, name: str, content: str | dict[str, Any]) -> Path:
        path = self.write(name, content)
        self.explicit.append(path)
        return path


@pytest.fixture
def etc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Etc:
    monkeypatch.delenv("XO_PROXY_AUTHENTICATION_TOKEN", raising=False)
    return Etc(tmp_path)
