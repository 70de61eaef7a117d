"""What `loramux serve` was asked to do: command line over YAML file over defaults.

Options that are not ours go to vLLM as they are, from the command line (`--max-model-len 4096`) and from the file
(`max-model-len: 4096`).
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from loramux.bases import DEFAULT_BASE
from loramux.errors import ConfigError
from loramux.units import parse_bytes

#: A name goes into URLs, metrics labels and logs.
ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}")

#: How long a request waits for its adapter, by default.
LOAD_PATIENCE_S = 30.0

#: Bytes of a request's body, by default: a prompt with some images in it, but no flood.
MAX_BODY = 32 * 2**20

#: Bytes for summing probabilities over draws: 1365 tokens of a vocabulary of 49k at once, 523 of 128k.
SCORE_MEMORY = 256 * 2**20
#: A row for every token of any vocabulary.
_LEAST_SCORE_MEMORY = 4 * 2**20

#: Keys of the environment: two for requests, one for changes. vLLM's guards less there (/v1 only) than here.
KEY_VARIABLES = ("LORAMUX_API_KEY", "VLLM_API_KEY", "LORAMUX_ADMIN_KEY")


@dataclass(frozen=True)
class ServeConfig:
    """Everything the start needs to know. Sizes in bytes."""

    base: str = DEFAULT_BASE
    adapters: dict[str, Path] = field(default_factory=dict)  # named one by one: a bad one stops the start
    adapter_dirs: tuple[Path, ...] = ()  # every subfolder is an adapter: a bad one is listed as failed
    adapter_roots: tuple[Path, ...] = ()  # where requests may load from
    adapter_memory: int | None = None  # None: 10 % of device memory, 1 GiB on CPU
    score_memory: int = SCORE_MEMORY
    max_rank: int | None = None  # None: at least 256, more if an adapter named at the start has more
    state: Path | None = None  # None: in the cache folder, by base and port
    load_patience_s: float = LOAD_PATIENCE_S
    dry_run: bool = False
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    admin_key: str | None = field(default=None, repr=False)
    keys_file: Path | None = None
    protect_metrics: bool = False
    max_body: int = MAX_BODY
    access_log: bool = True
    engine_args: tuple[str, ...] = ()  # for vLLM


def parser() -> argparse.ArgumentParser:
    """Our options; vLLM's are not listed here."""
    parser = argparse.ArgumentParser(
        prog="loramux serve",
        usage="loramux serve [BASE] [options] [any option of `vllm serve`]",
        description="Serve a base model and its adapters behind an OpenAI-compatible endpoint.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--adapter", metavar="NAME=PATH", action="append", default=[], help="an adapter to serve; repeatable")
    add(
        "--adapters",
        metavar="DIR",
        action="append",
        default=[],
        help="serve every adapter folder in DIR; repeatable",
    )
    add("--adapter-root", metavar="DIR", action="append", default=[], help="let requests load from DIR; repeatable")
    add("--adapter-memory", metavar="SIZE", help="memory for adapters, e.g. 2GiB (default: 10 %% of the device)")
    add("--score-memory", metavar="SIZE", help="memory for scores of Bayesian adapters (default: 256MiB)")
    add("--state", metavar="FILE", help="where adapters that were put outlive the server (default: in the cache)")
    add(
        "--load-patience",
        metavar="S",
        type=float,
        default=LOAD_PATIENCE_S,
        help="seconds that a request waits for its adapter to load (default: 30)",
    )
    add("--config", metavar="FILE", help="(or -c FILE) YAML file with these options and vLLM's")
    add("--dry-run", action="store_true", help="check everything, print the memory plan, start nothing")
    keys = parser.add_argument_group("who may use the server, and how much at once")
    keys.add_argument(
        "--api-key",
        metavar="KEY",
        nargs="+",
        action="extend",
        default=[],
        help="a key that requests must show; repeatable (also: LORAMUX_API_KEY)",
    )
    keys.add_argument(
        "--admin-key", metavar="KEY", help="the key for changing what is served (also: LORAMUX_ADMIN_KEY)"
    )
    keys.add_argument("--keys", metavar="FILE", help="YAML file of named keys, each for some adapters only")
    keys.add_argument("--protect-metrics", action="store_true", help="/metrics needs a key too")
    keys.add_argument("--max-body", metavar="SIZE", help="largest body of a request (default: 32MiB)")
    keys.add_argument(
        "--access-log",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="one line of JSON per request on standard output",
    )
    vllm = parser.add_argument_group("vLLM's adapter options, understood")
    vllm.add_argument("--model", metavar="BASE", help="as BASE")
    vllm.add_argument(
        "--lora-modules", nargs="+", action="extend", default=[], metavar="NAME=PATH", help="as --adapter"
    )
    vllm.add_argument(
        "--max-lora-rank", type=int, metavar="R", help="largest rank to leave room for (default: derived)"
    )
    for flag in ("--enable-lora", "--max-loras", "--max-cpu-loras"):
        nargs = {"action": "store_true"} if flag == "--enable-lora" else {"metavar": "N"}
        vllm.add_argument(flag, help="not needed: derived", **nargs)  # type: ignore[arg-type]
    return parser


