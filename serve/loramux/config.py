"""What `loramux serve` was asked to do: command line over YAML file over defaults.

Options that are not ours go to vLLM as they are, from the command line (`--max-model-len 4096`) and from the file
(`max-model-len: 4096`).
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from loramux.bases import DEFAULT_BASE
from loramux.errors import ConfigError
from loramux.units import parse_bytes

#: A name goes into URLs, metrics labels and logs.
ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}")


@dataclass(frozen=True)
class ServeConfig:
    """Everything the start needs to know. Sizes in bytes."""

    base: str = DEFAULT_BASE
    adapters: dict[str, Path] = field(default_factory=dict)  # named one by one: a bad one stops the start
    adapter_dirs: tuple[Path, ...] = ()  # every subfolder is an adapter: a bad one is listed as failed
    adapter_roots: tuple[Path, ...] = ()  # where requests may load from
    adapter_memory: int | None = None  # None: 10 % of device memory, 1 GiB on CPU
    max_rank: int | None = None  # None: at least 256, more if an adapter named at the start has more
    dry_run: bool = False
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
    add("--config", metavar="FILE", help="(or -c FILE) YAML file with these options and vLLM's")
    add("--dry-run", action="store_true", help="check everything, print the memory plan, start nothing")
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


def parse(argv: Sequence[str]) -> ServeConfig:
    """Command line -> ServeConfig. Raises ConfigError; exits like argparse on `--help` and malformed options."""
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
        adapter_memory=_size(options.adapter_memory),
        max_rank=_rank(options.max_lora_rank),
        dry_run=options.dry_run,
        engine_args=tuple(engine_args),
    )


def _size(text: str | None) -> int | None:
    if text is None:
        return None
    try:
        size = parse_bytes(text)
    except ValueError as error:
        raise ConfigError(f"--adapter-memory: {error}.", hint="Leave it out for a tenth of the device.") from None
    if size == 0:
        raise ConfigError("--adapter-memory is 0.", hint="Leave it out for a tenth of the device.")
    return size


def _rank(rank: int | None) -> int | None:
    if rank is not None and rank < 1:
        raise ConfigError(f"--max-lora-rank is {rank}.", hint="Leave it out: it is derived.")
    return rank


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


def _read_file(path: Path) -> dict[str, Any]:
    try:
        value = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}.", hint="Give --config a file that exists.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {error}", hint="Write  base: NAME  and  adapter: {a: PATH}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} is not a mapping of options.", hint="Write  base: NAME  and  adapter: {a: PATH}")
    return {str(key).replace("_", "-"): item for key, item in value.items()}


def _file_argv(options: dict[str, Any]) -> list[str]:
    """The file's options as a command line."""
    args: list[str] = []
    for key, value in options.items():
        flag = f"--{'model' if key == 'base' else key}"
        if key == "adapter":
            args += [f"{flag}={name}={path}" for name, path in _mapping_of_adapters(value).items()]
        elif key in ("adapters", "adapter-root"):
            args += [f"{flag}={item}" for item in _list(value)]
        elif isinstance(value, bool):
            if value or key not in ("dry-run", "enable-lora"):  # ours have no negation
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
