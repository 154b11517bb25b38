"""How the next token is chosen: the wishes of one request, and the draw."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

GREEDY_BELOW = 1e-5  # a temperature under this divides logits into infinities, and means greedy anyway

MOST_LIKELY = 512
"""Tokens among which a nucleus is looked for first: sorting a whole vocabulary takes milliseconds."""

Scores = Float[Tensor, " vocabulary"]


@dataclass(frozen=True)
class Sampling:
    """What one request asks of the sampler and when it wants to stop.

    `top_k` 0 keeps all tokens. `stop_ids` end the text beside the model's own end tokens; `min_tokens` holds both
    back. Presence and frequency penalties (of 0: none) look at what was generated, the repetition penalty (of 1: none)
    at the prompt as well. `logit_bias` is added to the logits of its tokens. Stop strings are not here: they are about
    text.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop_ids: frozenset[int] = frozenset()
    min_tokens: int = 0
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = field(default_factory=dict)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.temperature < GREEDY_BELOW

    @property
    def penalised(self) -> bool:
        """Whether tokens are judged by what came before."""
        return (self.presence_penalty, self.frequency_penalty, self.repetition_penalty) != (0, 0, 1)


class Sampler:
    """Draws the tokens of one sequence with a random generator of its own, so requests cannot disturb each other.

    The continuation `index` of a request draws with the seed plus its index. `ends` end the text, but are never drawn
    before there are `min_tokens`.
    """

    def __init__(
        self, sampling: Sampling, prompt: Sequence[int], ends: frozenset[int], device: torch.device, index: int = 0
    ) -> None:
        self._sampling, self._prompt, self._ends = sampling, set(prompt), sorted(ends)
        self._made: Counter[int] = Counter()
        self._generator = torch.Generator(device)
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed((sampling.seed + index) % 2**64)

    @property
    def plain(self) -> bool:
        """Whether the next token is the likeliest one as the logits are."""
        return self._sampling.greedy and not self._wishful

    def draw(self, logits: Scores) -> int:
        """The next token: the most likely one at temperature 0, else a draw after temperature and truncation."""
        scores = self._wished(logits)
        token = int(scores.argmax()) if self._sampling.greedy else self._drawn(scores.float())
        self.took(token)
        return token

    def took(self, token: int) -> None:
        """Note a token that was chosen."""
        self._made[token] += 1

    @property
    def _held_back(self) -> bool:
        """Whether it is too early for an end."""
        return bool(self._ends) and self._made.total() < self._sampling.min_tokens

    @property
    def _wishful(self) -> bool:
        """Whether tokens are chosen by more than their logits."""
        return self._sampling.penalised or bool(self._sampling.logit_bias) or self._held_back

    def _wished(self, logits: Scores) -> Scores:
        if not self._wishful:
            return logits
        wishes, scores = self._sampling, logits.float().clone()
        if wishes.logit_bias:
            scores[list(wishes.logit_bias)] += torch.tensor(list(wishes.logit_bias.values()), device=scores.device)
        if wishes.penalised:
            self._penalise(scores)
        if self._held_back:
            scores[self._ends] = -torch.inf
        return scores

    def _penalise(self, scores: Scores) -> None:
        wishes, device = self._sampling, scores.device
        if wishes.repetition_penalty != 1:
            seen = torch.tensor(sorted(self._prompt | self._made.keys()), device=device)
            own = scores[seen]
            scores[seen] = torch.where(own > 0, own / wishes.repetition_penalty, own * wishes.repetition_penalty)
        if self._made:
            made = torch.tensor(list(self._made), device=device)
            counts = torch.tensor(list(self._made.values()), dtype=torch.float32, device=device)
            scores[made] -= wishes.frequency_penalty * counts + wishes.presence_penalty

    def _drawn(self, scores: Scores) -> int:
        wishes = self._sampling
        scores = scores / wishes.temperature
        if not wishes.top_k and wishes.top_p >= 1 and not wishes.min_p:
            return self._one_of(scores.softmax(-1))
        ids, shares = _candidates(scores, wishes)
        keep = shares >= wishes.min_p * shares[0]
        if wishes.top_p < 1:
            keep &= shares.cumsum(0) - shares < wishes.top_p
        keep[0] = True
        return int(ids[self._one_of(shares * keep)])

    def _one_of(self, weights: Tensor) -> int:
        return int(torch.multinomial(weights, 1, generator=self._generator))


def _candidates(scores: Scores, wishes: Sampling) -> tuple[Tensor, Tensor]:
    """Tokens that may be drawn and their probabilities, the likeliest first; of a nucleus, at least all of it."""
    vocabulary = len(scores)
    if wishes.top_k:
        best = scores.topk(min(wishes.top_k, vocabulary))
        return best.indices, best.values.softmax(-1)
    shares = scores.softmax(-1)
    best = shares.topk(min(MOST_LIKELY, vocabulary))
    within = float(best.values.sum()) >= wishes.top_p if wishes.top_p < 1 else False
    if within or float(best.values[-1]) < wishes.min_p * float(best.values[0]):
        return best.indices, best.values
    ordered = shares.sort(descending=True)
    return ordered.indices, ordered.values
