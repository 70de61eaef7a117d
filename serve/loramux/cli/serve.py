"""`loramux serve`: check everything, plan memory, then start vLLM's server with our parts in it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

from loramux.bases import prepare_base
from loramux.cli.base import read_layers
from loramux.config import ADAPTER_NAME, ServeConfig, parse
from loramux.console import box, say
from loramux.errors import ConfigError, LoramuxError
from loramux.paths import cache_dir
from loramux.plan import SLOTS, MemoryPlan, rank_limit
from loramux.registry import AdapterRegistry, State
from loramux.units import format_bytes
from loramux_adapters import AdapterError, Artefact, BaseModel, open_artefact, prepare

Check = Callable[[Path], Artefact]


def main(argv: list[str]) -> int:
    """Exit status: 0 served or checked, 1 refused to start."""
    try:
        return run(parse(argv))
    except LoramuxError as error:
        say(f"loramux: {error}")
        return 1


def run(config: ServeConfig) -> int:
    """Raises LoramuxError if the server must not start."""
    model = str(prepare_base(config.base, progress=say))

    # vLLM reads its environment when it is imported.
    from loramux.engine import arguments, probe
    from loramux.engine.plugin import Launch
    from loramux.engine.server import serve
    from loramux.engine.settings import DataPlaneSettings

    served_name = Path(config.base).name if Path(config.base).is_dir() else config.base
    arguments.set_environment(model)
    args = arguments.parse_engine_args(config.engine_args, model=model, served_name=served_name)
    served_name = args.served_model_name[0]
    probe.check_installed()

    base = read_layers(model, served_name)
    check: Check = functools.partial(prepare, base=base, cache=cache_dir() / "artefacts")
    in_dirs = dict(found for folder in config.adapter_dirs for found in adapters_in(folder))
    tolerated = frozenset(in_dirs) - frozenset(config.adapters)
    # Those named one by one come first: they must fit, the others may.
    adapters = {**config.adapters, **{name: in_dirs[name] for name in in_dirs if name in tolerated}}
    if served_name in adapters:
        raise ConfigError(
            f"An adapter has the base model's name, {served_name}.",
            hint="Rename it, or give the base another name with --served-model-name.",
        )
    checked = check_all(adapters, tolerated, check)

    plan = MemoryPlan(
        device=arguments.device_name(),
        dtype=str(args.dtype),
        adapter_bytes=arguments.adapter_bytes(config.adapter_memory),
        adapters={name: pool_bytes(artefact, base, arguments.item_bytes(args)) for name, artefact in checked.items()},
        max_rank=rank_limit(config.max_rank, [artefact.summary.rank for artefact in checked.values()]),
        kv_cache=arguments.kv_cache_line(args),
    )
    say(*box("memory plan", plan.lines()))
    named = sum(size for name, size in plan.adapters.items() if name not in tolerated)
    if named > plan.adapter_bytes:
        raise ConfigError(
            f"The adapters named one by one need {format_bytes(named)}, adapter memory is "
            f"{format_bytes(plan.adapter_bytes)}.",
            hint=f"Start with --adapter-memory {named // 2**20 + 1}MiB or more, or leave some out.",
        )
    if config.dry_run:
        return 0
    settings = DataPlaneSettings(adapter_bytes=plan.adapter_bytes, slots=SLOTS, max_rank=plan.max_rank)
    fresh = {adapters[name]: artefact for name, artefact in checked.items()}
    launch = Launch(
        base=served_name,
        # What was just checked is not read twice; a later load of the same path is.
        prepare=lambda path: fresh.pop(path, None) or check(path),
        adapters=adapters,
        tolerated=tolerated,
        roots=(*config.adapter_roots, *config.adapter_dirs),
        ready=lambda registry: say(*summary(args.host, args.port, registry, plan)),
    )
    serve(arguments.apply_settings(args, settings), launch)
    return 0


def adapters_in(folder: Path) -> Iterator[tuple[str, Path]]:
    """Name and path of every adapter, folder or native file, in `folder`. Raises ConfigError if it does not exist."""
    if not folder.is_dir():
        raise ConfigError(f"--adapters {folder}: no such folder.")
    for path in sorted(folder.iterdir()):
        native = path.suffix == ".safetensors" and path.is_file()
        if not native and not (path.is_dir() and (any(path.glob("adapter_*")) or any(path.glob("*.safetensors")))):
            continue
        name = path.stem if native else path.name
        if ADAPTER_NAME.fullmatch(name):
            yield name, path
        else:
            say(f"adapter {name!r}: not served, this cannot be an adapter's name.")


def check_all(adapters: dict[str, Path], tolerated: frozenset[str], check: Check) -> dict[str, Artefact]:
    """Read and verify every adapter; a tolerated failure is reported, any other ends the start with all of them."""
    checked, refused = {}, []
    for name, path in adapters.items():
        try:
            checked[name] = check(path)
        except AdapterError as error:
            say(f"adapter {name}: {error}")
            if name not in tolerated:
                refused.append(name)
        except OSError as error:
            raise ConfigError(
                f"adapter {name}: {error}.", hint="Is there space in the cache? LORAMUX_CACHE names another folder."
            ) from error
    if refused:
        raise ConfigError(
            f"Not started: {', '.join(refused)} cannot be served exactly (see above).",
            hint="Leave them out, or serve a folder with --adapters DIR, which lists what fails instead.",
        )
    return checked


def pool_bytes(artefact: Artefact, base: BaseModel, item_bytes: int) -> int:
    """Bytes of an adapter's weights in the pool, routers included, up to alignment."""
    adapter = open_artefact(artefact.path)
    weights = 0
    for module, site in adapter.sites.items():
        d_in, d_out = base.linears[module]
        experts = adapter.gates[site.gate].experts if site.gate is not None else 0
        weights += site.rank * (d_in + d_out) + experts * d_in
    return weights * item_bytes


def summary(host: str, port: int, registry: AdapterRegistry, plan: MemoryPlan) -> list[str]:
    """What a person needs once the server answers."""
    entries = registry.entries().values()
    served = [e for e in entries if e.state is State.RESIDENT]
    model = served[0].name if served else registry.base
    rows = [f"http://{host}:{port}/v1", "", f"base      {registry.base}"]
    for entry in served:
        assert entry.artefact is not None
        rows.append(f"adapter   {entry.name}  ({entry.artefact.summary.method}, rank {entry.artefact.summary.rank})")
    rows += [f"failed    {e.name}: {e.error.message}" for e in entries if e.error is not None]
    rows += ["", *plan.lines(), "", "try it:"]
    rows.append(
        f"  curl -s http://{host}:{port}/v1/chat/completions -H 'Content-Type: application/json' -d "
        f"""'{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello!"}}]}}'"""
    )
    return box("loramux is ready", rows)
