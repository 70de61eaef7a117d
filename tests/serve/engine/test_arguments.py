"""Our options inside vLLM's namespace, and the environment it is started in."""

from __future__ import annotations

import json
import os
from argparse import Namespace
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import LlamaConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.usage.usage_lib import UsageContext

from loramux.config import ServeConfig
from loramux.engine import arguments
from loramux.engine.settings import KEY, DataPlaneSettings
from loramux.errors import ConfigError
from loramux.http.gate import Gate, gate_of
from loramux.http.keys import KeyRing

SETTINGS = DataPlaneSettings(adapter_bytes=2**30, slots=512, max_rank=256)


def namespace(**more: Any) -> Namespace:
    return Namespace(**{"additional_config": None, "middleware": ["their.Middleware"], **more})


def test_settings_survive_the_way_to_the_worker() -> None:
    travelled = json.loads(json.dumps(SETTINGS.as_config()))
    assert DataPlaneSettings.from_config(travelled) == SETTINGS
    assert "version" in travelled[KEY]  # part of vLLM's compile-cache key


@pytest.mark.parametrize("config", [None, {}, {"other": 1}, "text"])
def test_a_worker_that_loramux_did_not_start_says_so(config: object) -> None:
    with pytest.raises((KeyError, TypeError)):
        DataPlaneSettings.from_config(config)


@pytest.mark.parametrize("theirs", [None, {}, {"k": 1}, '{"k": 1}'])
def test_settings_join_what_the_user_configured(theirs: Any) -> None:
    args = arguments.apply_settings(namespace(additional_config=theirs), SETTINGS, Gate())
    assert DataPlaneSettings.from_config(args.additional_config) == SETTINGS
    assert ("k" in args.additional_config) == bool(theirs)
    assert args.max_loras == args.max_cpu_loras == 512
    # vLLM adds middleware in order, each around those before it.
    assert args.middleware[0] == "their.Middleware"
    assert args.middleware[-1] == "loramux.http.request_id.RequestId"


def test_our_classes_exist_under_the_names_vllm_is_given() -> None:
    args = arguments.apply_settings(namespace(), SETTINGS, Gate())
    for path in (args.worker_cls, args.scheduler_cls, *args.middleware[1:]):
        module, _, name = path.rpartition(".")
        assert hasattr(__import__(module, fromlist=[name]), name)


UVICORN = {"disable_access_log_for_endpoints": None, "disable_uvicorn_access_log": False}


@pytest.mark.parametrize(
    ("config", "theirs", "logged"),
    [
        (ServeConfig(), {}, True),
        (ServeConfig(access_log=False), {}, False),
        (ServeConfig(), {"disable_uvicorn_access_log": True}, False),
    ],
)
def test_there_is_one_access_log(config: ServeConfig, theirs: dict[str, Any], logged: bool) -> None:
    args = namespace(served_model_name=["a", "b"], **{**UVICORN, **theirs})
    gate = arguments.make_gate(config, KeyRing(), args)
    assert (gate.access_log, gate.bases) == (logged, ("a", "b"))
    assert arguments.apply_settings(args, SETTINGS, gate).disable_uvicorn_access_log
    scope = {"app": SimpleNamespace(state=SimpleNamespace(args=args))}
    assert gate_of(scope) is gate


@pytest.mark.parametrize("name", ["VLLM_API_KEY", "LORAMUX_API_KEY", "LORAMUX_ADMIN_KEY"])
def test_no_key_stays_in_the_environment(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "k")
    arguments.set_environment("base")
    assert name not in os.environ


def test_paths_vllm_would_not_log_are_not_logged() -> None:
    args = namespace(served_model_name=["a"], **{**UVICORN, "disable_access_log_for_endpoints": "/health, /metrics,"})
    assert arguments.make_gate(ServeConfig(), KeyRing(), args).unlogged == {"/health", "/metrics"}


def test_our_key_is_ours() -> None:
    with pytest.raises(ConfigError):
        arguments.apply_settings(namespace(additional_config={KEY: {}}), SETTINGS, Gate())


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two plugins that vLLM would load by itself, and one only when it is named."""
    found = {"vllm.general_plugins": ["g1", "g2"], "vllm.endpoint_plugins": ["loramux", "foreign"]}

    def entry_points(group: str) -> list[EntryPoint]:
        return [EntryPoint(name, "m:f", group) for name in found.get(group, [])]

    monkeypatch.setattr(arguments, "entry_points", entry_points)


@pytest.mark.parametrize(
    ("named", "plugins"),
    [
        (None, ["g1", "g2", "loramux"]),  # unset: vLLM would load all, and must go on doing so
        ("", ["loramux"]),
        ("mine", ["mine", "loramux"]),
        ("mine,loramux", ["mine", "loramux"]),
    ],
)
@pytest.mark.usefixtures("installed")
def test_naming_our_plugin_unloads_no_other(named: str | None, plugins: list[str]) -> None:
    assert arguments._plugins(named) == plugins


@pytest.mark.usefixtures("installed")
def test_the_environment_keeps_what_the_user_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "mine")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "7")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "0")
    arguments.set_environment(str(tmp_path))
    assert os.environ["VLLM_PLUGINS"] == "mine,loramux"
    assert os.environ["VLLM_CPU_KVCACHE_SPACE"] == "7"
    assert os.environ["HF_HUB_OFFLINE"] == "0"


def parse(*argv: str) -> Namespace:
    return arguments.parse_engine_args(argv, model="/the/base", served_name="base")


def test_the_model_is_ours_to_name_and_the_rest_is_theirs() -> None:
    args = parse("--max-model-len", "128", "--port", "81")
    assert (args.model, args.served_model_name, args.enable_lora) == ("/the/base", ["base"], True)
    assert (args.max_model_len, args.port, args.host) == (128, 81, "127.0.0.1")
    assert parse("--served-model-name", "x").served_model_name == ["x"]
    assert parse("--host", "0.0.0.0").host == "0.0.0.0"


@pytest.mark.parametrize("argv", [["--tensor-parallel-size", "2"], ["-pp", "2"], ["late/base"]])
def test_what_would_be_served_wrongly_is_refused(argv: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(*argv)
    assert caught.value.hint


def test_an_option_nobody_knows_ends_the_start(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse("--no-such-option")
    assert caught.value.code == 2
    assert "--no-such-option" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--max-num-seqs", "7"],
        ["--max-num-batched-tokens", "100"],
        ["--max-num-batched-tokens", "100", "--max-num-seqs", "90"],
        ["--performance-mode", "throughput"],
        ["--performance-mode", "throughput", "--max-num-batched-tokens", "200"],
    ],
)
def test_as_many_requests_may_run_as_vllm_says(options: list[str], tmp_path: Path) -> None:
    LlamaConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=50, max_position_embeddings=64,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(tmp_path)  # fmt: skip
    args = arguments.parse_engine_args([*options, "--skip-tokenizer-init"], model=str(tmp_path), served_name="m")
    config = AsyncEngineArgs.from_cli_args(args).create_engine_config(UsageContext.OPENAI_API_SERVER)
    assert arguments.max_requests(args) == config.scheduler_config.max_num_seqs
