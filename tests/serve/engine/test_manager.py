"""The adapters of one worker over a real pool on the CPU: loading in pieces, failing cleanly, and steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from loramux.engine.loads import Loads
from loramux.engine.manager import AdapterManager
from loramux.engine.routing import RoutingMonitor
from loramux.engine.sequences import CountedSequences
from loramux.engine.settings import DataPlaneSettings
from loramux.staging import Setup, Staging
from loramux_adapters.artefact import digest_of, write_artefact
from loramux_adapters.gate import Capacity, Gate
from loramux_adapters.lowered import LoweredAdapter, LoweredSite
from loramux_kernels import AdapterPool, SiteSpec, expand, shrink

from ..stagers import launch_thread

SITES = [
    SiteSpec(name="qkv_proj", modules=("q_proj", "k_proj", "v_proj"), d_in=24, d_outs=(24, 12, 12)),
    SiteSpec(name="down_proj", modules=("down_proj",), d_in=40, d_outs=(24,)),
]
WIDTHS = {m: (s.d_in, d_out) for s in SITES for m, d_out in zip(s.modules, s.d_outs, strict=True)}
ENOUGH = 2**20


_made: list[AdapterManager] = []


@pytest.fixture(autouse=True)
def stagers_end() -> Iterator[None]:
    yield
    while _made:
        _made.pop().loads.close()


def make_manager(
    capacity_bytes: int = 2**20,
    slots: int = 4,
    *,
    setup: Mapping[str, Any] = {},
    uncountable: str | None = None,
) -> AdapterManager:
    settings = DataPlaneSettings(adapter_bytes=capacity_bytes, slots=slots, max_rank=16)
    manager = AdapterManager(SimpleNamespace(additional_config=settings.as_config()), torch.device("cpu"))  # type: ignore[arg-type]
    manager.pool = AdapterPool(
        SITES,
        capacity_bytes=capacity_bytes,
        slots=slots,
        max_rank=16,
        max_tokens=32,
        max_requests=8,
        dtype=torch.float32,
        device="cpu",
    )
    manager.routing = RoutingMonitor(manager.pool)
    manager.sequences = CountedSequences(8)
    options = {"base_biases": {}, "piece_bytes": ENOUGH, **setup}
    staging = Staging(Setup(manager.pool.geometry, **options), launch=launch_thread)
    manager.loads = Loads(manager.pool, staging, uncountable)
    _made.append(manager)
    return manager


@pytest.fixture
def artefact(tmp_path: Path) -> Callable[..., str]:
    def write(seed: int, ranks: Mapping[str, int] = dict.fromkeys(WIDTHS, 4), **widths: int) -> str:
        generator = torch.Generator().manual_seed(seed)
        sites = {}
        for module, rank in ranks.items():
            d_in, d_out = WIDTHS.get(module, (8, 8))
            sites[module] = LoweredSite(
                torch.randn(rank, widths.get("d_in", d_in), generator=generator),
                torch.randn(rank, d_out, generator=generator),
                torch.rand(rank, generator=generator),
            )
        adapter = LoweredAdapter("lora", sites)
        return str(write_artefact(adapter, "base", digest_of(adapter), tmp_path))

    return write


def finish(manager: AdapterManager, version_id: int) -> list[dict[str, Any]]:
    """Advance until the load has ended; all answers but the waiting for the stager."""
    answers: list[dict[str, Any]] = []
    deadline = time.monotonic() + 10
    while not answers or answers[-1]["state"] == "copying":
        assert time.monotonic() < deadline
        progress = manager.advance(version_id)
        if progress["state"] == "reading":
            time.sleep(0.001)
        else:
            answers.append(progress)
    return answers


def load(manager: AdapterManager, version_id: int, path: str) -> dict[str, Any]:
    manager.begin(version_id, path)
    return finish(manager, version_id)[-1]


def step(manager: AdapterManager, versions: list[int], lengths: list[int]) -> None:
    manager.step(np.array(versions, np.int64), np.array(lengths, np.int32), [f"r{i}" for i in range(len(versions))])


def delta(manager: AdapterManager, tokens: int) -> torch.Tensor:
    """What the adapters of the step add at the first site."""
    x = torch.randn(tokens, 24, generator=torch.Generator().manual_seed(9))
    y = torch.zeros(tokens, 48)
    site = manager.pool.site_ids[0]
    expand(y, shrink(x, site, manager.pool.h_width(0)), site)
    return y


def test_a_load_ends_resident_and_reports_its_bytes(artefact: Callable[..., str]) -> None:
    manager = make_manager()
    answer = load(manager, 1, artefact(1))
    assert answer == {"state": "resident", "bytes": manager.pool.used_bytes}
    assert manager.list_adapters() == {1}
    assert manager.stats()["resident"] == 1
    assert manager.remove(1)
    assert (manager.stats()["used_bytes"], manager.list_adapters()) == (0, set())
    assert not manager.remove(1)


def test_what_is_served_is_what_is_in_the_artefact(artefact: Callable[..., str]) -> None:
    from loramux_adapters import open_artefact

    manager, path = make_manager(), artefact(1)
    load(manager, 1, path)
    step(manager, [0, 1], [2, 3])
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(9))
    expected = torch.zeros(5, 48)
    for module, columns in (("q_proj", slice(0, 24)), ("k_proj", slice(24, 36)), ("v_proj", slice(36, 48))):
        site = open_artefact(Path(path)).sites[module]
        expected[2:, columns] = (x[2:] @ site.a.T * site.scale) @ site.b
    torch.testing.assert_close(delta(manager, 5), expected)


@pytest.mark.parametrize("own", [None, torch.linspace(-1, 1, 12)])
def test_magnitude_and_bias_are_served_and_the_bases_own_bias_stays(tmp_path: Path, own: torch.Tensor | None) -> None:
    """With rank, and without any; beside them a module that has neither."""
    generator = torch.Generator().manual_seed(2)
    magnitude, bias = torch.rand(12, generator=generator) + 0.5, torch.randn(12, generator=generator)
    a, b = torch.randn(4, 24, generator=generator), torch.randn(4, 12, generator=generator)
    sites = {
        "k_proj": LoweredSite(a, b, torch.full((4,), 2.0), magnitude=magnitude, bias=bias),
        "v_proj": LoweredSite(a[:0], b[:0], torch.empty(0), magnitude=magnitude),
        "down_proj": LoweredSite(torch.ones(1, 40), torch.ones(1, 24), torch.ones(1)),
    }
    adapter = LoweredAdapter("dora", sites)
    manager = make_manager(setup={} if own is None else {"base_biases": {"k_proj": own, "v_proj": own}})
    answer = load(manager, 1, str(write_artefact(adapter, "base", digest_of(adapter), tmp_path)))
    assert answer == {"state": "resident", "bytes": manager.pool.used_bytes}
    step(manager, [0, 1], [2, 3])
    x, linear = (torch.randn(5, n, generator=generator) for n in (24, 48))
    b0 = torch.zeros(48)
    if own is not None:
        b0[24:] = torch.cat([own, own])
    y, site = linear + b0, manager.pool.site_ids[0]
    expand(y, shrink(x, site, manager.pool.h_width(0)), site)
    expected = linear + b0
    expected[2:, 24:36] = magnitude * linear[2:, 24:36] + 2 * (x[2:] @ a.T) @ b + bias + b0[24:36]
    expected[2:, 36:] = magnitude * linear[2:, 36:] + b0[36:]
    torch.testing.assert_close(y, expected)
    assert torch.equal(y[:2], (linear + b0)[:2])


@pytest.fixture
def limited(tmp_path: Path) -> str:
    """Two experts, both of which every token selects, and which take three tokens of a sequence."""
    generator = torch.Generator().manual_seed(3)
    site = LoweredSite(
        torch.randn(4, 24, generator=generator),
        torch.randn(4, 24, generator=generator),
        torch.ones(4),
        gate="q",
        expert=torch.tensor([0, 0, 1, 1], dtype=torch.int32),
    )
    gate = Gate(torch.randn(2, 24, generator=generator), capacity=Capacity(3))
    adapter = LoweredAdapter("sira", {"q_proj": site}, gates={"q": gate})
    return str(write_artefact(adapter, "base", digest_of(adapter), tmp_path))


def scheduled(manager: AdapterManager, begins: Mapping[str, int], finished: set[str] = frozenset()) -> None:  # type: ignore[assignment]
    cached = SimpleNamespace(req_ids=list(begins), num_computed_tokens=list(begins.values()))
    manager.scheduled(
        SimpleNamespace(
            scheduled_new_reqs=[], scheduled_cached_reqs=cached, finished_req_ids=finished, preempted_req_ids=None
        )
    )


def served(manager: AdapterManager, tokens: int) -> list[bool]:
    """Which tokens of the step the adapter changes."""
    return [bool(row) for row in delta(manager, tokens).any(1)]


def test_tokens_of_a_sequence_are_counted_over_steps(limited: str) -> None:
    manager = make_manager()
    load(manager, 1, limited)
    scheduled(manager, {"r0": 0, "r1": 0, "r2": 0})
    step(manager, [1, 0, 1], [2, 5, 4])
    assert served(manager, 11) == [True] * 2 + [False] * 5 + [True] * 3 + [False]
    scheduled(manager, {"r0": 2, "r1": 4})  # r1 has the place that r2 had not
    manager.step(np.array([1, 1], np.int64), np.array([2, 1], np.int32), ["r0", "r2"])
    assert manager.missing == {"r2"}, "nobody said where it begins"
    assert served(manager, 3) == [True, False, False]
    scheduled(manager, {"r0": 4, "r1": 0}, finished={"r2"})
    step(manager, [1, 1], [1, 1])
    assert served(manager, 2) == [False, True] and manager.missing == set()


def test_a_request_whose_prefix_was_not_counted_ends_with_an_error(limited: str, artefact: Callable[..., str]) -> None:
    manager = make_manager()
    load(manager, 1, limited)
    load(manager, 2, artefact(1))
    scheduled(manager, {"r0": 16, "r1": 16, "r2": 0})
    step(manager, [1, 2, 1], [2, 2, 2])
    assert manager.missing == {"r0"}
    assert served(manager, 6) == [False] * 2 + [True] * 4


def test_entropies_are_told_the_order_of_a_step() -> None:
    manager, logits = make_manager(), torch.randn(2, 9)
    new = SimpleNamespace(req_id="r1", num_computed_tokens=0)
    cached = SimpleNamespace(req_ids=[], num_computed_tokens=[])
    manager.entropies.watch("r1", "tag", 5)
    manager.entropies.plan(
        SimpleNamespace(scheduled_cached_reqs=cached, scheduled_new_reqs=[new], num_scheduled_tokens={"r0": 1, "r1": 5})
    )
    step(manager, [0, 0], [1, 5])
    manager.entropies.wrapped(lambda: logits)()
    expected = torch.special.entr(torch.softmax(logits[1], -1)).sum()
    assert manager.entropies.take("tag") == pytest.approx([float(expected)])


def test_an_engine_that_takes_tokens_back_refuses_a_capacity(limited: str, artefact: Callable[..., str]) -> None:
    manager = make_manager(uncountable="it drafts")
    answer = load(manager, 1, limited)
    assert answer["state"] == "failed" and answer["error"]["code"] == "adapter_unservable"
    assert "it drafts" in answer["error"]["message"]
    assert manager.pool.used_bytes == 0
    assert load(manager, 2, artefact(1))["state"] == "resident"


@pytest.mark.parametrize(("piece_bytes", "pauses"), [(128, 26), (1152, 3), (2176, 2), (3328, 1)])
def test_one_pause_copies_one_piece_and_all_pieces_are_the_adapter(
    artefact: Callable[..., str], piece_bytes: int, pauses: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a site is longer than a piece, or exactly as long; whatever the piece, the same is served."""
    manager = make_manager(setup={"piece_bytes": piece_bytes})
    copied: list[int] = []
    write = manager.pool.write_image

    def counted(slot: int, image: torch.Tensor) -> None:
        copied.append(image.numel())
        write(slot, image)

    monkeypatch.setattr(manager.pool, "write_image", counted)
    manager.begin(1, artefact(1))
    while manager.list_adapters() == set():
        before = len(copied)
        progress = manager.advance(1)
        assert progress["state"] != "failed", progress
        assert len(copied) <= before + 1
        assert progress["state"] != "reading" or len(copied) == before
    assert max(copied) <= piece_bytes and len(copied) == pauses
    assert sum(copied) == progress["bytes"] == manager.pool.used_bytes
    whole = make_manager()
    load(whole, 1, artefact(1))
    for each in (manager, whole):
        step(each, [1], [3])
    assert torch.equal(delta(manager, 3), delta(whole, 3))


