from __future__ import annotations

import pytest

from proxy.config import ConfigError, load
from proxy.runtime.secrets import scrub_text

from .conftest import Etc


def test_the_environment_wins_over_every_file(etc: Etc, monkeypatch: pytest.MonkeyPatch) -> None:
    etc.option("a.toml", "authenticationToken = 'from-the-file'")
    monkeypatch.setenv("XO_PROXY_AUTHENTICATION_TOKEN", "from-the-environment\n")
    loaded = load(etc.places())
    assert loaded.config.authentication_token == "from-the-environment"
    assert loaded.token_from == "XO_PROXY_AUTHENTICATION_TOKEN"


def test_a_token_file_is_read_and_trimmed(etc: Etc) -> None:
    secret = etc.write("run/token", "from-a-secret-file\n")
    etc.option("a.toml", "authenticationTokenFile = './run/token'")
    loaded = load(etc.places())
    assert loaded.config.authentication_token == "from-a-secret-file"
    assert secret in loaded.files


def test_the_later_layer_wins_whichever_form_it_has(etc: Etc) -> None:
    etc.write("run/token", "from-a-secret-file")
    etc.option("a.toml", "authenticationToken = 'plain-one'")
    etc.option("b.toml", "authenticationTokenFile = './run/token'")
    assert load(etc.places()).config.authentication_token == "from-a-secret-file"
    etc.option("c.toml", "authenticationToken = 'plain-two'")
    assert load(etc.places()).config.authentication_token == "plain-two"


@pytest.mark.parametrize("content", ["", " \n"])
def test_an_empty_token_file_is_an_error(etc: Etc, content: str) -> None:
    etc.write("token", content)
    etc.option("a.toml", "authenticationTokenFile = './token'")
    with pytest.raises(ConfigError, match="is empty"):
        load(etc.places())


def test_a_missing_token_file_is_an_error(etc: Etc) -> None:
    etc.option("a.toml", "authenticationTokenFile = './token'")
    with pytest.raises(ConfigError, match=r"a\.toml: authenticationTokenFile: cannot read"):
        load(etc.places())


def test_a_blank_token_counts_as_none(etc: Etc) -> None:
    etc.option("a.toml", "authenticationToken = '  '")
    assert load(etc.places()).config.authentication_token == ""


def test_a_token_that_every_user_can_read_is_mentioned(etc: Etc) -> None:
    etc.option("a.toml", "authenticationToken = 'for-all-to-see'").chmod(0o644)
    (warning,) = load(etc.places()).warnings
    assert "chmod 0600" in warning.text


def test_a_loaded_token_never_shows_in_text(etc: Etc) -> None:
    etc.option("a.toml", "authenticationToken = 'very-much-secret'")
    load(etc.places())
    assert "very-much-secret" not in scrub_text("the token is very-much-secret")
