"""What importing and asking the command for help costs, and how the packages lie in the repository."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from loramux import __version__

ROOT = Path(__file__).parents[2]


def python(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, timeout=60)


LIGHT = """
import sys
import loramux, loramux.errors, loramux.units, loramux.plan, loramux.console, loramux.paths
from loramux.cli import main
assert main(["--version"]) == 0
assert main(["--help"]) == 0
assert main([]) == 0
assert main(["frobnicate"]) == 2
print([name for name in ("torch", "vllm", "transformers") if name in sys.modules])
"""


def test_the_command_answers_without_torch_and_vllm() -> None:
    lines = python("-c", LIGHT).stdout.splitlines()
    assert lines[0] == f"loramux {__version__}"
    assert any(line.startswith("usage: loramux") for line in lines)
    assert any("'frobnicate'" in line for line in lines)
    assert lines[-1] == "[]"


def test_the_exit_status_leaves_the_process() -> None:
    assert python("-m", "loramux", "frobnicate").returncode == 2
    assert python("-m", "loramux", "--version").returncode == 0


@pytest.mark.parametrize("folder", ["serve", "adapters", "kernels", "docker"])
def test_the_top_folders_are_no_packages(folder: str) -> None:
    """`kernels` is also the name of a package that transformers imports if it can: with an `__init__.py` here,
    running from the repository's root would give it ours."""
    assert (ROOT / folder).is_dir()
    assert not (ROOT / folder / "__init__.py").exists()


ARROWS = """
import sys
for packages, above in (
    (["loramux_kernels"], ["loramux_adapters", "loramux", "vllm"]),
    (["loramux_adapters"], ["loramux", "vllm"]),
    (["loramux.registry", "loramux.http", "loramux.metrics", "loramux.config", "loramux.cli.serve"], ["vllm"]),
):
    for package in packages:
        __import__(package)
    print(packages[0], [name for name in above if name in sys.modules])
"""


def test_arrows_point_one_way() -> None:
    done = python("-c", ARROWS)
    assert done.stdout.splitlines() == ["loramux_kernels []", "loramux_adapters []", "loramux.registry []"], done.stderr
