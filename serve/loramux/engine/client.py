"""The API process's side of the data plane: collective RPC to the workers, between engine steps."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

from loramux.errors import AdapterRefused, LoramuxError, PoolExhausted
from loramux.rpc import Workers, call
from loramux_adapters import Artefact

_POLL_S = 0.005


class EngineDataPlane:
    """Implements `loramux.registry.DataPlane` over an engine client."""

    def __init__(self, engine: Workers) -> None:
        self._engine = engine

    async def load(self, version_id: int, artefact: Artefact, lender: int | None = None) -> int:
        """Copy an artefact into every worker's pool in bounded pieces; returns its bytes there, without what it borrows
        of the version `lender`.

        Raises PoolExhausted, AdapterRefused.
        """
        try:
            await call(self._engine, "loramux_begin", version_id, str(artefact.path), lender)
            while (progress := await call(self._engine, "loramux_advance", version_id))["state"] != "resident":
                if progress["state"] == "failed":
                    raise _as_error(progress["error"])
                if progress["state"] == "reading":
                    await asyncio.sleep(_POLL_S)
        except BaseException:
            with suppress(Exception):  # the engine may be gone; the first error tells more
                await self.unload(version_id)
            raise
        return int(progress["bytes"])

    async def unload(self, version_id: int) -> None:
        await call(self._engine, "loramux_remove", version_id)

    async def stats(self) -> dict[str, int]:
        """Bytes and slots of the pool, see `AdapterManager.stats`."""
        stats: dict[str, int] = await call(self._engine, "loramux_stats")
        return stats

    async def score_rows(self) -> int:
        """Tokens whose probabilities over the vocabulary can be summed at once, see `Scoring`."""
        rows: int = await call(self._engine, "loramux_score_rows")
        return rows


def _as_error(error: dict[str, Any]) -> LoramuxError:
    if error["code"] == "adapter_memory_full":
        return PoolExhausted.of(error["needed"], error["free"])
    return AdapterRefused(
        error["message"],
        code=error["code"],
        hint="`loramux serve BASE --adapter NAME=PATH --dry-run` checks an adapter against a base.",
    )
