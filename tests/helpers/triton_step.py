"""One decode step of head groups by the Triton kernels, checked against `HeadGroup.attend` of a copy of each group."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.testing import assert_close

from baklava.cache.attention import AttentionParams
from baklava.cache.head_groups import GroupBudget, HeadGroup, LayerTable, NewTokens, ScoredHeadGroup, head_group
from baklava.cache.kernels.fused_decode import can_fuse, fused_steps
from baklava.cache.storage import DenseCodec, MixedPrecisionCodec, SegmentedStorage, Slab, SlotStorage, Storage
from baklava.cache.storage.quantized_codec import unpack
from baklava.eviction import Eviction, HeavyHitter

OUTPUT_TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
ROUNDING_TOLERANCE = 5e-2
"""Tolerance of an output if the new entry is rounded in another way."""


@dataclass(frozen=True)
class Budget:
    """Entries, bits of keys and bits of values of one KV head."""

    tokens: int
    key_bits: int
    value_bits: int
    mixed: bool = False


class Layer:
    """Head groups of one layer, each of one KV head, after a random prompt."""

    def __init__(
        self,
        budgets: Sequence[Budget],
        eviction: Eviction,
        *,
        rows: int = 1,
        group: int = 2,
        head_dim: int = 32,
        prompt: int = 30,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        seed: int = 0,
    ) -> None:
        self._draw = torch.Generator().manual_seed(seed)
        self.rows, self.heads, self.group, self.head_dim = rows, len(budgets), group, head_dim
        self.dtype, self.device, self.position = dtype, device, prompt
        key, value = self._states(prompt), self._states(prompt)
        positions = torch.arange(prompt, device=device)[None]
        self.groups: list[HeadGroup] = []
        for head, budget in enumerate(budgets):
            order = bytes(torch.randperm(head_dim, generator=self._draw).tolist()).hex()
            channels = (order,) if budget.mixed else None
            shape = GroupBudget((head,), budget.tokens, budget.key_bits, budget.value_bits, channels)
            self.groups.append(head_group(shape, eviction, key))
        specs = [spec for made in self.groups for spec in made.specs()]
        self.table = LayerTable(self.groups, rows, iter(Slab(specs, rows, key.device).tensors))
        for made in self.groups:
            scores = torch.rand(rows, 1, prompt, generator=self._draw).to(device) ** 4 if eviction.scored else None
            if isinstance(eviction, HeavyHitter):  # no query has counted for the last entries
                scores[..., max(0, prompt - eviction.distance) :] = 0
            made.load_prompt(key[:, made.index], value[:, made.index], scores, positions)

    def _states(self, tokens: int) -> Tensor:
        states = torch.randn(self.rows, self.heads, tokens, self.head_dim, generator=self._draw)
        states += torch.linspace(-1, 1, self.head_dim)  # keys lie around a mean
        return states.to(self.dtype).to(self.device)

    def step(self, params: AttentionParams, num_tokens: int = 1) -> None:
        """Decode tokens, and check outputs, entries and scores against copies of the groups that get them one by one.

        Args:
            params: What a model's attention has in addition.
            num_tokens: How many tokens the kernel gets at once.
        """
        query = torch.randn(self.rows, self.heads, self.group, num_tokens, self.head_dim, generator=self._draw)
        query, key, value = query.to(self.dtype).to(self.device), self._states(num_tokens), self._states(num_tokens)
        at = torch.arange(self.position, self.position + num_tokens, device=self.device)[None]
        tokens = NewTokens(self.position, query, key, value, at, padded=False, teacher_forced=False)
        copies = copy.deepcopy(self.groups)
        theirs = torch.empty_like(query)
        for group in copies:
            own = params.for_heads(group.index, self.group)
            for number in range(num_tokens):
                token = tokens.for_heads(group.index).narrow(number, number + 1)
                theirs[:, group.index, :, number : number + 1] = group.attend(token, own)
        assert can_fuse(self.groups, key)
        ours = fused_steps(self.table, (query, key, value), self.position, params)
        self.position += num_tokens
        same = [check_equal(*pair, self.dtype) for pair in zip(self.groups, copies, strict=True)]
        # Of entries that are evicted at once, nobody can see how they were rounded.
        seen = num_tokens == 1 and all((group.cached_positions() == at).any(-1).all() for group in self.groups)
        tolerance = OUTPUT_TOLERANCE[self.dtype] if all(same) and seen else ROUNDING_TOLERANCE
        assert_close(ours, theirs, atol=tolerance, rtol=tolerance)

    def fill_empty_slots(self) -> None:
        """Put NaN into the slots that have no entry; one of them is the next."""
        for group in self.groups:
            for storage in (group.keys, group.values):
                for start, slots in _segments(storage):
                    for tensor in slots.encoded:
                        tensor[:, :, max(0, group.num_filled - start) :] = (
                            torch.nan if tensor.is_floating_point() else 255
                        )
            if isinstance(group, ScoredHeadGroup):
                group.scores[..., group.num_filled :] = torch.nan


def check_equal(ours: HeadGroup, theirs: HeadGroup, dtype: torch.dtype) -> bool:
    """Check that two groups store nearly the same entries, and return whether they are equal.

    Sums are in another order, and a rotation in half precision rounds. So a code or a number may be the next one.
    """
    assert ours.num_filled == theirs.num_filled
    same, exact = True, dtype == torch.float32
    for (codes, numbers), (other_codes, other_numbers) in zip(_stored(ours), _stored(theirs), strict=True):
        if codes.numel():
            assert int((codes.int() - other_codes.int()).abs().max()) <= 1
            assert float((codes != other_codes).float().mean()) < 0.03
        same = same and torch.equal(codes, other_codes) and torch.equal(numbers, other_numbers)
        alike = (codes == other_codes).all(-1)  # the scale of an entry follows from its codes
        _check_close(numbers[alike], other_numbers[alike], exact)
        _check_close(numbers[~alike], other_numbers[~alike], exact=False)
    if isinstance(ours, ScoredHeadGroup) and isinstance(theirs, ScoredHeadGroup):
        filled = slice(0, ours.num_filled)
        assert torch.equal(ours.positions[..., filled], theirs.positions[..., filled])
        tolerance = {"atol": 1e-6, "rtol": 1e-3 if same else 1e-2} if exact else {"atol": 1e-2, "rtol": 3e-2}
        assert_close(ours.scores[..., filled], theirs.scores[..., filled], **tolerance)
        if ours.centroids is not None and theirs.centroids is not None:
            for mine, other in zip(ours.centroids.tensors, theirs.centroids.tensors, strict=True):
                assert_close(mine, other, atol=2e-3 if exact else 3e-2, rtol=2e-3 if exact else 3e-2)
    return same


def _check_close(ours: Tensor, theirs: Tensor, exact: bool) -> None:
    assert_close(ours, theirs, atol=1e-5 if exact else 3e-2, rtol=2e-3 if exact else 2e-2)


def _stored(group: HeadGroup) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the codes and their scales, or no codes and the dense entries, of each segment and part."""
    for storage in (group.keys, group.values):
        for start, slots in _segments(storage):
            encoded = [part[:, :, : max(0, group.num_filled - start)] for part in slots.encoded]
            if isinstance(slots.codec, DenseCodec):
                yield encoded[0][..., :0], encoded[0]
                continue
            parts = slots.codec.codecs if isinstance(slots.codec, MixedPrecisionCodec) else [slots.codec]
            for part, packed, scales in zip(parts, encoded[::2], encoded[1::2], strict=True):
                yield unpack(packed, part.bits, part.head_dim), scales


def _segments(storage: Storage) -> list[tuple[int, SlotStorage]]:
    if isinstance(storage, SegmentedStorage):
        return [(segment.start, segment.storage) for segment in storage.segments]
    assert isinstance(storage, SlotStorage)
    return [(0, storage)]
