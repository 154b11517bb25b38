"""Tasks: contexts with questions about them, built from any text. `TASKS` maps names to classes."""

from baklava.errors import UserError
from baklava.evaluation.tasks.base import FillerText, Prompt, Question, Task, build_prompts
from baklava.evaluation.tasks.retrieval import (
    Copy,
    KeyValueRetrieval,
    MultiNeedle,
    MultiQuery,
    MultiValue,
    Passkey,
    SingleNeedle,
    VariableTracking,
)
from baklava.evaluation.tasks.word_lists import CommonWords, FewShot, FrequentWords

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

__all__ = ["TASKS", "FillerText", "Prompt", "Question", "Task", "build_prompts", "task_class"]


def task_class(name: str) -> type[Task]:
    """Return the class of a task; raises UserError with the known names for an unknown one."""
    if name not in TASKS:
        raise UserError(f"unknown task {name!r}; choose from {', '.join(TASKS)}, or all")
    return TASKS[name]
