"""What the hooks on both model runners hand to the manager, without a model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.lora.request import LoRARequest
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, AsyncModelRunnerOutput, ModelRunnerOutput
from vllm.v1.worker.gpu.lora_utils import LoraState, create_lora_capture_hook
from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

from loramux.engine import hooks
from loramux.engine.entropies import Entropies
from loramux.engine.scoring import Rows, Scoring
from loramux.engine.settings import MISSING
from loramux.engine.worker import LoramuxWorker

LORA_CONFIG: Any = SimpleNamespace(max_loras=4, max_lora_rank=16)


class RecordingManager:
    """Keeps what a step was told: per request its id, version and number of tokens; tells the order of its rows."""

    def __init__(self) -> None:
        self.steps: list[list[tuple[str, int, int]]] = []
        self.idles: list[bool] = []
        self.missing: set[str] = set()
        self.entropies = Entropies()

    def step(self, version_ids: np.ndarray, lengths: np.ndarray, request_ids: list[str]) -> None:
        self.steps.append(list(zip(request_ids, version_ids.tolist(), lengths.tolist(), strict=True)))
        self.entropies.order(request_ids)

    def idle(self, launch: bool) -> None:
        self.idles.append(launch)

    def take_missing(self) -> frozenset[str]:
        missing, self.missing = frozenset(self.missing), set()
        return missing


class Runner(LoRAModelRunnerMixin):  # type: ignore[misc]
    """vLLM's own LoRA methods on an object without a model."""

    def __init__(self) -> None:
        self.lora_config = LORA_CONFIG
        self.manager = RecordingManager()
        self.lora_manager = self.manager


class RunnerV2(Runner):
    def __init__(self) -> None:
        super().__init__()
        self.lora_state = LoraState(max_num_reqs=8)


def request(version_id: int) -> LoRARequest:
    return LoRARequest(lora_name=f"a@{version_id}", lora_int_id=version_id, lora_path="/none")


def test_v1_hands_over_the_rows_of_the_batch_in_order() -> None:
    runner = Runner()
    hooks.install(runner)
    # Rows beyond the batch hold what earlier requests left there.
    batch = SimpleNamespace(
        request_lora_mapping=np.array([3, 0, 7, 9, 9], np.int64), req_ids=["x", "y", "z"], num_reqs=3
    )
    runner.set_active_loras(batch, np.array([5, 1, 2], np.int32), np.array([1, 1, 1], np.int32))
    assert runner.manager.steps == [[("x", 3, 5), ("y", 0, 1), ("z", 7, 2)]]
    assert runner.manager.idles == []


def test_v2_hands_over_the_rows_of_the_batch_in_order() -> None:
    runner = RunnerV2()
    hooks.install(runner)
    state = runner.lora_state
    for index, (req_id, version_id) in enumerate([("x", 3), ("gone", 5), ("y", 0), ("z", 7)]):
        state.add_request(req_id, index, request(version_id) if version_id else None)
    state.remove_request("gone")
    state.add_request("new", 1, request(8))
    # The batch is ordered by scheduling, not by state index.
    inputs = state.make_lora_inputs(["z", "new", "y"], np.array([3, 1, 2], np.int32), np.array([1, 9, 4], np.int32))
    runner._set_active_loras(*inputs)
    assert runner.manager.steps == [[("z", 7, 1), ("new", 8, 9), ("y", 0, 4)]]
    # vLLM picks the graph by what it counts itself.
    assert state.get_activate_loras(["z", "new", "y"]) == {request(7), request(8)}


def test_v2_takes_the_ids_before_the_next_request_gets_the_row() -> None:
    runner = RunnerV2()
    hooks.install(runner)
    runner.lora_state.add_request("x", 0, request(3))
    inputs = runner.lora_state.make_lora_inputs(["x"], np.array([0], np.int32), np.array([1], np.int32))
    runner.lora_state.add_request("other", 0, request(4))
    runner._set_active_loras(*inputs)
    assert runner.manager.steps == [[("x", 3, 1)]]


