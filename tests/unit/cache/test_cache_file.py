"""A saved cache continues as it would have, and nothing else is taken for it."""

import json

import pytest
import torch
from model_families import model_pair
from plan_factory import make_plan, random_ids, with_bits
from safetensors import safe_open
from safetensors.torch import save_file
from torch.testing import assert_close

from baklava.cache.budgeted_cache import BudgetedCache
from baklava.errors import UserError
from baklava.eviction import AttentionMatching, ExpectedAttention, HeavyHitter, StreamingLLM
from baklava.plan.budget_plan import full_cache_plan
from baklava.runtime.prefill import prefill

BUDGETS = [[20, 40], [28, 64]]
EVICTIONS = [
    HeavyHitter(eviction_interval=4, distance=0, centroids=2),
    AttentionMatching(eviction_interval=4, references=8, fit_references=12),
    ExpectedAttention(eviction_interval=4, window=20),
    StreamingLLM(),
]


@torch.inference_mode()
def steps(loaded, cache, tokens):
    return torch.cat([loaded.model(token[:, None], past_key_values=cache).logits for token in tokens.T], 1)


@pytest.mark.parametrize("eviction", EVICTIONS, ids=lambda eviction: eviction.name)
@pytest.mark.parametrize("bits", [None, [(4, 3), (6, 5)]], ids=["16 bits", "packed"])
@pytest.mark.parametrize("padded", [False, True])
def test_a_loaded_cache_continues_as_the_saved_one(tiny, tmp_path, eviction, bits, padded):
    loaded = tiny(head_dim=32)
    plan = make_plan(loaded, BUDGETS, eviction, bits=16)
    plan = with_bits(plan, bits) if bits else plan
    ids, mask = random_ids(2, 90), torch.ones(2, 90, dtype=torch.long)
    mask[0, :9] = 1 - padded
    cache, _ = prefill(loaded, plan, ids, mask, max_tokens=130)
    steps(loaded, cache, random_ids(2, 5, seed=3))
    file = tmp_path / "document.safetensors"
    cache.save(file)
    again = BudgetedCache.load(file, plan)
    assert again.get_seq_length() == 95
    assert again.nbytes == cache.nbytes
    assert again.max_tokens == 130
    more = random_ids(2, 30, seed=4)
    assert torch.equal(steps(loaded, again, more), steps(loaded, cache, more))
    again.check_integrity(125)
    copied = BudgetedCache.load(file, plan).copy(200)
    assert_close(steps(loaded, copied, more), steps(loaded, BudgetedCache.load(file, plan), more), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["gemma3", "gemma4 shared", "qwen3_next", "lfm2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_layers_are_saved_along(family, dtype, tmp_path):
    loaded, _ = model_pair(family, dtype)
    plan = full_cache_plan(loaded.identity, loaded.geometry, 120)
    cache, _ = prefill(loaded, plan, random_ids(1, 70))
    cache.save(tmp_path / "cache")
    again = BudgetedCache.load(tmp_path / "cache", plan)
    more = random_ids(1, 20, seed=4)
    assert torch.equal(steps(loaded, again, more), steps(loaded, cache, more))
    again.check_integrity(90)


@pytest.fixture
def saved(tiny, tmp_path):
    loaded = tiny(head_dim=32)
    plan = make_plan(loaded, BUDGETS, HeavyHitter(eviction_interval=4), bits=16)
    cache, _ = prefill(loaded, plan, random_ids(1, 90))
    cache.save(tmp_path / "cache")
    return loaded, plan, tmp_path / "cache"


def test_a_file_takes_what_the_cache_takes(saved):
    _, plan, file = saved
    assert plan.bytes_per_sequence < file.stat().st_size < plan.bytes_per_sequence + 5000


def test_only_the_plan_that_it_was_saved_under_loads_it(saved):
    loaded, _, file = saved
    other = make_plan(loaded, BUDGETS, HeavyHitter(eviction_interval=5), bits=16)
    with pytest.raises(UserError, match=r"was saved under the plan .* of tiny, not under"):
        BudgetedCache.load(file, other)


@pytest.mark.parametrize("damage", ["missing", "cut", "flipped", "other", "renamed"])
def test_what_is_damaged_or_something_else_is_refused(saved, damage):
    _, plan, file = saved
    content = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage == "other":
        save_file({"weight": torch.zeros(3)}, file)
    else:
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            header = opened.metadata()
        header["metadata"] = json.dumps(json.loads(header["metadata"]) | {"num_tokens": "91"})
        save_file(tensors, file, metadata=header)
    with pytest.raises(UserError, match=r"cannot read the cache|is not a cache|is damaged"):
        BudgetedCache.load(file, plan)


def test_a_cache_that_is_empty_or_has_nowhere_to_go_is_not_saved(saved, tmp_path):
    _, plan, file = saved
    with pytest.raises(UserError, match="empty"):
        BudgetedCache(plan).save(tmp_path / "empty")
    with pytest.raises(UserError, match="cannot write"):
        BudgetedCache.load(file, plan).save(tmp_path / "none" / "cache")
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
