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
        UserError: the plan is for another model, or cannot take padding.
    """
    plan.check_fits(loaded.identity, loaded.geometry)
    cache = BudgetedCache(plan)
    if cache.eviction.sample.repeated:
        return _reconstructed(loaded, plan, ids, attention_mask)
    size = plan.prefill.chunk or ids.shape[1]
    for start in range(0, ids.shape[1], size):
        stop = min(start + size, ids.shape[1])
        mask = None if attention_mask is None else attention_mask[:, :stop]
        output = loaded.model(ids[:, start:stop], attention_mask=mask, past_key_values=cache, logits_to_keep=1)
    return cache, output.logits[:, -1]


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
