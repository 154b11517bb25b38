"""Tests of the windows that a worker stores: within its limits, moved to the host, prefilled again, same scores."""

from collections.abc import Callable

import pytest
import torch
from search_process import make_model

from baklava.allocation import Uniform, allocate
from baklava.data.windows import Window
from baklava.errors import UserError
from baklava.evaluation.window_scoring import PrefilledWindow, WindowScore, prefill_window, score_plan
from baklava.eviction import StreamingLLM
from baklava.profiling.profile import uniform_profile
from baklava.runtime.model_loader import LoadedModel
from tuning.study.search_space import recorded_evictions
from tuning.workers.scoring_worker import PrefillStore, ScoringWorker, tensor_bytes, to_devices, to_host


@pytest.fixture(scope="module")
def loaded(tiny: Callable[..., LoadedModel]) -> LoadedModel:
    return tiny()


def window(number: int) -> Window:
    ids = torch.randint(2, 60, (56,), generator=torch.Generator().manual_seed(number)).tolist()
    return Window(name=f"w{number}", document=f"d{number}", ids=tuple(ids), context_length=48)


class CountingStore:
    """A store whose windows are prefilled for real, and counted."""

    def __init__(self, loaded: LoadedModel, **limits: int | None) -> None:
        self.loaded, self.prefills = loaded, 0
        self.store = PrefillStore(**{f"max_{tier}_bytes": limit for tier, limit in limits.items()})

    def get(self, number: int) -> PrefilledWindow:
        return self.store.get(f"w{number}", lambda: self._prefill(number))

    def _prefill(self, number: int) -> PrefilledWindow:
        self.prefills += 1
        return prefill_window(self.loaded, window(number), recorded_evictions(self.loaded.moves_queries))


def window_bytes(loaded: LoadedModel) -> int:
    return tensor_bytes(prefill_window(loaded, window(0), recorded_evictions(loaded.moves_queries)))


def test_a_window_counts_with_keys_values_scores_and_log_probabilities(loaded: LoadedModel) -> None:
    prefilled = prefill_window(loaded, window(0), recorded_evictions(loaded.moves_queries))
    recording = prefilled.prompt.recording
    tensors = [
        *recording.keys,
        *recording.values,
        prefilled.full_log_probs,
        prefilled.full_nll,
        prefilled.prompt.ids,
        prefilled.prompt.logits,
    ]
    tensors += [tensor for layer in recording.scores for tensor in layer.values()]
    assert tensor_bytes(prefilled) >= sum(tensor.nbytes for tensor in tensors)


def test_without_a_limit_every_window_is_prefilled_once(loaded: LoadedModel) -> None:
    counting = CountingStore(loaded)
    for _ in range(2):
        assert [counting.get(number).window.name for number in range(3)] == ["w0", "w1", "w2"]
    assert counting.prefills == 3
    assert counting.store.status() is None


def test_windows_beyond_the_limits_go_to_the_host_or_are_prefilled_again_and_the_status_says_so(
    loaded: LoadedModel,
) -> None:
    size = window_bytes(loaded)
    counting = CountingStore(loaded, device=2 * size, host=size)
    for _ in range(3):
        for number in range(4):
            counting.get(number)
    assert counting.prefills == 4 + 2  # the last window, in each later round: the first ones are not driven out by it
    assert counting.store.tiers == {"w0": "device", "w1": "device", "w2": "host", "w3": "nowhere"}
    status = counting.store.status()
    assert status is not None
    assert "2 windows on its device, 1 in host memory, 1 not at all" in status
    assert sum(map(tensor_bytes, counting.store.windows.values())) <= 3 * size


def test_a_plan_scores_the_same_wherever_its_window_is_stored(loaded: LoadedModel) -> None:
    size = window_bytes(loaded)
    plan = allocate(
        uniform_profile(loaded.identity, loaded.geometry),
        budget=0.5,
        context_length=56,
        method=Uniform(),
        eviction=StreamingLLM(sinks=1),
        bits=(16, 16),
    )
    expected = score_plan(loaded, prefill_window(loaded, window(1), recorded_evictions(loaded.moves_queries)), plan)
    for limits in ({}, {"device": size, "host": size}, {"device": 0, "host": 0}):
        counting = CountingStore(loaded, **limits)
        for number in (0, 1, 0, 1):
            found = score_plan(loaded, counting.get(number), plan)
        assert (found.nll, found.kl, found.nll_full) == (expected.nll, expected.kl, expected.nll_full)


