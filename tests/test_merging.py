"""Entries that leave are folded into those that stay."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from handmade import plan_of, random_ids

from baklava.eviction import HeavyHitter, KeyDiff
from baklava.heads.merging import merged
from baklava.model import LoadedModel
from baklava.prefilling import prefill

Maker = Callable[..., LoadedModel]


@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.9])
def test_merging_is_the_weighted_mean_of_its_formula(threshold: float) -> None:
    draw = torch.Generator().manual_seed(0)
    key, value = (torch.randn(1, 1, 400, 4, generator=draw) for _ in range(2))
    positions = torch.arange(-5, 395)[None, None]
    stays = torch.randperm(400, generator=draw)[:30][None, None]
    folded = merged(key, value, positions, stays, sinks=2, threshold=threshold)
    members: dict[int, list[tuple[float, int]]] = {
        place: [(math.e, int(slot))] for place, slot in enumerate(stays[0, 0])
    }
    for slot in set(range(5, 400)) - set(stays[0, 0].tolist()):
        open_to = [place for place, kept in enumerate(stays[0, 0].tolist()) if kept >= 7]
        near = {p: float(torch.cosine_similarity(key[0, 0, slot], key[0, 0, stays[0, 0, p]], 0)) for p in open_to}
        best = max(near, key=lambda place: near[place])
        if near[best] >= threshold:
            members[best].append((math.exp(near[best]), slot))
    for place, group in members.items():
        weights, slots = torch.tensor([w for w, _ in group]), [slot for _, slot in group]
        for ours, entries in ((folded.key, key), (folded.value, value)):
            mean = (entries[0, 0, slots] * weights[:, None]).sum(0) / weights.sum()
            torch.testing.assert_close(ours[0, 0, place], mean, atol=1e-5, rtol=1e-5)
        assert bool(folded.changed[0, 0, place]) == (len(group) > 1)


@torch.inference_mode()
@pytest.mark.parametrize("bits", [32, 4])
@pytest.mark.parametrize("staged", [False, True])
def test_merging_is_the_same_together_and_one_by_one_and_costs_no_bytes(tiny: Maker, bits: int, staged: bool) -> None:
    loaded, ids = tiny(), random_ids(1, 37, seed=3)
    logits = {}
    for merging in (0.0, 0.3):
        eviction = HeavyHitter(sinks=2, interval=4, recent=0.2, staged=staged, merging=merging, distance=0)
        plan = plan_of(loaded, [[14, 30], [20, 20]], eviction, bits=bits)
        one_by_one, _ = prefill(loaded, plan, random_ids(1, 80))
        together = copy.deepcopy(one_by_one)
        slow = torch.cat([loaded.model(t[None], past_key_values=one_by_one).logits for t in ids.T], 1)
        with together.teacher_forcing():
            fast = loaded.model(ids, past_key_values=together).logits
        torch.testing.assert_close(fast, slow, atol=1e-3, rtol=1e-3)
        assert together.nbytes == one_by_one.nbytes <= one_by_one.promised_bytes
        logits[merging] = fast
    assert float((logits[0.0] - logits[0.3]).abs().mean()) > 0.01


@torch.inference_mode()
@pytest.mark.parametrize("bits", [32, 4])
def test_a_left_padded_batch_merges_as_its_rows_do_alone(tiny: Maker, bits: int) -> None:
    loaded, ids = tiny(), random_ids(2, 40, seed=1)
    plan = plan_of(loaded, [[14, 18], [16, 16]], KeyDiff(sinks=2, interval=4, merging=0.5), bits=bits)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    first = prefill(loaded, plan, ids, mask)[0]
    token, options = random_ids(2, 1, seed=8), {"logits_to_keep": 1}
    wider = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
    at = torch.tensor([[31], [40]])
    both = loaded.model(token, attention_mask=wider, position_ids=at, past_key_values=first, **options).logits
    alone = prefill(loaded, plan, ids[:1, 9:])[0]
    torch.testing.assert_close(
        loaded.model(token[:1], past_key_values=alone, **options).logits, both[:1], atol=1e-3, rtol=1e-3
    )