def test_one_pause_has_few_sites_however_small_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loramux.staging.stager.SITES_PER_PIECE", 1)
    manager = make_manager()
    described: list[int] = []
    describe = manager.pool._describe
    monkeypatch.setattr(manager.pool, "_describe", lambda slot, site: (described.append(site), describe(slot, site)))
    site = LoweredSite(torch.ones(1, 24), torch.ones(1, 24), torch.ones(1))
    down = LoweredSite(torch.ones(1, 40), torch.ones(1, 24), torch.ones(1))
    adapter = LoweredAdapter("lora", {"q_proj": site, "down_proj": down})
    manager.begin(1, str(write_artefact(adapter, "base", digest_of(adapter), tmp_path)))
    while manager.list_adapters() == set():
        before = len(described)
        manager.advance(1)
        assert len(described) <= before + 1
    assert described == [0, 1]


def test_nothing_is_served_before_all_is_copied(artefact: Callable[..., str]) -> None:
    manager = make_manager(setup={"piece_bytes": 128})
    manager.begin(1, artefact(1))
    while not manager.stats()["used_bytes"]:
        assert manager.advance(1)["state"] in ("reading", "copying")
    step(manager, [1], [2])
    assert manager.missing == {"r0"}
    assert not delta(manager, 2).any()
    assert finish(manager, 1)[-1]["state"] == "resident"
    step(manager, [1], [2])
    assert manager.missing == set()
    assert delta(manager, 2).any()


