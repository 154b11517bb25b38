"""How a prompt enters a budgeted cache: whole, chunk by chunk, or whole and then repeated; and once for many plans."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from baklava.cache import BudgetedCache
from baklava.errors import UserError
from baklava.eviction import Eviction, eviction_of
from baklava.model import LoadedModel
from baklava.plan import BudgetPlan
from baklava.recording import Recording, RecordingCache
from baklava.repetition import repeated

Ids = Int[Tensor, "batch tokens"]
Logits = Float[Tensor, "batch vocabulary"]


@dataclass(frozen=True)
class Recorded:
    """A prompt that the full cache has attended to once, for any number of plans: no plan changes its `logits`."""

    ids: Ids
    recording: Recording
    logits: Logits


@torch.inference_mode()
def record(loaded: LoadedModel, ids: Ids, evictions: Sequence[Eviction]) -> Recorded:
    """Prefill a prompt with the full cache, and score it for these eviction methods.

    Raises:
        UserError: the model has sliding layers, or the prompt leaves no room to repeat it where a method must.
    """
    cache = RecordingCache(loaded.geometry, evictions)
    logits = loaded.model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1]
    recording = cache.recording(ids.shape[1])
    if any(eviction.sample.repeated for eviction in evictions):
        recording = repeated(loaded, ids, recording)
    return Recorded(ids, recording, logits)


@torch.inference_mode()
def cut(
    loaded: LoadedModel, recorded: Recorded, plan: BudgetPlan, room: int | None = None
) -> tuple[BudgetedCache, Logits]:
    """What `prefill` gives, from a recorded prompt: a copy of its cache, cut to the plan.

    Raises:
        UserError: the plan is for another model, or its eviction method was not recorded.
    """
    plan.check_fits(loaded.identity, loaded.geometry)
    if plan.prefill.mode == "dense":
        return BudgetedCache.cut(plan, recorded.recording, room), recorded.logits
    # What a chunk's tokens are depends on what was kept of the chunks before, so such a plan prefills for itself.
    return prefill(loaded, plan, recorded.ids, room=room)


@torch.inference_mode()
def prefill(
    loaded: LoadedModel,
    plan: BudgetPlan,
    ids: Ids,
    attention_mask: Ids | None = None,
    room: int | None = None,
) -> tuple[BudgetedCache, Logits]:
    """A cache that holds a prompt as its plan says, and the logits of the token behind it.

    `room` is the most tokens that any row will have in the end, as in `BudgetedCache`.
    A plain forward does as well, and takes any plan but those that score by context reconstruction; chunk by chunk here
    also bounds what the rest of the model holds.

    Raises:
        UserError: the plan is for another model, the prompt is empty, or the plan's method cannot repeat it.
    """
    plan.check_fits(loaded.identity, loaded.geometry)
    if ids.shape[1] == 0:
        raise UserError("a prompt of 0 tokens leaves nothing to go on from; give at least one token")
    cache = BudgetedCache(plan, room)
    if cache.eviction.sample.repeated:
        return _reconstructed(loaded, plan, ids, attention_mask, room)
    size = plan.prefill.chunk or ids.shape[1]
    for start in range(0, ids.shape[1], size):
        stop = min(start + size, ids.shape[1])
        padding = {} if attention_mask is None else _padding(attention_mask, start, stop)
        output = loaded.model(ids[:, start:stop], **padding, past_key_values=cache, logits_to_keep=1)
    return cache, output.logits[:, -1]


def _padding(attention_mask: Ids, start: int, stop: int) -> dict[str, Tensor]:
    """What a forward of these columns is told of padding: positions count a row's real tokens, as generate() does."""
    positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    return {"attention_mask": attention_mask[:, :stop], "position_ids": positions[:, start:stop]}


def _reconstructed(
    loaded: LoadedModel, plan: BudgetPlan, ids: Ids, attention_mask: Ids | None, room: int | None
) -> tuple[BudgetedCache, Logits]:
    if attention_mask is not None and not bool(attention_mask.all()):
        raise UserError(
            f"{plan.eviction.method} repeats the prompt, which needs rows without padding; prefill one row at a time"
        )
    return cut(loaded, record(loaded, ids, (eviction_of(plan.eviction),)), plan, room)
