"""Plans by hand, and random tokens to feed them with."""

import torch
from torch import Tensor

from baklava.eviction import Eviction
from baklava.model import LoadedModel
from baklava.plan import AllocationChoice, BudgetPlan, LayerBudget, Prefill


def plan_of(
    loaded: LoadedModel, tokens: list[list[int]], eviction: Eviction, bits: int = 32, context_length: int = 100
) -> BudgetPlan:
    """A plan with these capacities per (layer, KV head)."""
    same = (bits,) * loaded.geometry.kv_heads
    layers = tuple(LayerBudget(tokens=tuple(row), key_bits=same, value_bits=same) for row in tokens)
    return BudgetPlan(
        model=loaded.identity,
        geometry=loaded.geometry,
        context_length=context_length,
        eviction=eviction.choice,
        allocation=AllocationChoice(method="by hand", budget=1.0),
        layers=layers,
    )


def random_ids(rows: int, tokens: int, seed: int = 0) -> Tensor:
    return torch.randint(1, 64, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def chunked(plan: BudgetPlan, chunk: int) -> BudgetPlan:
    """The same plan, whose prompts enter chunk by chunk."""
    return plan.model_copy(update={"prefill": Prefill(mode="chunked", chunk=chunk)})


def mixed(plan: BudgetPlan, bits: list[tuple[int, int]]) -> BudgetPlan:
    """The same plan with these bits of keys and of values per KV head, in every layer."""
    keys, values = zip(*bits, strict=True)
    layers = [layer and LayerBudget(tokens=layer.tokens, key_bits=keys, value_bits=values) for layer in plan.layers]
    return plan.model_copy(update={"layers": tuple(layers)})