def test_a_full_pool_says_how_much_is_missing_and_keeps_nothing(artefact: Callable[..., str]) -> None:
    needed = load(make_manager(), 1, artefact(1))["bytes"]
    manager = make_manager(capacity_bytes=int(1.5 * needed))
    load(manager, 1, artefact(1))
    before = manager.stats()
    answer = load(manager, 2, artefact(2))
    assert answer["state"] == "failed"
    assert answer["error"]["code"] == "adapter_memory_full"
    assert answer["error"]["needed"] == needed
    assert answer["error"]["free"] == before["capacity_bytes"] - before["used_bytes"]
    assert manager.stats() == before
    manager.remove(1)
    assert load(manager, 2, artefact(2))["state"] == "resident"


def test_slots_run_out_as_well(artefact: Callable[..., str]) -> None:
    manager = make_manager(slots=2)
    for version in (1, 2):
        assert load(manager, version, artefact(version))["state"] == "resident"
    assert load(manager, 3, artefact(3))["error"]["code"] == "adapter_memory_full"
    manager.remove(1)
    assert load(manager, 4, artefact(3))["state"] == "resident"


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        ({"ranks": {"q_proj": 17}}, "adapter_unservable"),  # over the pool's limit
        ({"ranks": {"nowhere": 4}}, "adapter_unservable"),
        ({"ranks": {"q_proj": 4, "down_proj": 4}, "d_in": 23}, "adapter_unservable"),
    ],
    ids=["rank", "module", "shape"],
)
def test_what_the_pool_cannot_hold_leaves_nothing_reserved(
    artefact: Callable[..., str], spoil: dict[str, Any], code: str
) -> None:
    manager = make_manager()
    answer = load(manager, 1, artefact(1, **spoil))
    assert (answer["state"], answer["error"]["code"]) == ("failed", code)
    assert manager.stats()["used_bytes"] == 0
    assert manager.pool.free_slots == 4
    assert manager.advance(1)["state"] == "failed"  # the load is over


