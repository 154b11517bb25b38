"""Tasks: contexts with questions about them, made from any prose. One task a file; `TASKS` maps names to classes."""

from baklava.errors import UserError
from baklava.tasks.base import Prompt, Question, Task, prompts
from baklava.tasks.common_words import CommonWords
from baklava.tasks.copy import Copy
from baklava.tasks.few_shot import FewShot
from baklava.tasks.frequent_words import FrequentWords
from baklava.tasks.kv_retrieval import KeyValueRetrieval
from baklava.tasks.multi_needle import MultiNeedle
from baklava.tasks.multi_query import MultiQuery
from baklava.tasks.multi_value import MultiValue
from baklava.tasks.needle import SingleNeedle
from baklava.tasks.passkey import Passkey
from baklava.tasks.prose import Prose
from baklava.tasks.variable_tracking import VariableTracking

_TASKS: tuple[type[Task], ...] = (
    Passkey,
    SingleNeedle,
    MultiNeedle,
    KeyValueRetrieval,
    MultiValue,
    MultiQuery,
    VariableTracking,
    CommonWords,
    FrequentWords,
    Copy,
    FewShot,
)
TASKS: dict[str, type[Task]] = {task.name: task for task in _TASKS}

__all__ = ["TASKS", "Prompt", "Prose", "Question", "Task", "prompts", "task_of"]


def task_of(name: str) -> type[Task]:
    """The class of a task; an unknown name lists the known ones."""
    if name not in TASKS:
        raise UserError(f"unknown task {name!r}; choose from {', '.join(TASKS)}, or all")
    return TASKS[name]
