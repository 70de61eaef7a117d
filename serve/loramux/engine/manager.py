"""The adapters of one worker: what vLLM's model runner calls, and what the API process asks for between steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.lora.request import LoRARequest

from loramux.engine.entropies import Entropies
from loramux.engine.loads import Arrived, Loads
from loramux.engine.routing import RoutingMonitor
from loramux.engine.sequences import CountedSequences, uncountable
from loramux.engine.settings import DataPlaneSettings
from loramux.engine.wrappers import base_biases, find_sites, wrap
from loramux.staging import Setup, Staging
from loramux_kernels import AdapterPool, CountRows

logger = init_logger("vllm.loramux")


class AdapterManager:
    """Takes the place of vLLM's LoRA manager on the model runner (same method names, no inheritance).

    Everything reached from inside an engine step (`step`, `idle`) must not raise: an exception there ends the
    engine for every user. A row whose version is not resident is served by nobody: its request is reported in
    `missing`.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        self._config = vllm_config
        self._settings = DataPlaneSettings.from_config(vllm_config.additional_config)
        self._device = device
        self._slots: dict[int, int] = {}  # version id -> slot
        self._lenders: dict[int, Arrived] = {}  # those of them that have borrowed nothing
        self._in_dummy_run = False
        self.missing: set[str] = set()
        self.entropies = Entropies()
        self.sequences: CountedSequences
        self.pool: AdapterPool
        self.loads: Loads
        self.routing: RoutingMonitor

    def install(self, model: nn.Module) -> nn.Module:
        """Build the pool for `model`, whose weights are loaded, and wrap its linears. Called once, before memory is
        profiled."""
        scheduler = self._config.scheduler_config
        specs = find_sites(model)
        self.pool = AdapterPool(
            specs,
            capacity_bytes=self._settings.adapter_bytes,
            slots=self._settings.slots,
            max_rank=self._settings.max_rank,
            max_tokens=max(scheduler.max_num_batched_tokens, scheduler.max_num_seqs),
            max_requests=scheduler.max_num_seqs,
            dtype=cast(torch.dtype, self._config.model_config.dtype),  # resolved by vLLM
            device=self._device,
        )
        self.routing = RoutingMonitor(self.pool)
        self.sequences = CountedSequences(scheduler.max_num_seqs)
        setup = Setup.of(self.pool, base_biases(model, specs))
        self.loads = Loads(self.pool, Staging(setup, pin=self._device.type == "cuda"), uncountable(self._config))
        wrap(model, specs, self.pool.site_ids, [self.pool.h_width(i) for i in range(len(specs))])
        self.pool.warmup()
        logger.info("loramux: %d sites, %.0f MiB of adapter memory", len(specs), self.pool.capacity_bytes / 2**20)
        return model

    # -- inside an engine step: never raises

    def step(self, version_ids: np.ndarray, lengths: np.ndarray, request_ids: Sequence[str]) -> None:
        """Say which version each request of the coming forward pass uses, and how many tokens it has there."""
        ids = version_ids.tolist()
        slots = np.fromiter((self._slots.get(i, -1) for i in ids), dtype=np.int32, count=len(ids))
        try:
            counts = self._count_rows(slots, lengths, request_ids)
            self.pool.set_batch(slots, np.ascontiguousarray(lengths, dtype=np.int32), counts)
        except Exception:
            logger.exception("no adapter could be applied in this step: its requests end with an error")
            slots.fill(-1)
            self.pool.set_idle(False)
        self.uncritical(self.routing.before, slots, lengths, request_ids)
        self.uncritical(self.entropies.order, request_ids)
        self.missing = {request_ids[row] for row, i in enumerate(ids) if i and slots[row] < 0}

    def _count_rows(self, slots: np.ndarray, lengths: np.ndarray, request_ids: Sequence[str]) -> CountRows | None:
        """Where the step's counts are, if an adapter of it has a capacity. Gives those no adapter who have none."""
        places = self.pool.limited(slots)
        if not places.size:
            return None
        rows, lost = self.sequences.rows(places, lengths, request_ids)
        for place in lost:
            logger.error(
                "request %s began behind tokens that were not counted: it ends with an error", request_ids[place]
            )
        slots[lost] = -1
        return rows

    def scheduled(self, scheduler_output: Any) -> None:
        """vLLM's SchedulerOutput of the coming step."""
        self.sequences.scheduled(scheduler_output)

    def forward_issued(self) -> None:
        """The ops of the step have been issued to the device."""
        self.uncritical(self.routing.after)

    def uncritical(self, observe: Callable[..., None], *args: Any) -> None:
        """Call what only serves statistics: it must cost no answer."""
        try:
            observe(*args)
        except Exception:
            logger.exception("not all that requests ask of this step is counted or read")

    def idle(self, launch: bool) -> None:
        """A profile run or graph capture: with `launch`, kernels run over an empty batch, to be captured."""
        self.missing = set()
        self.pool.set_idle(launch)

    def take_missing(self) -> frozenset[str]:
        """Requests of the last step whose version was not resident, once: a later step has its own."""
        missing, self.missing = frozenset(self.missing), set()
        return missing

    # -- between engine steps: what the API process calls

    def begin(self, version_id: int, artefact: str, lender: int | None = None) -> None:
        """Have a lowered artefact read. What is the same in the version `lender` is borrowed, if that is resident."""
        self.loads.begin(version_id, artefact, None if lender is None else self._lenders.get(lender))

    def advance(self, version_id: int) -> dict[str, Any]:
        """Copy the next piece, if it has been read; a bounded pause between two steps.

        Returns `{"state": "reading" | "copying" | "resident" | "failed", "bytes": …, "error": {…}}`. After "reading"
        there was nothing to do.
        """
        progress = self.loads.advance(version_id)
        if isinstance(progress, Arrived):
            self._slots[version_id] = progress.slot
            if progress.whole:
                self._lenders[version_id] = progress
            if progress.mixture:
                self.routing.add_mixture(progress.slot, version_id)
            return {"state": "resident", "bytes": progress.nbytes}
        if isinstance(progress, dict):
            return {"state": "failed", "error": progress}
        return {"state": progress}

    def remove(self, version_id: int) -> bool:
        """Free a version's memory. Rows that still name it are served by nobody (see `missing`)."""
        self.loads.abandon(version_id)
        if (slot := self._slots.pop(version_id, None)) is None:
            return False
        self._lenders.pop(version_id, None)
        self.loads.lends_no_more(slot)
        self.routing.remove_slot(slot)
        self.pool.release(slot)
        return True

    def stats(self) -> dict[str, int]:
        pool = self.pool
        return {
            "capacity_bytes": pool.capacity_bytes,
            "used_bytes": pool.used_bytes,
            "overhead_bytes": pool.overhead_bytes,
            "resident": len(self._slots),
            "slots": pool.slots,
        }

    # -- what vLLM's runners call on `runner.lora_manager`

    def create_lora_manager(self, model: nn.Module, vllm_config: VllmConfig | None = None) -> nn.Module:
        return self.install(model)

    def supports_tower_connector_lora(self) -> bool:
        return False

    def get_dummy_lora_warmup_rank(self, default_rank: int) -> int:
        return default_rank

    @contextmanager
    def dummy_lora_cache(self) -> Iterator[None]:
        self._in_dummy_run = True
        yield

    def add_dummy_lora(self, lora_request: LoRARequest, rank: int) -> bool:
        return True

    def remove_all_adapters(self) -> None:
        # A dummy run ends with this call, and with data parallelism dummy runs happen while serving.
        if self._in_dummy_run:
            self._in_dummy_run = False
            return
        for version_id in list(self._slots):
            self.remove(version_id)

    def add_adapter(self, lora_request: LoRARequest) -> bool:
        """vLLM's own load path would read inside the engine step; ours is `begin` and `advance`."""
        if lora_request.lora_int_id in self._slots:
            return False
        raise ValueError(f"adapter {lora_request.lora_name!r} is not resident: load it through the loramux routes")

    def remove_adapter(self, version_id: int) -> bool:
        return self.remove(version_id)

    def pin_adapter(self, version_id: int) -> bool:
        return version_id in self._slots

    def list_adapters(self) -> set[int]:
        return set(self._slots)

    def set_active_adapters(self, lora_requests: set[LoRARequest], mapping: object) -> None:
        """Reached only for multi-modal towers, which `supports_tower_connector_lora` rules out."""
