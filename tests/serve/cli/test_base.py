"""A base model named by folder, by hub id, or not there at all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig

from loramux.cli.base import read_layers
from loramux.errors import ConfigError

CONFIG = LlamaConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
)


def test_a_folder(tmp_path: Path) -> None:
    CONFIG.save_pretrained(tmp_path)
    base = read_layers(tmp_path, "mine")
    assert base.name == "mine"
    assert base.linears["model.layers.0.mlp.down_proj"] == (24, 16)


def test_a_hub_id_from_the_hugging_face_cache(tmp_path: Path) -> None:
    """In a process of its own: the cache's place is read when the library is imported."""
    repository = tmp_path / "models--org--tiny"
    CONFIG.save_pretrained(repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    code = (
        "from loramux.cli.base import read_layers; "
        "base = read_layers('org/tiny', 'org/tiny'); "
        "assert base.linears['model.layers.0.self_attn.k_proj'] == (16, 8), base"
    )
    packages = os.pathsep.join(p for p in sys.path if p)
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": packages}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=120)


@pytest.mark.parametrize("content", [None, "{not json"])
def test_a_folder_that_is_no_model_is_an_error_with_a_hint(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError) as caught:
        read_layers(tmp_path, "mine")
    assert "mine" in caught.value.message and caught.value.hint
