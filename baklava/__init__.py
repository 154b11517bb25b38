"""Budgeted KV caches for Hugging Face models: every (layer, KV head) gets its own byte budget.

The names below are imported when they are first used, so that `import baklava` loads neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from baklava.cache.budgeted_cache import BudgetedCache
    from baklava.errors import UserError
    from baklava.plan.budget_plan import BudgetPlan
    from baklava.runtime.model_loader import LoadedModel, load
    from baklava.runtime.prefill import prefill

__version__ = "0.2.0"

__all__ = ["BudgetPlan", "BudgetedCache", "LoadedModel", "UserError", "load", "prefill"]

_MODULES = {
    "BudgetPlan": "baklava.plan.budget_plan",
    "BudgetedCache": "baklava.cache.budgeted_cache",
    "LoadedModel": "baklava.runtime.model_loader",
    "UserError": "baklava.errors",
    "load": "baklava.runtime.model_loader",
    "prefill": "baklava.runtime.prefill",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'baklava' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
