"""One contract for all storages, and what packed ones promise beside it."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from baklava.cache.storage import EMPTY, Slab, Storage, StorageLayout, TensorSpec, storage_for
from baklava.cache.storage.fake_quantize import fake_quantize
from baklava.cache.storage.hadamard import HadamardRotation
from baklava.cache.storage.quantized_codec import pack, unpack
from baklava.errors import UserError
from baklava.plan.budget_plan import EvictionConfig, head_bytes
from baklava.plan.geometry import BitSplit, CacheGeometry, bit_split, tensor_bytes

BATCH, HEADS, DIM, TOKENS = 2, 3, 32, 24
LAYOUTS = [
    StorageLayout(TOKENS),
    StorageLayout(TOKENS, sinks=3),
    StorageLayout(TOKENS, sinks=2, residual=5),
    StorageLayout(TOKENS, residual=4),
]
CODED = [((DIM, bits),) for bits in (32, 16, 8, 6, 5, 4, 3, 2)] + [
    bit_split(DIM, bits, True) for bits in (6, 5, 4, 3, 2)
]

every_storage = pytest.mark.parametrize(
    ("coded", "layout", "centred"),
    [(coded, layout, centred) for coded in CODED for layout in LAYOUTS for centred in (False, True)],
    ids=str,
)


def draw(tokens: int, seed: int = 0, dim: int = DIM) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, HEADS, tokens, dim, generator=generator) + torch.arange(dim) / dim


def slots(*rows: int) -> Tensor:
    return torch.tensor(rows).expand(BATCH, HEADS, -1).clone()


def packed(coded: BitSplit) -> bool:
    return coded[0][1] < 16


def alike(channels: int, bits: int) -> BitSplit:
    """All channels in the same bits."""
    return ((channels, bits),)


def part_of(slots: Tensor, layout: StorageLayout) -> Tensor:
    return (slots >= layout.sinks).int() + (slots >= layout.residual_start).int()


def allocated(storage: Storage, slots: int, batch: int = BATCH) -> Storage:
    """The storage with a slab of this many slots."""
    storage.bind(iter(Slab(storage.specs(slots), batch, torch.device("cpu")).tensors))
    return storage


def filled(coded: BitSplit, layout: StorageLayout, centred: bool) -> Storage:
    """A full storage, whose mean is fitted to most of its entries."""
    storage = allocated(storage_for(coded, draw(1), layout, centred=centred), TOKENS)
    storage.select(torch.arange(20)[None, None], 0, draw(20))
    storage.write(20, draw(TOKENS - 20, seed=1))
    return storage


@pytest.mark.slow
@every_storage
def test_what_is_written_scattered_and_stored_reads_back_alike(
    coded: BitSplit, layout: StorageLayout, centred: bool
) -> None:
    storage, everywhere = filled(coded, layout, centred), torch.arange(TOKENS)[None, None]
    entries = torch.cat([draw(20), draw(TOKENS - 20, seed=1)], 2)
    assert torch.equal(storage.read(TOKENS), storage.round_trip(entries, everywhere))
    assert torch.equal(torch.cat(list(storage.iter_blocks(TOKENS)), 2), storage.read(TOKENS))
    assert torch.equal(storage.read(7), storage.read(TOKENS)[:, :, :7])
    new = draw(2, seed=2)
    targets = torch.stack([slots(1, 22)[0], slots(9, 3)[0]])
    before = storage.read(TOKENS)
    storage.scatter(targets, new)
    wide = targets[..., None].expand(-1, -1, -1, DIM)
    expected = before.scatter(2, wide, storage.round_trip(new, targets))
    assert torch.equal(storage.read(TOKENS), expected)
    storage.scatter(torch.tensor([[[0]], [[23]]]), new[:, :, :1])
    assert torch.equal(storage.read(TOKENS)[1, :, 23:], storage.round_trip(new[:, :, :1], slots(23))[1])


@every_storage
def test_what_is_replaced_is_encoded_and_the_rest_keeps_its_codes(
    coded: BitSplit, layout: StorageLayout, centred: bool
) -> None:
    storage, new = filled(coded, layout, centred), draw(22, seed=2)
    before, codes = storage.read(TOKENS), [tensor.clone() for tensor in storage.tensors]
    where = torch.rand(BATCH, HEADS, 22, generator=torch.Generator().manual_seed(3)) < 0.5
    stored = storage.round_trip(new, torch.arange(22)[None, None])
    storage.replace(new, torch.zeros_like(where))
    assert all(torch.equal(*pair) for pair in zip(storage.tensors, codes, strict=True))
    storage.replace(new, where)
    expected = torch.cat([torch.where(where[..., None], stored, before[:, :, :22]), before[:, :, 22:]], 2)
    assert torch.equal(storage.read(TOKENS), expected)


@pytest.mark.slow
@every_storage
def test_moves_copy_codes_and_encode_recent_entries_once(coded: BitSplit, layout: StorageLayout, centred: bool) -> None:
    storage = filled(coded, layout, centred)
    before = storage.read(TOKENS)
    # Rows differ in what moves; an entry that goes nowhere goes onto itself.
    source = torch.stack([slots(20, 21, 4)[0], slots(23, 0, 1)[0]])
    target = torch.stack([slots(5, 3, 4)[0], slots(6, 0, 1)[0]])
    for _ in range(3):
        storage.move(source, target)
    wide = target[..., None].expand(-1, -1, -1, DIM)
    moved = before.gather(2, source[..., None].expand(-1, -1, -1, DIM))
    same = part_of(source, layout) == part_of(target, layout) if packed(coded) else torch.ones_like(source).bool()
    expected = before.scatter(2, wide, torch.where(same[..., None], moved, storage.round_trip(moved, target)))
    assert torch.equal(storage.read(TOKENS), expected)


@pytest.mark.slow
@every_storage
def test_a_selection_is_of_old_entries_as_they_are_and_of_new_ones(
    coded: BitSplit, layout: StorageLayout, centred: bool
) -> None:
    storage = filled(coded, layout, centred)
    before, new = storage.read(TOKENS), draw(9, seed=3)
    chosen = slots(0, 1, 2, 3, 4, 7, 11, 15, TOKENS + 2, TOKENS + 5, EMPTY, TOKENS + 8)
    for _ in range(3):
        again = copy.deepcopy(storage)
        again.select(chosen, TOKENS, new)
    assert torch.equal(again.read(8), before[:, :, [0, 1, 2, 3, 4, 7, 11, 15]])
    fresh = storage.round_trip(new[:, :, [2, 5, 8]], slots(8, 9, 11))
    assert torch.equal(again.read(12)[:, :, [8, 9, 11]], fresh)
    assert torch.equal(storage.read(TOKENS), before)
    again.select(torch.arange(15)[None, None], 15, new)
    assert torch.equal(again.read(8), before[:, :, [0, 1, 2, 3, 4, 7, 11, 15]])


@every_storage
def test_bytes_are_those_of_the_plan(coded: BitSplit, layout: StorageLayout, centred: bool) -> None:
    storage = filled(coded, layout, centred)
    mean = DIM * 2 if centred and packed(coded) else 0
    assert storage.nbytes == BATCH * HEADS * (tensor_bytes(TOKENS, coded, layout.sinks + layout.residual) + mean)
    allocated(storage, layout.sinks + 1)
    assert storage.nbytes == BATCH * HEADS * (tensor_bytes(layout.sinks + 1, coded, layout.sinks) + mean)


@given(
    shapes=st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=3), max_size=6),
    batch=st.integers(1, 3),
    drawn=st.randoms(),
)
def test_a_slab_has_the_bytes_of_its_tensors_and_none_overlap(shapes: list[list[int]], batch: int, drawn: Any) -> None:
    dtypes = [torch.uint8, torch.float16, torch.float32, torch.int64]
    specs = [TensorSpec(tuple(shape), drawn.choice(dtypes)) for shape in shapes]
    slab = Slab(specs, batch, torch.device("cpu"))
    assert [(each.shape[1:], each.dtype) for each in slab.tensors] == [(spec.shape, spec.dtype) for spec in specs]
    assert slab.nbytes == sum(each.nbytes for each in slab.tensors)
    for tensor in slab.tensors:
        start = tensor.storage_offset() * tensor.itemsize
        assert start % (tensor.nbytes & -tensor.nbytes or 1) == 0
    for number, tensor in enumerate(slab.tensors):
        tensor.fill_(number)
    assert all(bool((tensor == number).all()) for number, tensor in enumerate(slab.tensors))


@pytest.mark.parametrize("bits", [8, 6, 5, 4, 3, 2])
@pytest.mark.parametrize("sinks", [0, 4])
@pytest.mark.parametrize("residual", [0, 8, 20, 35])
@pytest.mark.parametrize("mixed_precision", [False, True])
def test_a_pair_of_storages_is_a_head_of_the_plan(bits: int, sinks: int, residual: int, mixed_precision: bool) -> None:
    geometry = CacheGeometry(layers=1, kv_heads=1, query_group=1, head_dim=64, windows=(None,))
    eviction = EvictionConfig(method="streaming_llm", sinks=sinks, eviction_interval=8, residual_length=residual)
    layout = StorageLayout(40, sinks, residual)
    sides = [(bit_split(64, bits, mixed_precision), True), (alike(64, bits), False)]
    pair = [storage_for(coded, torch.empty(1, 1, 0, 64), layout, centred=centred) for coded, centred in sides]
    for storage in pair:
        allocated(storage, 40, batch=1)
    assert sum(storage.nbytes for storage in pair) == head_bytes(geometry, 40, bits, bits, eviction, mixed_precision)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_no_entry_is_read_further_away_than_nothing(bits: int) -> None:
    """A constant entry is the worst for the codes: its rotation has one channel that is not 0."""
    entries = torch.zeros(1, 1, 2, 64)
    entries[0, 0, 0, 5], entries[0, 0, 1, ::3] = 8.0, 100.0
    storage = storage_for(alike(64, bits), entries, StorageLayout(2))
    read = storage.round_trip(entries, torch.arange(2)[None, None])
    assert ((read - entries).square().sum(-1) < entries.square().sum(-1)).all()


@pytest.mark.parametrize(("bits", "error"), [(8, 0.0002), (4, 0.0120), (3, 0.0395), (2, 0.135)])
def test_the_error_is_near_that_of_the_best_uniform_levels_and_no_entry_is_shortened(bits: int, error: float) -> None:
    entries = torch.randn(1, 2, 2000, 128, generator=torch.Generator().manual_seed(0))
    skewed = entries * torch.linspace(0.01, 3, 128)
    for each in (entries, HadamardRotation.of((128,), skewed).rotate(skewed)):
        storage = storage_for(alike(128, bits), each, StorageLayout(2000))
        read = storage.round_trip(each, torch.arange(2000)[None, None])
        assert (read - each).square().mean() / each.square().mean() < error
        along = (read * each).sum(-1) / each.square().sum(-1)
        torch.testing.assert_close(along, torch.ones_like(along), rtol=0, atol=1e-3)


def test_a_mean_that_keys_share_costs_no_precision() -> None:
    keys = draw(500, dim=64) + 20 * torch.randn(1, HEADS, 1, 64, generator=torch.Generator().manual_seed(5))
    errors = []
    for centred in (False, True):
        storage = allocated(storage_for(alike(64, 4), keys, StorageLayout(500, sinks=2), centred=centred), 500)
        storage.select(torch.arange(500)[None, None], 0, keys)
        errors.append(float((storage.read(500) - keys)[:, :, 2:].square().mean()))
    assert errors[1] < 0.015 < 1 < errors[0]


def test_the_mean_is_of_the_first_entries_and_not_of_sinks_or_padding() -> None:
    keys, layout = draw(30) + 5, StorageLayout(40, sinks=2)
    odd = keys.clone()
    odd[:, :, :2] += 100
    odd[:, :, 25:] -= 50
    whole, cut = (allocated(storage_for(alike(DIM, 4), keys, layout, centred=True), 30) for _ in range(2))
    whole.select(torch.arange(25)[None, None], 0, keys[:, :, :25])
    padded = torch.tensor([*range(25), *[EMPTY] * 5])[None, None]
    cut.select(padded, 0, odd)
    assert torch.equal(whole.read(25)[:, :, 2:], cut.read(25)[:, :, 2:])
    assert float((whole.read(25) - keys[:, :, :25])[:, :, 2:].square().mean()) < 0.02


def test_few_entries_make_no_mean_and_late_ones_change_nothing() -> None:
    keys, layout = draw(40) + 5, StorageLayout(60)
    few = allocated(storage_for(alike(DIM, 4), keys, layout, centred=True), 60)
    few.select(torch.arange(5)[None, None], 0, keys[:, :, :5])
    plain = allocated(storage_for(alike(DIM, 4), keys, layout), 60)
    plain.select(torch.arange(5)[None, None], 0, keys[:, :, :5])
    assert torch.equal(few.read(5), plain.read(5))
    before = few.read(5).clone()
    few.select(torch.arange(40)[None, None], 5, keys[:, :, 5:])
    assert torch.equal(few.read(5), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bits", [8, 6, 5, 4, 3, 2])
def test_extreme_entries_stay_finite(dtype: torch.dtype, bits: int) -> None:
    top = 60000.0
    entries = torch.stack(
        [torch.zeros(DIM), torch.full((DIM,), 1e-7), torch.eye(DIM)[0] * top, torch.full((DIM,), -top)]
    )
    entries = entries.to(dtype).expand(BATCH, HEADS, -1, -1)
    storage = storage_for(alike(DIM, bits), entries, StorageLayout(4))
    stored = storage.round_trip(entries, torch.arange(4)[None, None])
    assert stored.dtype == dtype
    assert bool(stored.isfinite().all())
    assert float(stored[:, :, 0].abs().max()) == 0
    assert float(stored[:, :, 1].abs().max()) < 1e-5
    torch.testing.assert_close(stored[:, :, 3].float(), torch.full((BATCH, HEADS, DIM), -top), rtol=0.01, atol=0)


@given(bits=st.sampled_from([8, 6, 5, 4, 3, 2]), eighths=st.integers(1, 12), seed=st.integers(0, 2**30))
def test_packed_codes_come_back_exactly(bits: int, eighths: int, seed: int) -> None:
    head_dim, generator = 8 * eighths, torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (2, 3, 5, head_dim), generator=generator).to(torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape[-1] == head_dim * bits // 8
    assert torch.equal(unpack(packed, bits, head_dim), codes)


@pytest.mark.parametrize(("bits", "head_dim", "multiple"), [(4, 3, 2), (2, 6, 4), (3, 12, 8)])
def test_heads_that_do_not_fill_bytes_are_refused(bits: int, head_dim: int, multiple: int) -> None:
    with pytest.raises(UserError, match=f"a multiple of {multiple}; keep them in 16 bits"):
        storage_for(alike(head_dim, bits), torch.empty(1, 1, 0, head_dim), StorageLayout(10))


@given(parts=st.lists(st.integers(1, 70), min_size=1, max_size=3), seed=st.integers(0, 2**30), ordered=st.booleans())
def test_a_rotation_preserves_products_and_has_an_inverse(parts: list[int], seed: int, ordered: bool) -> None:
    generator, head_dim = torch.Generator().manual_seed(seed), sum(parts)
    pair = torch.randn(2, HEADS, 5, head_dim, generator=generator)
    order = torch.stack([torch.randperm(head_dim, generator=generator) for _ in range(HEADS)]) if ordered else None
    rotation = HadamardRotation.of(tuple(parts), pair, order)
    turned = rotation.rotate(pair)
    torch.testing.assert_close(rotation.inverse_rotate(turned), pair, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close((turned[0] * turned[1]).sum(-1), (pair[0] * pair[1]).sum(-1), atol=1e-4, rtol=1e-4)
    grouped = rotation.rotate(pair[:, :, None])
    assert torch.equal(grouped[:, :, 0], turned)


@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 112, 128])
def test_mixed_precision_keys_are_never_worse_than_plain_ones(head_dim: int) -> None:
    keys = torch.randn(HEADS, 2000, head_dim, generator=torch.Generator().manual_seed(0))
    keys = keys * torch.linspace(0.05, 3, head_dim)
    order = torch.arange(head_dim).flip(0).expand(HEADS, -1)
    plain, mixed_precision = (fake_quantize(keys, 4, 0, centred=True, order=each) for each in (None, order))
    assert float((mixed_precision - keys).square().mean()) <= float((plain - keys).square().mean())


def test_channels_that_matter_most_are_coded_best() -> None:
    keys = torch.randn(1, HEADS, 2000, 64, generator=torch.Generator().manual_seed(0))
    order = torch.arange(64).flip(0).expand(HEADS, -1)
    keys, loud = keys * (torch.arange(64) + 1), torch.arange(64) >= 32
    errors = {}
    for mixed_precision in (False, True):
        back = fake_quantize(keys[0], 4, 0, centred=True, order=order if mixed_precision else None)
        off = (back - keys[0]).square().mean((0, 1))
        errors[mixed_precision] = float(off.mean())
        if mixed_precision:
            assert float(off[loud].mean()) < float(off[~loud].mean()) * 2
    assert errors[True] < 0.75 * errors[False]


@pytest.mark.parametrize("bits", [8, 16])
def test_moves_that_overlap_read_all_entries_before_they_write(bits: int) -> None:
    """An eviction moves the oldest entries of the residual to holes before it, and the others up to its start."""
    entries = (
        torch.arange(1.0, 21)[None, None, :, None] * torch.randn(2, 1, 1, 64, generator=torch.manual_seed(0)).sign()
    )
    storage = storage_for(alike(64, bits), entries, StorageLayout(20, sinks=2, residual=8))
    allocated(storage, 20, batch=2)
    storage.select(torch.arange(20)[None, None].expand(2, 1, -1), 0, entries)
    source = torch.tensor([[[12, 13, 14, 15, 16, 17, 18, 19]], [[12, 14, 15, 16, 17, 18, 19, 19]]])
    target = torch.tensor([[[5, 7, 12, 13, 14, 15, 16, 17]], [[9, 12, 13, 14, 15, 16, 17, 19]]])
    before = storage.read(20).clone()
    storage.move(source, target)
    after = storage.read(20)
    for row in range(2):
        expected = before[row].clone()
        expected[:, target[row, 0]] = before[row][:, source[row, 0]]
        torch.testing.assert_close(after[row], expected, rtol=0.02, atol=0)
        assert torch.equal(after[row, :, 12:18], expected[:, 12:18])
