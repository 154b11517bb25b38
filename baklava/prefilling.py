"""How a prompt enters a budgeted cache: whole, chunk by chunk, or whole and then repeated."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from baklava.cache import BudgetedCache
from baklava.errors import UserError
from baklava.model import LoadedModel
from baklava.plan import BudgetPlan
from baklava.recording import RecordingCache
from baklava.repetition import repeated

Ids = Int[Tensor, "batch tokens"]
Logits = Float[Tensor, "batch vocabulary"]


@torch.inference_mode()
def prefill(
    loaded: LoadedModel, plan: BudgetPlan, ids: Ids, attention_mask: Ids | None = None
) -> tuple[BudgetedCache, Logits]:
    """A cache that holds a prompt as its plan says, and the logits of the token behind it.

    A plain forward does as well, and takes any plan but those that score by context reconstruction; chunk by chunk here
    also bounds what the rest of the model holds.

    Raises:
        UserError: the plan is for another model, the prompt is empty, or the plan's method cannot repeat it.
    """
    plan.check_fits(loaded.identity, loaded.geometry)
    if ids.shape[1] == 0:
        raise UserError("a prompt of 0 tokens leaves nothing to go on from; give at least one token")
    cache = BudgetedCache(plan)
    if cache.eviction.sample.repeated:
        return _reconstructed(loaded, plan, ids, attention_mask)
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
    loaded: LoadedModel, plan: BudgetPlan, ids: Ids, attention_mask: Ids | None
) -> tuple[BudgetedCache, Logits]:
    if attention_mask is not None and not bool(attention_mask.all()):
        raise UserError(
            f"{plan.eviction.method} repeats the prompt, which needs rows without padding; prefill one row at a time"
        )
    full = RecordingCache(loaded.geometry, ())
    logits = loaded.model(ids, past_key_values=full, logits_to_keep=1).logits[:, -1]
    return BudgetedCache.cut(plan, repeated(loaded, ids, full.recording(ids.shape[1]))), logits