@pytest.mark.parametrize("name", ["publish", "write_image"])
def test_a_failure_nobody_thought_of_leaves_nothing_reserved(
    artefact: Callable[..., str], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = make_manager()

    def fail(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(manager.pool, name, fail)
    assert load(manager, 1, artefact(1))["error"]["code"] == "internal_error"
    assert manager.stats()["used_bytes"] == 0


@pytest.mark.parametrize("content", [None, b"", b"\x08\0\0\0\0\0\0\0{}      ", b"\xff" * 64])
def test_an_unreadable_artefact_fails_without_its_path(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "0.safetensors"
    if content is not None:
        path.write_bytes(content)
    manager = make_manager()
    answer = load(manager, 1, str(path))
    assert (answer["state"], answer["error"]["code"]) == ("failed", "adapter_unreadable")
    assert tmp_path.name not in answer["error"]["message"]
    assert manager.stats()["used_bytes"] == 0


def test_a_load_that_is_removed_half_way_keeps_nothing(artefact: Callable[..., str]) -> None:
    manager = make_manager(setup={"piece_bytes": 128})
    manager.begin(1, artefact(1))
    while not manager.stats()["used_bytes"]:
        assert manager.advance(1)["state"] in ("reading", "copying")
    manager.remove(1)
    assert manager.stats()["used_bytes"] == 0
    assert manager.advance(1)["state"] == "failed"


def test_a_row_whose_version_is_unknown_is_reported_and_gets_no_other_adapter(artefact: Callable[..., str]) -> None:
    manager = make_manager()
    load(manager, 7, artefact(1))
    step(manager, [7, 0, 99, 7], [2, 1, 2, 1])
    assert manager.missing == {"r2"}
    added = delta(manager, 6).any(dim=1)
    assert added.tolist() == [True, True, False, False, False, True]
    manager.remove(7)
    step(manager, [7, 0, 99, 7], [2, 1, 2, 1])
    assert manager.missing == {"r0", "r2", "r3"}
    assert not delta(manager, 6).any()


def test_a_step_the_pool_refuses_ends_its_requests_and_not_the_engine(artefact: Callable[..., str]) -> None:
    manager = make_manager()
    load(manager, 1, artefact(1))
    step(manager, [1, 0], [33, 1])  # more tokens than the pool was made for
    assert manager.missing == {"r0"}
    assert not delta(manager, 34).any()
    step(manager, [1, 0], [3, 1])
    assert manager.missing == set()
    assert delta(manager, 4).any(dim=1).tolist() == [True] * 3 + [False]


def test_missing_requests_are_told_once(artefact: Callable[..., str]) -> None:
    manager = make_manager()
    step(manager, [5], [1])
    assert manager.take_missing() == {"r0"}
    assert manager.take_missing() == frozenset()
    step(manager, [5], [1])
    manager.idle(launch=True)
    assert manager.take_missing() == frozenset()


def test_a_dummy_run_while_serving_keeps_the_adapters(artefact: Callable[..., str]) -> None:
    manager = make_manager()
    load(manager, 1, artefact(1))
    with manager.dummy_lora_cache():
        manager.add_dummy_lora(SimpleNamespace(lora_int_id=1), rank=8)  # type: ignore[arg-type]
    manager.remove_all_adapters()  # how vLLM ends a dummy run
    assert manager.list_adapters() == {1}
    manager.remove_all_adapters()
    assert manager.list_adapters() == set()


def test_vllms_own_load_is_refused_unless_the_adapter_is_there(artefact: Callable[..., str]) -> None:
    manager = make_manager()
    request: Any = SimpleNamespace(lora_int_id=1, lora_name="a@1")
    with pytest.raises(ValueError, match="not resident"):
        manager.add_adapter(request)
    load(manager, 1, artefact(1))
    assert manager.add_adapter(request) is False
    assert manager.pin_adapter(1)


def test_broken_statistics_cost_no_answer(artefact: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    manager = make_manager()
    assert load(manager, 1, artefact(1))["state"] == "resident"

    def fail(*_: object) -> None:
        raise RuntimeError("no statistics")

    monkeypatch.setattr(manager.routing, "before", fail)
    monkeypatch.setattr(manager.routing, "after", fail)
    manager.step(np.array([1, 0]), np.array([2, 1]), ["a", "b"])
    manager.forward_issued()
    assert manager.pool.active and not manager.missing