@pytest.mark.parametrize("make", [Runner, RunnerV2])
@pytest.mark.parametrize(("loras", "launch"), [(0, False), (1, True), (4, True), (5, True)])
def test_graphs_are_captured_with_and_without_kernels(make: type[Runner], loras: int, launch: bool) -> None:
    runner = make()
    hooks.install(runner)
    if make is RunnerV2:
        capture = create_lora_capture_hook(LORA_CONFIG, runner)
        assert capture is not None
        capture(loras, 3, 8)
    else:
        with runner.maybe_select_dummy_loras(LORA_CONFIG, np.array([3, 3, 2], np.int32), num_active_loras=loras):
            pass
    assert runner.manager.idles == [launch]
    assert runner.manager.steps == []


@pytest.mark.parametrize("make", [Runner, RunnerV2])
def test_one_runner_only_is_touched(make: type[Runner]) -> None:
    hooked, other = make(), make()
    hooks.install(hooked)
    assert set(vars(other)) == set(vars(make()))
    assert other._set_active_loras.__func__ is LoRAModelRunnerMixin._set_active_loras
    if make is RunnerV2:
        assert other.lora_state.make_lora_inputs.__func__ is LoraState.make_lora_inputs  # type: ignore[attr-defined]


class Worker(LoramuxWorker):
    """Only what marks outputs."""

    def __init__(self, missing: set[str]) -> None:
        manager = RecordingManager()
        manager.missing = missing
        self.model_runner: Any = SimpleNamespace(lora_manager=manager)


class Later(AsyncModelRunnerOutput):
    def __init__(self, output: ModelRunnerOutput) -> None:
        self.output = output

    def get_output(self) -> ModelRunnerOutput:
        return self.output


def test_the_output_of_a_step_is_marked_once() -> None:
    worker = Worker({"x"})
    assert worker._mark(None) is None  # V1 samples in a second call: the mark waits for it
    output = ModelRunnerOutput(req_ids=["x"], req_id_to_index={"x": 0})
    assert worker._mark(output) is output
    assert getattr(output, MISSING) == {"x"}
    # A step without tokens answers with an object that vLLM shares between all of them.
    assert not hasattr(worker._mark(EMPTY_MODEL_RUNNER_OUTPUT), MISSING)


def test_an_asynchronous_output_is_marked_when_it_arrives() -> None:
    worker = Worker({"x"})
    output = ModelRunnerOutput(req_ids=["x"], req_id_to_index={"x": 0})
    marked = worker._mark(Later(output))
    assert isinstance(marked, AsyncModelRunnerOutput)
    assert not hasattr(output, MISSING)
    assert getattr(marked.get_output(), MISSING) == {"x"}


def test_outputs_of_sound_steps_pass_untouched() -> None:
    later = Later(ModelRunnerOutput(req_ids=[], req_id_to_index={}))
    assert Worker(set())._mark(later) is later


class RecordingScoring:
    """Wants the request "read", and keeps where its rows are."""

    idle = False

    def __init__(self) -> None:
        self.seen: list[Rows] = []

    def wants(self, request_id: str) -> bool:
        return request_id == "read"

    def observe(self, hidden: Any, layout: Any, logits: Any) -> None:
        assert logits(hidden) == "logits"
        self.seen += layout


