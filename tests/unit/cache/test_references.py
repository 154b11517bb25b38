"""Reference queries and the fit to them, against plain loops over single queries in 64 bits."""

from dataclasses import dataclass

import pytest
import torch
from model_families import SHAPE, tiny_model
from plan_factory import quantized_plan, random_ids, with_chunked_prefill
from torch import Tensor
from transformers import LlamaConfig

from baklava.cache.attention import AttentionParams, CentroidEntries
from baklava.cache.budgeted_cache import BudgetedCache
from baklava.cache.head_groups import references as reference_queries
from baklava.cache.head_groups import value_fit
from baklava.cache.head_groups.references import PromptEntries, ReferenceQueries, References, observe_references
from baklava.cache.head_groups.value_fit import fit_values
from baklava.cache.rotary_shift import RotaryShift
from baklava.errors import UserError
from baklava.eviction import AttentionMatching, HeavyHitter, StreamingLLM
from baklava.runtime.model_loader import LoadedModel
from baklava.runtime.prefill import prefill

HEADS, GROUP, DIM, OLD, NEW, CENTROIDS = 2, 3, 8, 5, 53, 2
FREQUENCIES = torch.tensor([1.0, 0.3, 0.05], dtype=torch.float64)  # of 6 of 8 channels


@dataclass
class Case:
    """Unrotated queries and keys of new tokens after some old entries, and what the attention has in addition."""

    query: Tensor
    key: Tensor
    value: Tensor
    params: AttentionParams
    centroids: CentroidEntries | None
    shift: RotaryShift

    @classmethod
    def random(cls, softcap: float | None, sinks: bool, centroids: bool) -> "Case":
        draw = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw)

        shift = RotaryShift(FREQUENCIES)
        params = AttentionParams(0.4, softcap, normal(HEADS * GROUP) if sinks else None, None, shift)
        means = (normal(1, HEADS, CENTROIDS, DIM), normal(1, HEADS, CENTROIDS, DIM), normal(1, HEADS, CENTROIDS))
        states = normal(1, HEADS, GROUP, NEW, DIM), normal(1, HEADS, OLD + NEW, DIM), normal(1, HEADS, OLD + NEW, DIM)
        return cls(*states, params, CentroidEntries(*means) if centroids else None, shift)

    def at(self, states: Tensor, first: int) -> Tensor:
        """Return states as they are rotated at positions from `first` on."""
        return self.shift.shift(states, torch.arange(first, first + states.shape[-2])[None])

    def answer(
        self, head: int, group: int, token: int, kept: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the weights and output of one reference over some entries, and its own block moved along with it."""
        start = token - token % reference_queries.BLOCK_TOKENS
        move = NEW - start
        query = self.at(self.query[:, :, :, token : token + 1], OLD + token + move)[0, head, group, 0].double()
        block = self.at(self.key[:, :, OLD + start : OLD + token + 1], OLD + start + move)[0, head].double()
        keys = torch.cat([key[head, kept].double(), block])
        values = torch.cat([value[head, kept].double(), self.value[0, head, OLD + start : OLD + token + 1].double()])
        logits = self.params.apply_softcap(keys @ query * self.params.scaling)
        if self.centroids is not None:
            own = self.params.apply_softcap(self.centroids.key[0, head].double() @ query * self.params.scaling)
            logits = torch.cat([own + self.centroids.bias[0, head].double(), logits])
            values = torch.cat([self.centroids.value[0, head].double(), values])
        if self.params.sink_logits is not None:
            logits = torch.cat([logits, self.params.sink_logits[head * GROUP + group, None].double()])
            values = torch.cat([values, torch.zeros(1, DIM, dtype=torch.float64)])
        weights = logits.softmax(0)
        return weights, weights @ values


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_queries, "BLOCK_TOKENS", 16)


def observe(case: Case, count: int, scores: Tensor) -> References:
    key = case.at(case.key, 0)
    positions = torch.arange(OLD + NEW)[None]
    queries = ReferenceQueries.draw(case.at(case.query, OLD), positions[:, OLD:], count, case.params)
    entries = PromptEntries(key, case.value, positions[:, None], False, case.centroids)
    return observe_references(queries, entries, NEW, case.params, [(AttentionMatching(references=count), scores)])


@torch.inference_mode()
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("softcap", "sinks", "centroids"), [(None, False, False), (2.0, False, True), (None, True, True)]
)
def test_references_get_what_a_loop_over_single_queries_gives(
    monkeypatch: pytest.MonkeyPatch, softcap: float | None, sinks: bool, centroids: bool, compiled: bool
) -> None:
    if not compiled:
        monkeypatch.setattr(reference_queries, "can_attend_prompt", lambda *_: False)
    case, count = Case.random(softcap, sinks, centroids), 10
    hits = torch.rand(1, HEADS, OLD + NEW, generator=torch.Generator().manual_seed(1))
    scores = hits.clone()
    found = observe(case, count, scores)
    tokens = [index * NEW // count for index in range(count)]
    key, everything = case.at(case.key, 0)[0], torch.arange(OLD + NEW)
    first = CENTROIDS if centroids else 0
    for head in range(HEADS):
        errors, squares = torch.zeros(2, count, GROUP, OLD + NEW, dtype=torch.float64)
        for place, token in enumerate(tokens):
            for group in range(GROUP):
                weights, output = case.answer(head, group, token, everything, key, case.value[0])
                torch.testing.assert_close(found.output[0, head, group, place].double(), output, atol=1e-5, rtol=1e-5)
                shares = weights[first : first + OLD + NEW]
                squares[place, group] = shares.square()
                distances = (case.value[0, head].double() - output).square().sum(-1)
                errors[place, group] = shares.square() * distances
        match = errors.amax(1).sum(0) / errors.amax(1).sum() * squares.amax(1).sum() / count
        expected = (hits[0, head].double() * match).sqrt()
        torch.testing.assert_close(scores[0, head].double(), expected, atol=1e-6, rtol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("count", [6, 40])  # references over the three query heads, fewer and more than columns
def test_fitted_values_are_the_ridge_solution_over_kept_entries(
    monkeypatch: pytest.MonkeyPatch, count: int, compiled: bool
) -> None:
    if not compiled:
        monkeypatch.setattr(value_fit, "can_attend_prompt", lambda *_: False)
    case, ridge = Case.random(None, True, True), 3.0
    found = observe(case, count, torch.ones(1, HEADS, OLD + NEW))
    kept = torch.arange(0, OLD + NEW, 2)
    key, value = case.at(case.key, 0)[:, :, kept], case.value[:, :, kept] + 0.1  # as if they were coded
    columns = CENTROIDS + len(kept)
    is_fitted = torch.arange(columns).expand(1, HEADS, -1) < columns - 4
    is_fitted = is_fitted & (torch.arange(columns) != 7)  # not all of them are the first
    origin = torch.cat([case.centroids.value, case.value[:, :, kept]], 2)
    entries = PromptEntries(key, value, kept[None, None], False, case.centroids)
    values, _ = fit_values(found, entries, origin, is_fitted, ridge, lambda stored: stored)
    tokens = [index * NEW // count for index in range(count)]
    coded = torch.cat([case.centroids.value, value], 2)
    for head in range(HEADS):
        rows, targets = [], []
        for group in range(GROUP):
            for token in tokens:
                everything = torch.arange(OLD + NEW)
                full = case.answer(head, group, token, everything, case.at(case.key, 0)[0], case.value[0])[1]
                weights, output = case.answer(head, group, token, torch.arange(len(kept)), key[0], value[0])
                own = output - weights[:columns] @ coded[0, head].double()
                rows.append(weights[:columns])
                targets.append(full - own)
        weights, target = torch.stack(rows), torch.stack(targets)
        chosen = is_fitted[0, head]
        base = torch.where(chosen[:, None], origin[0, head], coded[0, head]).double()
        residual = target - weights @ base
        penalty = ridge * residual.square().mean() / base[chosen].square().mean()
        own = weights[:, chosen]
        change = torch.linalg.solve(own.T @ own + penalty * torch.eye(own.shape[1]), own.T @ residual)
        expected = base.clone()
        expected[chosen] += change
        torch.testing.assert_close(values[0, head].double(), expected, atol=2e-4, rtol=2e-3)
        assert not torch.allclose(values[0, head].double(), base, atol=1e-2)


@torch.inference_mode()
def test_a_head_gains_only_if_the_stored_values_serve_references_that_the_fit_has_not_seen() -> None:
    case = Case.random(None, False, False)
    found = observe(case, 40, torch.ones(1, HEADS, OLD + NEW))
    kept = torch.arange(0, OLD + NEW, 3)
    key, value = case.at(case.key, 0)[:, :, kept], case.value[:, :, kept]
    entries = PromptEntries(key, value, kept[None, None])
    options = found, entries, value, torch.ones(1, HEADS, len(kept), dtype=torch.bool), 10.0
    assert fit_values(*options, lambda stored: stored)[1].tolist() == [[True, True]]
    noise = torch.tensor([0.0, 5.0])[None, :, None, None]
    assert fit_values(*options, lambda stored: stored + noise)[1].tolist() == [[True, False]]


def test_references_are_spread_over_all_blocks_and_over_the_real_tokens_of_a_row() -> None:
    sample = reference_queries.ReferenceSample.spread(6, 36, 4)
    assert sample.tokens == (4, 9, 14, 20, 25, 30)
    assert sample.starts == (4, 4, 4, 20, 20, 20)
    assert list(sample.blocks()) == [(4, slice(0, 3)), (20, slice(3, 6))]
    assert reference_queries.ReferenceSample.spread(100, 3).tokens == (0, 1, 2)


FITTING = AttentionMatching(sinks=2, eviction_interval=4, references=30, fit_references=30, centroids=2)


@torch.inference_mode()
@pytest.mark.parametrize("chunk", [None, 25])
@pytest.mark.parametrize("bits", [32, 4])
def test_a_padded_row_is_fitted_as_it_is_alone(tiny, bits: int, chunk: int | None) -> None:
    loaded, ids = tiny(), random_ids(2, 90)
    mask = torch.ones_like(ids)
    mask[0, :31] = 0
    plan = quantized_plan(loaded, FITTING, bits)
    plan = with_chunked_prefill(plan, chunk) if chunk else plan
    padded, together = prefill(loaded, plan, ids, mask)
    if chunk:  # chunks begin elsewhere in a row without padding
        assert together.isfinite().all()
        assert (
            prefill(loaded, plan, ids, mask)[0]
            .budgeted_layers[0]
            .slab.tensors[0]
            .equal(padded.budgeted_layers[0].slab.tensors[0])
        )
        return
    for row, own in enumerate((ids[:1, 31:], ids[1:])):
        alone, logits = prefill(loaded, plan, own)
        torch.testing.assert_close(together[row : row + 1], logits, atol=1e-4, rtol=1e-4)
        for layer, head in ((0, 0), (0, 1), (1, 0), (1, 1)):
            assert torch.equal(padded.cached_positions(layer, head, row), alone.cached_positions(layer, head))
        more = random_ids(1, 1, seed=5)
        both = torch.cat([more, more])
        full = torch.cat([mask, torch.ones_like(both)], 1)
        positions = (full.cumsum(-1) - 1)[:, -1:]
        step = loaded.model(both, attention_mask=full, position_ids=positions, past_key_values=padded.copy()).logits[
            row
        ]
        torch.testing.assert_close(step, loaded.model(more, past_key_values=alone).logits[0], atol=2e-3, rtol=2e-3)


@torch.inference_mode()
def test_entries_that_stay_are_not_encoded_again_if_a_head_does_not_gain(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, ids = tiny(), random_ids(1, 60)
    plain = prefill(loaded, quantized_plan(loaded, AttentionMatching(eviction_interval=4, references=20)), ids)[0]

    def never(references, kept, origin, *_):
        return origin + 7.0, torch.zeros(origin.shape[:2], dtype=torch.bool)

    monkeypatch.setattr("baklava.cache.head_groups.scored.fit_values", never)
    fitting = AttentionMatching(eviction_interval=4, references=20, fit_references=20)
    cache = prefill(loaded, quantized_plan(loaded, fitting), ids)[0]
    for layer, other in zip(cache.budgeted_layers, plain.budgeted_layers, strict=True):
        assert all(torch.equal(*pair) for pair in zip(layer.slab.tensors, other.slab.tensors, strict=True))


def test_a_fit_takes_no_bytes_and_a_ring_takes_no_fit(tiny) -> None:
    loaded = tiny()
    with_fit, without = (
        quantized_plan(loaded, HeavyHitter(eviction_interval=4, fit_references=count)) for count in (64, 0)
    )
    assert with_fit.bytes_per_sequence == without.bytes_per_sequence
    assert with_fit.digest != without.digest
    with pytest.raises(UserError, match=r"fit_references 8.* a ring buffer"):
        StreamingLLM(fit_references=8)
    with pytest.raises(UserError, match="fit_ridge a positive number"):
        HeavyHitter(fit_ridge=0.0)


@torch.inference_mode()
def test_a_copy_goes_on_with_the_fitted_values(tiny) -> None:
    loaded, ids = tiny(), random_ids(1, 60)
    cache, _ = prefill(loaded, quantized_plan(loaded, FITTING), ids)
    copied, token = cache.copy(200), random_ids(1, 1, seed=3)
    first = loaded.model(token, past_key_values=cache).logits
    torch.testing.assert_close(loaded.model(token, past_key_values=copied).logits, first)


@torch.inference_mode()
@pytest.mark.parametrize("eviction", [FITTING, AttentionMatching(sinks=2, eviction_interval=4)])
def test_a_model_in_16_bits_is_observed_and_fitted_in_32(eviction) -> None:
    loaded = LoadedModel.of(tiny_model(LlamaConfig(**(SHAPE | {"num_hidden_layers": 2}))).bfloat16())
    cache, logits = prefill(loaded, quantized_plan(loaded, eviction), random_ids(1, 60))
    assert logits.isfinite().all()
    cache.check_integrity(60)


@torch.inference_mode()
def test_references_are_observed_in_32_bits_under_autocast() -> None:
    case, scores = Case.random(None, False, True), torch.ones(2, 1, HEADS, OLD + NEW)
    expected = observe(case, 20, scores[0])
    with torch.autocast("cpu", torch.bfloat16):
        found = observe(case, 20, scores[1])
    for own, other in zip((*found.tensors, scores[1]), (*expected.tensors, scores[0]), strict=True):
        torch.testing.assert_close(own, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_plain_forward_with_gradients_or_under_autocast_is_fitted_too(tiny, autocast: bool) -> None:
    loaded, ids = tiny(), random_ids(1, 61)
    expected = BudgetedCache(quantized_plan(loaded, FITTING))
    with torch.no_grad():
        loaded.model(ids[:, :60], past_key_values=expected)
    cache = BudgetedCache(expected.plan)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loaded.model(ids[:, :60], past_key_values=cache)
        step = loaded.model(ids[:, 60:], past_key_values=cache).logits
    own, other = (each.budgeted_layers[0].groups[0].values.read(10) for each in (cache, expected))
    assert step.isfinite().all()
    if not autocast:
        torch.testing.assert_close(own, other)
