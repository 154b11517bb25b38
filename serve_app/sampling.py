"""How the next token is chosen: the wishes of one request, and the draw."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import LogitsProcessorList, MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

GREEDY_BELOW = 1e-5  # a temperature under this divides logits into infinities, and means greedy anyway


@dataclass(frozen=True)
class Sampling:
    """What one request asks of the sampler and when it wants to stop.

    `top_k` 0 keeps all tokens. `stop_ids` end the text beside the model's own end tokens; `min_tokens` holds both
    back. Stop strings are not here: they are about text.
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


class Sampler:
    """Draws the tokens of one sequence with a random generator of its own, so requests cannot disturb each other."""

    def __init__(self, sampling: Sampling, device: torch.device) -> None:
        self._temperature = sampling.temperature
        self._warpers = _warpers(sampling)
        self._generator = torch.Generator(device)
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)

    def draw(self, logits: Float[Tensor, "one vocabulary"]) -> int:
        """The next token: the most likely one at temperature 0, else a draw after temperature and truncation."""
        if self._temperature < GREEDY_BELOW:
            return int(logits.argmax())
        scores = self._warpers(None, logits.float() / self._temperature)
        return int(torch.multinomial(scores.softmax(-1), 1, generator=self._generator))


def _warpers(sampling: Sampling) -> LogitsProcessorList:
    warpers = LogitsProcessorList()
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    return warpers
