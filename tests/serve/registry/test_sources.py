"""Which paths requests may load from, and when a source counts as unchanged."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from loramux.errors import PathNotAllowed
from loramux.registry.sources import Roots, signature

LONG_AGO = 10**9


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    (root / "a").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    (tmp_path / "root-too").mkdir()  # shares the root's name as a prefix
    return root


def test_a_folder_under_a_root_is_allowed(root: Path) -> None:
    roots = Roots([root])
    assert roots.check(root / "a", "source") == root / "a"
    assert roots.check(root / "a" / ".." / "a", "source") == root / "a"


@pytest.mark.parametrize(
    "path", ["../outside", "a/../../outside", "/etc", "../root-too", "~", "~nobody-has-this-name/x", "a\0b"]
)
def test_a_path_out_of_every_root_is_refused(root: Path, path: str) -> None:
    with pytest.raises(PathNotAllowed) as caught:
        Roots([root]).check(root / path if path[0] != "~" else Path(path), "source")
    assert str(root) not in str(caught.value)
    assert caught.value.param == "source"


def test_a_link_out_of_a_root_is_refused(root: Path) -> None:
    (root / "link").symlink_to(root.parent / "outside")
    with pytest.raises(PathNotAllowed):
        Roots([root]).check(root / "link", "source")


def test_a_loop_of_links_is_refused(root: Path) -> None:
    (root / "loop").symlink_to(root / "loop")
    with pytest.raises(PathNotAllowed):
        Roots([root]).check(root / "loop" / "a", "source")


def test_a_root_may_itself_be_a_link(root: Path) -> None:
    link = root.parent / "link"
    link.symlink_to(root)
    assert Roots([link]).check(link / "a", "source") == root / "a"


def test_without_roots_nothing_is_allowed(root: Path) -> None:
    with pytest.raises(PathNotAllowed):
        Roots([]).check(root / "a", "source")


def write(path: Path, text: str, mtime: int = LONG_AGO) -> None:
    path.write_text(text)
    os.utime(path, (mtime, mtime))


def test_a_signature_changes_with_the_files(root: Path) -> None:
    source = root / "a"
    seen = [signature(source)]  # nothing in it
    write(source / "x", "one")
    seen.append(signature(source))
    write(source / "x", "three")
    seen.append(signature(source))
    write(source / "x", "seven", LONG_AGO + 1)
    seen.append(signature(source))
    write(source / "y", "")
    seen.append(signature(source))
    assert seen[0] is None
    assert len(set(seen)) == len(seen)
    assert signature(source) == seen[-1]
    assert signature(source / "x") is not None  # one file is a source too


def test_what_just_changed_or_is_not_there_has_no_signature(root: Path) -> None:
    (root / "a" / "x").write_text("one")
    assert signature(root / "a") is None
    assert signature(root / "nowhere") is None