def test_v1_shows_the_rows_of_requests_that_are_read() -> None:
    scoring: Any = RecordingScoring()
    runner: Any = SimpleNamespace(
        _get_prompt_logprobs_dict=lambda hidden, scheduled: {"theirs": len(scheduled)},
        input_batch=SimpleNamespace(req_id_to_index={"x": 0, "read": 1, "y": 2}),
        requests={"read": SimpleNamespace(num_computed_tokens=16)},
        query_start_loc=SimpleNamespace(np=np.array([0, 5, 12, 13])),
        model=SimpleNamespace(compute_logits=lambda hidden: "logits"),
        lora_manager=RecordingManager(),
    )
    hooks.install_scoring(runner, scoring)
    assert runner._get_prompt_logprobs_dict("hidden", {"read": 7, "x": 5, "y": 1}) == {"theirs": 3}
    assert runner._get_prompt_logprobs_dict("hidden", {"x": 5}) == {"theirs": 1}  # not scheduled in this step
    assert scoring.seen == [Rows("read", 5, 16, 7)]
    scoring.idle = True
    runner._get_prompt_logprobs_dict("hidden", {"read": 7})
    assert len(scoring.seen) == 1


def test_v2_shows_the_rows_of_requests_that_are_read() -> None:
    scoring: Any = RecordingScoring()
    worker: Any = SimpleNamespace(compute_prompt_logprobs=lambda fn, hidden, batch, ids, *, lens: (ids, lens))
    model = SimpleNamespace(compute_logits=lambda hidden: "logits")
    runner = SimpleNamespace(
        lora_state=None, prompt_logprobs_worker=worker, model=model, lora_manager=RecordingManager()
    )
    hooks.install_scoring(runner, scoring)
    batch = SimpleNamespace(
        req_ids=["x", "read"],
        num_computed_prefill_tokens_np=np.array([3, 16]),
        num_scheduled_tokens=np.array([5, 7]),
        prefill_len_np=np.array([8, 23]),
        query_start_loc_np=np.array([0, 5, 12]),
    )
    assert worker.compute_prompt_logprobs(lambda _: "logits", "hidden", batch, 1, lens=2) == (1, 2)
    assert scoring.seen == [Rows("read", 5, 16, 7)]
    batch.num_computed_prefill_tokens_np[1] = 23  # it decodes now
    worker.compute_prompt_logprobs(lambda _: "logits", "hidden", batch, 1, lens=2)
    assert len(scoring.seen) == 1


@pytest.mark.parametrize("make", [Runner, RunnerV2])
def test_the_logits_of_a_step_are_read_in_the_order_of_its_rows(make: type[Runner]) -> None:
    runner = make()
    entropies = runner.manager.entropies
    hooks.install(runner)
    logits = torch.randn(2, 9)
    any_runner: Any = runner
    any_runner.model = SimpleNamespace(compute_logits=lambda hidden: logits)
    any_runner.prompt_logprobs_worker = SimpleNamespace(compute_prompt_logprobs=None)
    any_runner._get_prompt_logprobs_dict = None
    hooks.install_scoring(any_runner, Scoring(vocabulary=9, state_bytes=0, device=torch.device("cpu")))
    entropies.watch("x", "tag", 5)
    new = SimpleNamespace(req_id="x", num_computed_tokens=0)
    cached = SimpleNamespace(req_ids=[], num_computed_tokens=[])
    entropies.plan(
        SimpleNamespace(scheduled_cached_reqs=cached, scheduled_new_reqs=[new], num_scheduled_tokens={"x": 5, "y": 1})
    )
    if isinstance(runner, RunnerV2):
        for index, req_id in enumerate(("x", "y")):
            runner.lora_state.add_request(req_id, index, None)
        ids, places, lengths = ["y", "x"], np.array([1, 0], np.int32), np.array([1, 5], np.int32)
        runner._set_active_loras(*runner.lora_state.make_lora_inputs(ids, places, lengths))
    else:
        batch = SimpleNamespace(request_lora_mapping=np.array([0, 0], np.int64), req_ids=["y", "x"], num_reqs=2)
        any_runner.set_active_loras(batch, np.array([1, 5], np.int32), np.array([1, 1], np.int32))
    for _ in range(2):  # the second time they are others' logits
        assert any_runner.model.compute_logits("hidden") is logits
    assert entropies.take("tag") == pytest.approx([float(torch.special.entr(torch.softmax(logits[1], -1)).sum())])
