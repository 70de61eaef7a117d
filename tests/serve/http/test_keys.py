"""Keys are recognised by digest, allow what they say, and are never shown."""

from __future__ import annotations

import hmac
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from loramux.errors import ConfigError
from loramux.http.keys import Caller, KeyRing

key_texts = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1, max_size=40)


def written(tmp_path: Path, content: Any) -> Path:
    file = tmp_path / "keys.yaml"
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return file


@given(st.lists(key_texts, min_size=1, max_size=5, unique=True), key_texts)
def test_a_key_opens_for_its_owner_and_no_other_text_does(mine: list[str], other: str) -> None:
    ring = KeyRing.build(mine)
    names = [ring.identify(key).name for key in mine]  # type: ignore[union-attr]
    assert len(set(names)) == len(mine)
    assert (ring.identify(other) is not None) == (other in mine)


@pytest.mark.parametrize("presented", ["", "sk-1 ", " sk-1", "SK-1", "sk-1\x00", "sk-", "ü", "\udc80", "x" * 10**5])
def test_nearly_the_key_is_not_the_key(presented: str) -> None:
    assert KeyRing.build(["sk-1"]).identify(presented) is None


def test_every_key_is_compared_in_constant_time_whichever_matches(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []
    real = hmac.compare_digest

    def compare(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return real(a, b)

    monkeypatch.setattr(hmac, "compare_digest", compare)
    ring = KeyRing.build(["k1", "k2", "k3"], "k4")
    for presented in ("k1", "k4", "none"):
        compared.clear()
        ring.identify(presented)
        assert len(compared) == 4
        assert all(len(a) == len(b) == 32 for a, b in compared), "digests, never keys"


def test_no_key_is_in_any_representation() -> None:
    ring = KeyRing.build(["sk-hidden-1"], "sk-hidden-2")
    assert "hidden" not in repr(ring)
    assert not any(bytes(key.digest).hex() in repr(ring) or repr(key.digest) in repr(ring) for key in ring.keys)


def test_without_keys_everybody_may_everything() -> None:
    assert KeyRing.build().anonymous == Caller("anonymous", admin=True)


def test_an_admin_key_alone_leaves_inference_open() -> None:
    ring = KeyRing.build(admin_key="a")
    assert ring.anonymous == Caller("anonymous", admin=False)
    assert ring.identify("a") == Caller("admin", admin=True)


def test_without_an_admin_key_ordinary_keys_are_admins_and_restricted_ones_are_not(tmp_path: Path) -> None:
    file = written(tmp_path, {"keys": [{"name": "all", "key": "b"}, {"name": "some", "key": "c", "adapters": ["x"]}]})
    ring = KeyRing.build(["a"], file=file)
    assert [key.caller.admin for key in ring.keys] == [True, True, False]
    assert ring.anonymous is None
    ring = KeyRing.build(["a"], "d", file)
    assert [key.caller.admin for key in ring.keys] == [False, False, False, True]


def test_a_file_without_keys_lets_nobody_in(tmp_path: Path) -> None:
    assert KeyRing.build(file=written(tmp_path, {"keys": []})).anonymous is None


def test_a_key_given_twice_is_one() -> None:
    assert len(KeyRing.build(["a", "a"]).keys) == 1


@pytest.mark.parametrize(
    ("patterns", "allowed", "denied"),
    [
        (None, ["x", "", "team/a"], []),
        ((), [], ["x", "", "*"]),
        (("sql", "legal-*"), ["sql", "legal-", "legal-uk/v2"], ["SQL", "sql2", "legal", "xlegal-a", ""]),
        (("v[12]",), ["v1"], ["v3", "v[12]"]),
    ],
)
def test_allow_lists_are_patterns_of_whole_names(patterns: Any, allowed: list[str], denied: list[str]) -> None:
    caller = Caller("c", admin=False, adapters=patterns)
    assert caller.restricted == (patterns is not None)
    assert all(map(caller.allows, allowed))
    assert not any(map(caller.allows, denied))


GOOD = {"name": "team-a", "key": "sk-hidden", "adapters": ["sql"]}


@pytest.mark.parametrize(
    "content",
    [
        "keys: [",
        "- a",
        "",
        {"keys": {}},
        {"keys": [GOOD], "more": 1},
        {"keys": ["sk-hidden"]},
        {"keys": [{"name": "a"}]},
        {"keys": [{"key": "sk-hidden"}]},
        {"keys": [GOOD | {"admin": True}]},
        {"keys": [GOOD | {"name": 7}]},
        {"keys": [GOOD | {"name": "a\nb"}]},
        {"keys": [GOOD | {"name": "anonymous"}]},
        {"keys": [GOOD | {"key": 12345}]},
        {"keys": [GOOD | {"key": "sk hidden"}]},
        {"keys": [GOOD | {"key": ""}]},
        {"keys": [GOOD | {"key": "sk-hidden-ü"}]},
        {"keys": [GOOD | {"adapters": "sql"}]},
        {"keys": [GOOD | {"adapters": None}]},
        {"keys": [GOOD | {"adapters": [7]}]},
        {"keys": [GOOD | {"adapters": [""]}]},
        {"keys": [GOOD, GOOD | {"key": "other-hidden"}]},
        {"keys": [GOOD, GOOD | {"name": "b"}]},
        "keys: [{name: a, key: *sk-hidden}]",
        "key: 'sk-hidden\n b: c: d",
    ],
)
def test_a_bad_file_stops_the_start_with_a_hint_and_without_a_key(content: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        KeyRing.build(file=written(tmp_path, content))
    assert caught.value.hint
    assert "hidden" not in str(caught.value)


def test_a_missing_file_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        KeyRing.build(file=tmp_path / "nowhere")


@pytest.mark.parametrize(
    "args", [(["hid den"],), ([""],), (["hidden\n"],), (["a"], "hid\tden"), (["hidden"], "hidden")]
)
def test_a_bad_key_stops_the_start_and_is_not_shown(args: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        KeyRing.build(*args)
    assert "hid" not in str(caught.value)
