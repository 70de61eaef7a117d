"""The error tree: stable codes, readable text, safe to show and to send."""

import pickle
import re
from pathlib import Path

import pytest

import loramux_adapters
from loramux_adapters import AdapterError, errors
from loramux_adapters.errors import shown

CLASSES = sorted(AdapterError.__subclasses__(), key=lambda c: c.__name__)


@pytest.mark.parametrize("kind", CLASSES)
def test_code_follows_the_name_and_the_tree_lists_it(kind):
    snake = re.sub(r"(?<!^)(?=[A-Z])", "_", kind.__name__).lower()
    assert kind.code == snake
    assert re.search(rf"── {kind.__name__} +{kind.code} +\S", errors.__doc__)
    assert kind.__name__ in loramux_adapters.__all__


def test_every_exported_name_exists():
    assert all(hasattr(loramux_adapters, name) for name in loramux_adapters.__all__)
    assert loramux_adapters.__all__ == sorted(loramux_adapters.__all__)


@pytest.mark.parametrize("kind", CLASSES)
def test_it_crosses_processes(kind):
    error = kind("It is wrong.", hint="Do this.", field="r")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind and vars(copy) == vars(error)
    assert str(copy) == "It is wrong. Do this."


@pytest.mark.parametrize("name", ["a\nb", "\x1b[31mred", "x" * 5000, "a\u202eb", "\x00", "ü" * 500 + "\n"])
def test_names_are_shown_on_one_short_line(name):
    text = shown(name)
    assert text.isprintable() and len(text) <= 161


def test_the_readme_explains_every_code():
    readme = (Path(__file__).parents[2] / "adapters/README.md").read_text()
    assert set(re.findall(r"^\| `(adapter_\w+)`", readme, re.MULTILINE)) == {kind.code for kind in CLASSES}
