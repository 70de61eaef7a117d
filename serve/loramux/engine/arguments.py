"""Our options as vLLM's: one namespace, made and checked by vLLM's own parser."""

from __future__ import annotations

import json
import os
from argparse import Namespace
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path

from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.platforms import current_platform
from vllm.usage.usage_lib import UsageContext

from loramux.config import KEY_VARIABLES, ServeConfig
from loramux.engine.settings import KEY, DataPlaneSettings
from loramux.errors import ConfigError
from loramux.http.gate import Gate, install
from loramux.http.keys import KeyRing
from loramux.http.stack import MIDDLEWARE

try:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
except ImportError:  # up to 0.31
    from vllm.entrypoints.openai.cli_args import (  # type: ignore[import-not-found, no-redef]
        make_arg_parser,
        validate_parsed_serve_args,
    )

from vllm.utils.argparse_utils import FlexibleArgumentParser

_PLUGIN_GROUPS = ("general", "io_processor", "platform", "stat_logger")
_CPU_ADAPTER_BYTES = 2**30


def set_environment(model: str) -> None:
    """Variables vLLM reads at import or start, where the user set none."""
    os.environ["VLLM_PLUGINS"] = ",".join(_plugins(os.environ.get("VLLM_PLUGINS")))
    # Opens the hook on the way of an unknown model name, where we wait for adapters that are loading. vLLM's own
    # routes behind this switch are replaced by ours.
    os.environ["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
    # Our keys by now: vLLM would turn away all but its own, and the engine's processes need none.
    for name in KEY_VARIABLES:
        os.environ.pop(name, None)
    if Path(model).is_dir():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if current_platform.is_cpu():
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")


def parse_engine_args(argv: Sequence[str], *, model: str, served_name: str) -> Namespace:
    """vLLM's namespace for `model`. Exits like argparse on options vLLM does not know; raises ConfigError."""
    defaults = ["--host", "127.0.0.1", "--served-model-name", served_name]
    if current_platform.is_cpu():
        defaults += ["--dtype", "float32"]
    parser = make_arg_parser(FlexibleArgumentParser(prog="loramux serve", add_help=False))  # type: ignore[no-untyped-call]
    args: Namespace = parser.parse_args([*defaults, *argv, "--model", model, "--enable-lora"])
    validate_parsed_serve_args(args)
    if args.model_tag is not None:
        raise ConfigError(
            f"{args.model_tag!r} is no option. If it is the base model, it comes first.",
            hint=f"Write loramux serve {args.model_tag} [options].",
        )
    if (args.tensor_parallel_size or 1) != 1 or (args.pipeline_parallel_size or 1) != 1:
        raise ConfigError(
            "loramux serves one GPU per engine: tensor and pipeline parallelism are not built yet.",
            hint="Leave out --tensor-parallel-size and --pipeline-parallel-size; start one server per GPU.",
        )
    return args


def make_gate(config: ServeConfig, keys: KeyRing, args: Namespace) -> Gate:
    """What our middleware goes by; vLLM's options for uvicorn's access log are understood as ours."""
    unlogged = (args.disable_access_log_for_endpoints or "").split(",")
    return Gate(
        keys=keys,
        bases=tuple(args.served_model_name),
        protect_metrics=config.protect_metrics,
        max_body=config.max_body,
        access_log=config.access_log and not args.disable_uvicorn_access_log,
        unlogged=frozenset(path.strip() for path in unlogged if path.strip()),
    )


def apply_settings(args: Namespace, settings: DataPlaneSettings, gate: Gate) -> Namespace:
    """Put our worker, scheduler, data plane and middleware into vLLM's namespace (in place)."""
    extra = args.additional_config or {}
    if isinstance(extra, str):
        extra = json.loads(extra)
    if KEY in extra:
        raise ConfigError(f"--additional-config has the key {KEY!r}, which is ours.", hint="Use loramux's options.")
    options = settings.engine_options()
    options["additional_config"] |= extra
    for name, value in options.items():
        setattr(args, name, value)
    install(args, gate)
    # vLLM adds these last and in order, each around those before it: the last is the outermost.
    ours = [f"{middleware.__module__}.{middleware.__name__}" for middleware in reversed(MIDDLEWARE)]
    args.middleware = [*args.middleware, *ours]
    args.disable_uvicorn_access_log = True  # ours says the same and more
    return args


def adapter_bytes(asked: int | None) -> int:
    """Adapter memory: what was asked, else 10 % of the device, 1 GiB on a CPU."""
    if asked is not None:
        return asked
    if current_platform.is_cpu():
        return _CPU_ADAPTER_BYTES
    return int(current_platform.get_device_total_memory()) // 10


def device_name() -> str:
    """For the memory plan."""
    return "CPU" if current_platform.is_cpu() else str(current_platform.get_device_name())


def on_device() -> bool:
    """Whether kernels of a device that is no CPU will serve."""
    return not current_platform.is_cpu()


def kv_cache_line(args: Namespace) -> str:
    """For the memory plan: vLLM decides the rest."""
    if current_platform.is_cpu():
        return f"{os.environ['VLLM_CPU_KVCACHE_SPACE']} GiB (VLLM_CPU_KVCACHE_SPACE)"
    return f"what is left of {args.gpu_memory_utilization:.0%} of the device (--gpu-memory-utilization)"


def max_requests(args: Namespace) -> int:
    """How many requests may run at once: --max-num-seqs, or what vLLM takes without it."""
    if args.max_num_seqs is not None:
        return int(args.max_num_seqs)
    _, defaults = AsyncEngineArgs.get_batch_defaults(world_size=1)
    number = defaults[UsageContext.OPENAI_API_SERVER]
    if args.performance_mode == "throughput":
        number *= 2
    return min(number, args.max_num_batched_tokens or number)


def _plugins(named: str | None) -> list[str]:
    """What VLLM_PLUGINS must hold for our routes to load without unloading anything that would load anyway."""
    if named is not None:
        names = [name for name in named.split(",") if name]
    else:
        names = [e.name for group in _PLUGIN_GROUPS for e in entry_points(group=f"vllm.{group}_plugins")]
    return list(dict.fromkeys([*names, KEY]))


def item_bytes(args: Namespace) -> int:
    """Bytes of one adapter weight in the pool, which has the base model's dtype."""
    return 4 if str(args.dtype) in ("float32", "float") else 2