def test_a_window_on_the_host_comes_back_to_the_device_of_each_of_its_tensors(loaded: LoadedModel) -> None:
    prefilled = prefill_window(loaded, window(0), recorded_evictions(loaded.moves_queries))
    away, devices = to_host(prefilled)
    assert len(devices) > 2 * loaded.geometry.layers
    back = to_devices(away, [torch.device("meta"), *devices[1:]])
    assert back.prompt.ids.device.type == "meta"  # the first of all tensors, as a record lists them
    assert back.prompt.recording.keys[0].device.type == "cpu"


def test_released_windows_free_memory(loaded: LoadedModel) -> None:
    counting = CountingStore(loaded, device=window_bytes(loaded), host=0)
    counting.get(0)
    counting.store.release("w0")
    counting.get(1)
    assert counting.store.tiers == {"w1": "device"}


def test_a_device_that_ran_out_of_memory_is_emptied_once(loaded: LoadedModel) -> None:
    counting = CountingStore(loaded, host=10 * window_bytes(loaded))
    counting.get(0)
    assert counting.store.clear_device()
    assert counting.store.tiers == {"w0": "host"}
    assert not counting.store.clear_device()
    counting.get(1)
    assert counting.store.tiers["w1"] == "host"
    assert counting.prefills == 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_model(tmp_path_factory.mktemp("model") / "model"))


def test_a_worker_that_is_spread_short_of_memory_and_timed_scores_as_any_other(model: str) -> None:
    usual = ScoringWorker(model, 1)
    plan = allocate(
        uniform_profile(usual.loaded.identity, usual.loaded.geometry),
        budget=0.5,
        context_length=56,
        method=Uniform(),
        eviction=StreamingLLM(sinks=1),
        bits=(16, 16),
    ).model_dump_json()
    other = ScoringWorker(model, 1, device_map_auto=True, memory=1e-9, timed=True)
    assert {str(parameter.device) for parameter in other.loaded.model.parameters()} == {"cpu"}
    for number in (0, 1):
        other.prefill(window(number))
        expected, found = usual.score(plan, window(number)), other.score(plan, window(number))
        assert found.pop("decode_seconds") > 0
        assert "not at all" in found.pop("status")
        assert expected.pop("status") is None
        assert {**found, "seconds": 0} == {**expected, "seconds": 0}
    status = other.status()
    assert status is not None
    assert "2 not at all" in status
    assert usual.status() is None


def test_a_worker_with_other_weights_does_not_start(model: str) -> None:
    digest = ScoringWorker(model, 1).loaded.weights_digest
    ScoringWorker(model, 1, weights_digest=digest)
    with pytest.raises(UserError, match="has other weights on"):
        ScoringWorker(model, 1, weights_digest="other")


def test_a_worker_out_of_memory_moves_its_windows_away_and_tries_once_more(
    model: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    worker = ScoringWorker(model, 1, host_share=0.1)
    worker.prefill(window(0))
    tries: list[int] = []

    def short_of_memory(*arguments: object) -> WindowScore:
        tries.append(len(worker.store.windows))
        if worker.store.max_device_bytes is None:
            raise torch.OutOfMemoryError("out of memory")
        return WindowScore(window="w0", document="d0", nll_full=1, nll=2, kl=1, allocated_bytes=1, seconds=1)

    monkeypatch.setattr("tuning.workers.scoring_worker.score_plan", short_of_memory)
    monkeypatch.setattr("tuning.workers.scoring_worker.BudgetPlan.model_validate_json", lambda text: None)
    assert worker.score("plan", window(0))["nll"] == 2
    assert len(tries) == 2
    monkeypatch.setattr("tuning.workers.scoring_worker.score_plan", raise_out_of_memory)
    failed = worker.score("plan", window(0))
    assert failed["error"] == "OutOfMemoryError: out of memory"
    assert "in raise_out_of_memory" in failed["traceback"]
    assert "in raise_out_of_memory" in caplog.text  # the worker's log has it as well


def raise_out_of_memory(*arguments: object) -> WindowScore:
    raise torch.OutOfMemoryError("out of memory")
