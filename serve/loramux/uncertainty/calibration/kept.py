"""The calibrations of a server: applied to answers, kept by the registry's store."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from loramux.errors import CalibrationNotFound
from loramux.registry import Adapter, Store, Version
from loramux.registry.store import SavedCalibration
from loramux.uncertainty.calibration.calibration import Calibration, loaded
from loramux.uncertainty.calibration.settings import Settings


class Calibrations:
    """At most one for each version and settings. A change is on the disk before it is told."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def of(self, version: Version) -> Iterator[Calibration]:
        """Those of one content of one adapter; oldest first."""
        return self.of_content(version.name, version.artefact.digest) if version.artefact is not None else iter(())

    def of_content(self, name: str, digest: str) -> Iterator[Calibration]:
        """As `of`, by the whole digest. Any thread may ask."""
        for row in self._store.calibrations(name):
            if row.digest == digest:
                yield loaded(row.content)

    def cards(self, adapter: Adapter) -> list[dict[str, Any]]:
        """What the API tells of those of an adapter's versions, the current one's first."""
        return [
            {**calibration.card(), "version": version.digest}
            for version in adapter.versions()
            for calibration in self.of(version)
        ]

    def applied(
        self, version: Version, told: Mapping[str, Any], labels: Sequence[str], alpha: float | None
    ) -> dict[str, Any] | None:
        """The field `uncertainty` of an answer, calibrated; None if nothing was calibrated for just this.

        What is partial, or failed, was not scored as the calibration's items were.
        """
        if told["partial"]:
            return None
        settings = Settings.of(told, labels)
        found = next((one for one in self.of(version) if one.settings == settings), None)
        return None if found is None else found.applied(told, alpha)

    async def keep(self, version: Version, calibration: Calibration) -> None:
        """In the place of one with the same settings. Raises StateNotWritten."""
        assert version.artefact is not None
        row = SavedCalibration(calibration.id, version.name, version.artefact.digest, calibration.dumped())
        replaced = [
            other
            for other in self._store.calibrations(row.name)
            if other.digest == row.digest and loaded(other.content).settings == calibration.settings
        ]
        await asyncio.to_thread(self._store.keep_calibration, row, replaced)

    def find(self, id: str) -> SavedCalibration:
        """Raises CalibrationNotFound."""
        if (row := self._store.calibration(id)) is None:
            raise CalibrationNotFound(
                f"There is no calibration {id[:64]!r}.", hint="GET /v1/adapters/NAME lists those of an adapter."
            )
        return row

    async def forget(self, row: SavedCalibration) -> dict[str, Any]:
        """Its card. Raises StateNotWritten."""
        await asyncio.to_thread(self._store.forget_calibration, row)
        return loaded(row.content).card()
