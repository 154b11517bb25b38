"""Few-shot classification: a control that hardly depends on old tokens."""

from dataclasses import dataclass
from random import Random
from typing import ClassVar

from typing_extensions import override

from baklava.evaluation.tasks.base import Prompt, Question, Task
from baklava.evaluation.tasks.filler_text import FillerText

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
    def build(self, filler: FillerText, size: int, rng: Random) -> Prompt:
        pairs = [(word, kind) for kind, words in KINDS.items() for word in words.split()]
        shuffled = rng.sample(pairs, len(pairs))
        queries, shots = shuffled[: self.queries], shuffled[self.queries :]
        repeated_shots = [shots[number % len(shots)] for number in range(size)]
        text = "\n\n".join(f"Word: {word}\nKind: {kind}" for word, kind in repeated_shots)
        chance, choices = 1 / len(KINDS), tuple(KINDS)
        questions = [
            Question(f"\n\nWord: {word}\nKind:", f" {kind}", (kind,), chance=chance, choices=choices)
            for word, kind in queries
        ]
        return Prompt(self.name, text, tuple(questions))
