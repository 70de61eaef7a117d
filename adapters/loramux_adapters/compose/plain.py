"""Which adapters are one matrix per layer, and so can be parts of another."""

from collections.abc import Collection

from loramux_adapters.errors import AdapterUnsupportedFeature, shown
from loramux_adapters.lowered import LoweredAdapter

NOT_LORA = ("gate", "magnitude", "bias", "carry", "variance")
"""What a site of a plain LoRA has none of."""


def check_plain(name: str, adapter: LoweredAdapter, hint: str, fields: Collection[str] = NOT_LORA) -> None:
    """Raises AdapterUnsupportedFeature if the adapter is a mixture, or a site of it has one of `fields`."""
    used = [field for field in ("gates", "ffn") if getattr(adapter, field)]
    for site in adapter.sites.values():
        used += [field for field in fields if getattr(site, field) is not None]
    if used:
        raise AdapterUnsupportedFeature(
            f"Adapter {shown(name)} ({adapter.method}) is not a plain LoRA: it uses {used[0]}.", hint=hint, field=name
        )
