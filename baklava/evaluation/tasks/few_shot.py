"""Few-shot classification: a control that hardly depends on old tokens."""

from dataclasses import dataclass
from random import Random
from typing import ClassVar

from typing_extensions import override

from baklava.evaluation.tasks.base import Prompt, Question, Task
from baklava.evaluation.tasks.filler_text import Prose

KINDS = {
    "animal": "dog cat horse cow sheep goat lion wolf fox bear rabbit mouse elephant monkey camel deer pig zebra whale "
    "eagle parrot frog snake tiger",
    "food": "bread rice cheese apple banana soup pasta butter honey cake potato tomato carrot onion grape lemon sugar "
    "pizza salad peach sausage pancake cookie pear",
    "tool": "hammer saw drill wrench axe shovel rake chisel screwdriver pliers ladder scissors knife needle broom "
    "bucket rope nail spade sickle crowbar mallet trowel lever",
    "country": "France Japan Brazil Canada Egypt India Kenya Mexico Norway Peru Spain Sweden Turkey Italy Germany "
    "China Greece Chile Cuba Ireland Poland Portugal Vietnam Nepal",
}


@dataclass(frozen=True)
class FewShot(Task):
    """The kind of a word, after a list of words with their kinds; a plan that fails here has broken the model.

    No word that is asked for is in the list. Chance is one in four.
    """

    name: ClassVar[str] = "few_shot"
    queries: int = 8

    @override
    def compose(self, prose: Prose, size: int, draw: Random) -> Prompt:
        pairs = [(word, kind) for kind, words in KINDS.items() for word in words.split()]
        order = draw.sample(pairs, len(pairs))
        asked, known = order[: self.queries], order[self.queries :]
        shots = [known[number % len(known)] for number in range(size)]
        text = "\n\n".join(f"Word: {word}\nKind: {kind}" for word, kind in shots)
        return Prompt(self.name, text, tuple(_question(word, kind) for word, kind in asked))


def _question(word: str, kind: str) -> Question:
    return Question(f"\n\nWord: {word}\nKind:", f" {kind}", (kind,), chance=1 / len(KINDS), choices=tuple(KINDS))