def parse(argv: Sequence[str], environ: Mapping[str, str] = os.environ) -> ServeConfig:
    """Command line, and keys in the environment -> ServeConfig.

    Raises ConfigError; exits like argparse on `--help` and malformed options.
    """
    argv = list(argv)
    base = argv.pop(0) if argv and not argv[0].startswith("-") else None
    # Not an option of the parser: it would swallow vLLM's -cc and the like, which argparse reads as -c with a value.
    argv = ["--config" if text == "-c" else text for text in argv]
    options, _ = parser().parse_known_args(argv)
    # The command line comes last, so it wins.
    in_file = _file_argv(_read_file(Path(options.config))) if options.config else []
    options, engine_args = parser().parse_known_args([*in_file, *argv])
    return ServeConfig(
        base=base or options.model or DEFAULT_BASE,
        adapters=dict(_named(text) for text in [*options.adapter, *options.lora_modules]),
        adapter_dirs=tuple(map(Path, options.adapters)),
        adapter_roots=tuple(map(Path, options.adapter_root)),
        adapter_memory=_size("--adapter-memory", options.adapter_memory, "a tenth of the device"),
        score_memory=_score_memory(options.score_memory),
        max_rank=_rank(options.max_lora_rank),
        state=Path(options.state) if options.state else None,
        load_patience_s=_patience(options.load_patience),
        dry_run=options.dry_run,
        api_keys=(*options.api_key, *filter(None, map(environ.get, KEY_VARIABLES[:2]))),
        admin_key=options.admin_key or environ.get(KEY_VARIABLES[2]) or None,
        keys_file=Path(options.keys) if options.keys else None,
        protect_metrics=options.protect_metrics,
        max_body=_size("--max-body", options.max_body, "32MiB") or MAX_BODY,
        access_log=options.access_log,
        engine_args=tuple(engine_args),
    )


def _size(option: str, text: str | None, default: str) -> int | None:
    if text is None:
        return None
    try:
        size = parse_bytes(text)
    except ValueError as error:
        raise ConfigError(f"{option}: {error}.", hint=f"Leave it out for {default}.") from None
    if size == 0:
        raise ConfigError(f"{option} is 0.", hint=f"Leave it out for {default}.")
    return size


def _score_memory(text: str | None) -> int:
    size = _size("--score-memory", text, "256MiB") or SCORE_MEMORY
    if size < _LEAST_SCORE_MEMORY:
        raise ConfigError("--score-memory is less than 4MiB.", hint="Leave it out for 256MiB.")
    return size


def _rank(rank: int | None) -> int | None:
    if rank is not None and rank < 1:
        raise ConfigError(f"--max-lora-rank is {rank}.", hint="Leave it out: it is derived.")
    return rank


def _patience(seconds: float) -> float:
    if not 0 < seconds <= 3600:
        raise ConfigError(f"--load-patience is {seconds:g}.", hint="Give seconds, up to 3600.")
    return seconds


def _named(text: str) -> tuple[str, Path]:
    """`NAME=PATH`, or vLLM's JSON form `{"name": …, "path": …}`."""
    if text.lstrip().startswith("{"):
        try:
            value = json.loads(text)
            name, path = value["name"], str(Path(value["path"]))
        except (ValueError, KeyError, TypeError):
            raise ConfigError(f'{text} is not {{"name": …, "path": …}}.', hint="Or write NAME=PATH.") from None
    else:
        name, equals, path = text.partition("=")
        if not equals or not path:
            raise ConfigError(f"{text!r} does not name an adapter.", hint="Write --adapter NAME=PATH.")
    return _checked_name(name), Path(path)


def _checked_name(name: object) -> str:
    if not isinstance(name, str) or not ADAPTER_NAME.fullmatch(name):
        raise ConfigError(
            f"{name!r} cannot be an adapter's name.",
            hint="Use letters, digits and . _ : / - ; start with a letter or digit; at most 128 characters.",
        )
    return name


def read_yaml(path: Path, *, hint: str) -> dict[Any, Any]:
    """A YAML file that is a mapping. Raises ConfigError, which quotes nothing of the file: there may be keys in it."""
    try:
        value = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}.", hint="Name a file that exists and can be read.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        raise ConfigError(f"{path} is not YAML{f' (line {mark.line + 1})' if mark else ''}.", hint=hint) from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} is not a mapping.", hint=hint)
    return value


def _read_file(path: Path) -> dict[str, Any]:
    options = read_yaml(path, hint="Write  base: NAME  and  adapter: {a: PATH}")
    return {str(key).replace("_", "-"): item for key, item in options.items()}


def _file_argv(options: dict[str, Any]) -> list[str]:
    """The file's options as a command line."""
    args: list[str] = []
    for key, value in options.items():
        flag = f"--{'model' if key == 'base' else key}"
        if key == "adapter":
            args += [f"{flag}={name}={path}" for name, path in _mapping_of_adapters(value).items()]
        elif key in ("adapters", "adapter-root", "api-key", "admin-key"):
            args += [f"{flag}={item}" for item in _list(value)]
        elif isinstance(value, bool):
            if value or key not in ("dry-run", "enable-lora", "protect-metrics"):  # ours have no negation
                args.append(flag if value else f"--no-{key}")
        elif isinstance(value, dict):
            args += [flag, json.dumps(value)]
        elif value is not None:  # a key without a value is not set
            args += [flag, *(json.dumps(i) if isinstance(i, dict) else str(i) for i in _list(value))]
    return args


def _mapping_of_adapters(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(path, str) for path in value.values()):
        raise ConfigError("`adapter` in the file is not a mapping.", hint="Write  adapter: {sql: ./adapters/sql}")
    return {_checked_name(name): path for name, path in value.items()}


def _list(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]
