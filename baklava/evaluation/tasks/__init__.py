"""Tasks: contexts with questions about them, made from any prose. One task a file; `TASKS` maps names to classes."""

from baklava.errors import UserError
from baklava.evaluation.tasks.aggregation import CommonWords, FrequentWords
from baklava.evaluation.tasks.base import Prompt, Question, Task, prompts
from baklava.evaluation.tasks.copying import Copy
from baklava.evaluation.tasks.few_shot import FewShot
from baklava.evaluation.tasks.filler_text import Prose
from baklava.evaluation.tasks.needle import MultiNeedle, MultiQuery, MultiValue, SingleNeedle
from baklava.evaluation.tasks.retrieval import KeyValueRetrieval, Passkey
from baklava.evaluation.tasks.variable_tracking import VariableTracking

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
