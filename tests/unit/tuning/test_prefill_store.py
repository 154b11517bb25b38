"""Facts about the windows that a replica keeps: within its limits, to_host, prefilled again, with the same scores."""

from collections.abc import Callable

import pytest
import torch
from search_process import make_model

from baklava.allocation import Uniform, allocate
from baklava.data.windows import Window
from baklava.evaluation.window_scoring import Prefilled, Score, prefill, score
from baklava.eviction import StreamingLLM
from baklava.profiling.profile import flat_profile
from baklava.runtime.model_loader import LoadedModel
from tuning.study.search_space import recorded_evictions
from tuning.workers.scoring_worker import PrefillStore, ScoringWorker, tensor_bytes, to_devices, to_host


@pytest.fixture(scope="module")
def loaded(tiny: Callable[..., LoadedModel]) -> LoadedModel:
    return tiny()


def window(number: int) -> Window:
    ids = torch.randint(2, 60, (56,), generator=torch.Generator().manual_seed(number)).tolist()
    return Window(name=f"w{number}", document=f"d{number}", ids=tuple(ids), context_length=48)


class Kept:
    """A holding whose windows are prefilled for real, and counted."""

    def __init__(self, loaded: LoadedModel, **limits: int | None) -> None:
        self.loaded, self.holding, self.prefills = (
            loaded,
            PrefillStore(**{f"max_{tier}_bytes": limit for tier, limit in limits.items()}),
            0,
        )

    def get(self, number: int) -> Prefilled:
        return self.holding.get(f"w{number}", lambda: self._prefill(number))

    def _prefill(self, number: int) -> Prefilled:
        self.prefills += 1
        return prefill(self.loaded, window(number), recorded_evictions())


def one(loaded: LoadedModel) -> int:
    return tensor_bytes(prefill(loaded, window(0), recorded_evictions()))


def test_a_window_counts_with_keys_values_scores_and_log_probabilities(loaded: LoadedModel) -> None:
    held = prefill(loaded, window(0), recorded_evictions())
    recording = held.prompt.recording
    tensors = [*recording.keys, *recording.values, held.full_log_probs, held.nll, held.prompt.ids, held.prompt.logits]
    tensors += [tensor for layer in recording.scores for tensor in layer.values()]
    assert tensor_bytes(held) >= sum(tensor.nbytes for tensor in tensors)


def test_without_a_limit_every_window_is_prefilled_once(loaded: LoadedModel) -> None:
    kept = Kept(loaded)
    for _ in range(2):
        assert [kept.get(number).window.name for number in range(3)] == ["w0", "w1", "w2"]
    assert kept.prefills == 3
    assert kept.holding.status() is None


def test_what_the_limits_do_not_hold_is_spilled_and_then_prefilled_again_and_this_is_said(loaded: LoadedModel) -> None:
    size = one(loaded)
    kept = Kept(loaded, device=2 * size, host=size)
    for _ in range(3):
        for number in range(4):
            kept.get(number)
    assert kept.prefills == 4 + 2  # the last window, in each later round: the first ones are not driven out by it
    assert kept.holding.tiers == {"w0": "device", "w1": "device", "w2": "host", "w3": "nowhere"}
    told = kept.holding.status()
    assert told is not None
    assert "2 windows on its device, 1 in host memory, 1 not at all" in told
    assert sum(map(tensor_bytes, kept.holding.windows.values())) <= 3 * size


def test_a_plan_scores_the_same_wherever_its_window_was_kept(loaded: LoadedModel) -> None:
    size = one(loaded)
    plan = allocate(
        flat_profile(loaded.identity, loaded.geometry),
        budget=0.5,
        context_length=56,
        method=Uniform(),
        eviction=StreamingLLM(sinks=1),
        bits=(16, 16),
    )
    expected = score(loaded, prefill(loaded, window(1), recorded_evictions()), plan)
    for limits in ({}, {"device": size, "host": size}, {"device": 0, "host": 0}):
        kept = Kept(loaded, **limits)
        for number in (0, 1, 0, 1):
            found = score(loaded, kept.get(number), plan)
        assert (found.nll, found.kl, found.nll_full) == (expected.nll, expected.kl, expected.nll_full)


def test_a_spilled_window_comes_back_to_the_device_of_each_of_its_tensors(loaded: LoadedModel) -> None:
    held = prefill(loaded, window(0), recorded_evictions())
    away, devices = to_host(held)
    assert len(devices) > 2 * loaded.geometry.layers
    back = to_devices(away, [torch.device("meta"), *devices[1:]])
    assert back.recorded.ids.device.type == "meta"  # the first of all tensors, as a record lists them
    assert back.recorded.recording.keys[0].device.type == "cpu"


def test_forgotten_windows_make_room(loaded: LoadedModel) -> None:
    kept = Kept(loaded, device=one(loaded), host=0)
    kept.get(0)
    kept.holding.release("w0")
    kept.get(1)
    assert kept.holding.tiers == {"w1": "device"}


def test_a_device_that_ran_out_of_memory_is_emptied_once(loaded: LoadedModel) -> None:
    kept = Kept(loaded, host=10 * one(loaded))
    kept.get(0)
    assert kept.holding.clear_device()
    assert kept.holding.tiers == {"w0": "host"}
    assert not kept.holding.clear_device()
    kept.get(1)
    assert kept.holding.tiers["w1"] == "host"
    assert kept.prefills == 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_model(tmp_path_factory.mktemp("model") / "model"))


def test_a_replica_that_is_spread_short_of_memory_and_timed_scores_as_any_other(model: str) -> None:
    usual = ScoringWorker(model, 1)
    plan = allocate(
        flat_profile(usual.loaded.identity, usual.loaded.geometry),
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
    told = other.status()
    assert told is not None
    assert "2 not at all" in told
    assert usual.status() is None


def test_a_replica_out_of_memory_moves_its_windows_away_and_tries_once_more(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    replica = ScoringWorker(model, 1, host_share=0.1)
    replica.prefill(window(0))
    tries: list[int] = []

    def short_of_memory(*arguments: object) -> Score:
        tries.append(len(replica.store.windows))
        if replica.store.max_device_bytes is None:
            raise torch.OutOfMemoryError("out of memory")
        return Score(window="w0", document="d0", nll_full=1, nll=2, kl=1, allocated_bytes=1, seconds=1)

    monkeypatch.setattr("tuning.workers.scoring_worker.score", short_of_memory)
    monkeypatch.setattr("tuning.workers.scoring_worker.BudgetPlan.model_validate_json", lambda text: None)
    assert replica.score("plan", window(0))["nll"] == 2
    assert len(tries) == 2
    monkeypatch.setattr("tuning.workers.scoring_worker.score", raise_out_of_memory)
    assert "OutOfMemoryError" in replica.score("plan", window(0))["error"]


def raise_out_of_memory(*arguments: object) -> Score:
    raise torch.OutOfMemoryError("out of memory")
