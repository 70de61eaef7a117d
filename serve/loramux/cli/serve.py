"""`loramux serve`: check everything, plan memory, then start vLLM's server with our parts in it."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

from loramux import supervisor
from loramux.bases import prepare_base
from loramux.cli.base import read_layers
from loramux.cli.start_adapters import (
    FEW,
    check,
    composed_folder,
    draw_memory_of,
    draws_among,
    find,
    memory_of,
    open_store,
)
from loramux.config import ServeConfig, parse
from loramux.console import box, say
from loramux.errors import ConfigError, LoramuxError
from loramux.http import logs
from loramux.http.keys import KeyRing
from loramux.paths import cache_dir
from loramux.plan import LISTED, SLOTS, MemoryPlan, rank_limit
from loramux.registry import AdapterRegistry, Posteriors, State
from loramux.units import format_bytes
from loramux_adapters import prepare
from loramux_adapters.compose.prepared import compose


def main(argv: list[str]) -> int:
    """Exit status: 0 served or checked, 1 refused to start.

    Two processes serve: this one starts itself again as the server, and the server when that dies.
    """
    try:
        config = parse(argv)
        if config.dry_run or supervisor.is_server():
            return run(config)
        return supervisor.supervise(supervisor.server_command(argv))
    except LoramuxError as error:
        say(f"loramux: {error}")
        return 1


def run(config: ServeConfig) -> int:
    """Raises LoramuxError if the server must not start."""
    keys = KeyRing.build(config.api_keys, config.admin_key, config.keys_file)
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
    if args.quantization:  # then what is served are other numbers than the files'
        base = replace(base, weights=None)
    cache = cache_dir() / "artefacts"
    read = functools.partial(prepare, base=base, cache=cache)
    store = open_store(config, base, args.port, cache)
    adapters = find(config, args.served_model_name)
    known = check(adapters, read, store, all_of_them=config.dry_run)

    few = len(known) <= FEW

    def exact(name: str) -> bool:
        return few or adapters[name].required

    item_bytes, requests, tiled = arguments.item_bytes(args), arguments.max_requests(args), arguments.on_device()
    measure = functools.partial(memory_of, base=base, item_bytes=item_bytes, max_requests=requests, tiled=tiled)
    measure_draw = functools.partial(
        draw_memory_of, base=base, item_bytes=item_bytes, max_requests=requests, tiled=tiled
    )
    plan = MemoryPlan(
        device=arguments.device_name(),
        dtype=str(args.dtype),
        adapter_bytes=arguments.adapter_bytes(config.adapter_memory),
        adapters={name: measure(artefact, exact=exact(name)) for name, artefact in known.items()},
        draws=draws_among({name: artefact for name, artefact in known.items() if exact(name)}, measure_draw),
        max_rank=rank_limit(config.max_rank, [artefact.summary.rank for artefact in known.values()]),
        kv_cache=arguments.kv_cache_line(args),
        score_bytes=config.score_memory,
        unread=sum(name not in known and not given.settle for name, given in adapters.items()),
    )
    say(*box("memory plan", plan.lines()))
    named = sum(size for name, size in plan.adapters.items() if adapters[name].required)
    if named > plan.adapter_bytes:
        raise ConfigError(
            f"The adapters named one by one need {format_bytes(named)}, adapter memory is "
            f"{format_bytes(plan.adapter_bytes)}.",
            hint=f"Start with --adapter-memory {named // 2**20 + 1}MiB or more, or leave some out.",
        )
    if config.dry_run:
        return 0

    def ready(registry: AdapterRegistry) -> None:
        supervisor.announce_ready()
        say(*summary(args.host, args.port, registry, plan))

    settings = DataPlaneSettings(
        adapter_bytes=plan.adapter_bytes, slots=SLOTS, max_rank=plan.max_rank, score_bytes=plan.score_bytes
    )
    made = composed_folder(config, base, args.port, cache)
    launch = Launch(
        base=served_name,
        prepare=read,
        compose=functools.partial(compose, base=base, cache=made, max_rank=plan.max_rank),
        posteriors=Posteriors(made / "draws", max_rank=plan.max_rank, draw_bytes=measure_draw),
        store=store,
        # What was just read is not read twice.
        adapters={name: replace(given, artefact=known.get(name)) for name, given in adapters.items()},
        roots=(*config.adapter_roots, *config.adapter_dirs),
        patience_s=config.load_patience_s,
        ready=ready,
    )
    logs.log_to(logs.stdout())
    serve(arguments.apply_settings(args, settings, arguments.make_gate(config, keys, args)), launch)
    return 0


def summary(host: str, port: int, registry: AdapterRegistry, plan: MemoryPlan) -> list[str]:
    """What a person needs once the server answers."""
    adapters = [adapter for _, adapter in sorted(registry.adapters().items())]
    served = [adapter for adapter in adapters if adapter.current.artefact is not None]
    failed = [adapter for adapter in adapters if adapter.current.state is State.FAILED]
    rows = [f"http://{host}:{port}/v1", "", f"base      {registry.base}"]
    for adapter in served[:LISTED]:
        assert adapter.current.artefact is not None
        content = adapter.current.artefact.summary
        rows.append(f"adapter   {adapter.name}  ({content.method}, rank {content.rank})")
    rows += [f"failed    {a.name}: {a.current.error.message}" for a in failed[:LISTED] if a.current.error is not None]
    if (more := len(adapters) - len(served[:LISTED]) - len(failed[:LISTED])) > 0:
        rows.append(f"          … and {more} more (GET /v1/adapters)")
    rows += ["", *plan.lines(), "", "try it:"]
    model = served[0].name if served else registry.base
    rows.append(
        f"  curl -s http://{host}:{port}/v1/chat/completions -H 'Content-Type: application/json' -d "
        f"""'{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello!"}}]}}'"""
    )
    return box("loramux is ready", rows)
