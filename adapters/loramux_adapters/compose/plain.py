"""Which adapters are one matrix per layer, and so can be parts of another."""

from collections.abc import Collection

from loramux_adapters.errors import AdapterUnsupportedFeature, shown
from loramux_adapters.lowered import LoweredAdapter


def check_plain(name: str, adapter: LoweredAdapter, fields: Collection[str], hint: str) -> None:
    """Raises AdapterUnsupportedFeature if the adapter is a mixture, or a site of it has one of `fields`."""
    used = [field for field in ("gates", "ffn") if getattr(adapter, field)]
    for site in adapter.sites.values():
        used += [field for field in fields if getattr(site, field) is not None]
    if used:
        raise AdapterUnsupportedFeature(
            f"Adapter {shown(name)} ({adapter.method}) is not a plain LoRA: it uses {used[0]}.", hint=hint, field=name
        )
