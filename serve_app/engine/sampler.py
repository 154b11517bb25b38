"""How the next token is chosen: sampling parameters as in vLLM, and a sampler per sequence."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

GREEDY_BELOW_TEMPERATURE = 1e-5  # a smaller one divides logits into infinities, and means greedy anyway

TOP_P_CANDIDATES = 512
"""Tokens among which top-p is tried first: sorting a whole vocabulary takes milliseconds."""

Scores = Float[Tensor, " vocabulary"]


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of a request are sampled, and when a sequence stops. Stop strings are not part of it.

    `top_k` 0 keeps all tokens. `stop_token_ids` end a sequence in addition to the model's own end tokens; neither is
    sampled before there are `min_tokens`. Presence and frequency penalties (0: off) count generated tokens, the
    repetition penalty (1: off) counts prompt tokens too. `logit_bias` is added to the logits of its tokens.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop_token_ids: frozenset[int] = frozenset()
    min_tokens: int = 0
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = field(default_factory=dict)

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return self.temperature < GREEDY_BELOW_TEMPERATURE

    @property
    def has_penalties(self) -> bool:
        """Whether the scores depend on earlier tokens."""
        return (self.presence_penalty, self.frequency_penalty, self.repetition_penalty) != (0, 0, 1)


class Sampler:
    """Samples the tokens of one sequence with its own random generator, so requests cannot influence each other.

    Args:
        params: the request's sampling parameters.
        prompt: token ids, which the repetition penalty counts.
        end_ids: tokens that end the sequence; they are not sampled before there are `min_tokens`.
        device: of the logits.
        index: of the sequence in its request; added to the seed.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt: Sequence[int],
        end_ids: frozenset[int],
        device: torch.device,
        index: int = 0,
    ) -> None:
        self._params, self._prompt = params, prompt
        self._end_ids = sorted(end_ids)
        self._num_generated = 0
        self._counts: Tensor | None = None  # [vocabulary], how often each token was generated
        self._seen: Tensor | None = None  # [vocabulary], whether a token is in the prompt or was generated
        self._generator = torch.Generator(device)
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed((params.seed + index) % 2**64)

    @property
    def is_greedy(self) -> bool:
        """Whether the next token is the most likely one by its raw logits."""
        return self._params.is_greedy and not self._has_logit_processors

    def sample(self, logits: Scores) -> int:
        """Return the next token: the most likely one if greedy, otherwise a draw after temperature and truncation."""
        scores = self._process_logits(logits) if self._has_logit_processors else logits
        token = int(scores.argmax()) if self._params.is_greedy else self._draw(scores.float())
        self.append(token)
        return token

    def append(self, token: int) -> None:
        """Count a token that was generated."""
        self._num_generated += 1
        if self._counts is not None and self._seen is not None:
            self._counts[token] += 1
            self._seen[token] = True

    @property
    def _below_min_tokens(self) -> bool:
        return self._num_generated < self._params.min_tokens and bool(self._end_ids)

    @property
    def _has_logit_processors(self) -> bool:
        return self._params.has_penalties or bool(self._params.logit_bias) or self._below_min_tokens

    def _process_logits(self, logits: Scores) -> Scores:
        params, scores = self._params, logits.float().clone()
        if params.logit_bias:
            scores[list(params.logit_bias)] += torch.tensor(list(params.logit_bias.values()), device=scores.device)
        if params.has_penalties:
            self._penalise(scores)
        if self._below_min_tokens:
            scores[self._end_ids] = -torch.inf
        return scores

    def _penalise(self, scores: Scores) -> None:
        if self._counts is None or self._seen is None:  # at the first token, so that nothing is generated yet
            self._counts = torch.zeros_like(scores)
            self._seen = torch.zeros_like(scores, dtype=torch.bool)
            self._seen[torch.tensor(list(self._prompt), dtype=torch.long, device=scores.device)] = True
        params = self._params
        if params.repetition_penalty != 1:
            repeated = torch.where(scores > 0, scores / params.repetition_penalty, scores * params.repetition_penalty)
            scores.copy_(torch.where(self._seen, repeated, scores))
        if params.frequency_penalty or params.presence_penalty:
            scores -= params.frequency_penalty * self._counts + params.presence_penalty * (self._counts > 0)

    def _draw(self, scores: Scores) -> int:
        params = self._params
        scores = scores / params.temperature
        if not params.top_k and params.top_p >= 1 and not params.min_p:
            return self._multinomial(scores.softmax(-1))
        ids, probabilities = _candidates(scores, params)
        keep = probabilities >= params.min_p * probabilities[0]
        if params.top_p < 1:
            keep &= probabilities.cumsum(0) - probabilities < params.top_p
        keep[0] = True
        return int(ids[self._multinomial(probabilities * keep)])

    def _multinomial(self, weights: Tensor) -> int:
        return int(torch.multinomial(weights, 1, generator=self._generator))


def _candidates(scores: Scores, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """Return tokens and their probabilities in descending order: at least all that top-k, top-p and min-p leave."""
    vocabulary = len(scores)
    if params.top_k:
        top = scores.topk(min(params.top_k, vocabulary))
        return top.indices, top.values.softmax(-1)
    probabilities = scores.softmax(-1)
    top = probabilities.topk(min(TOP_P_CANDIDATES, vocabulary))
    covers_top_p = params.top_p < 1 and float(top.values.sum()) >= params.top_p
    if covers_top_p or float(top.values[-1]) < params.min_p * float(top.values[0]):
        return top.indices, top.values
    ordered = probabilities.sort(descending=True)
    return ordered.indices, ordered.values
