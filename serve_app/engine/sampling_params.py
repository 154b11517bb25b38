"""Sampling parameters of a request, named as in vLLM."""

from dataclasses import dataclass, field

GREEDY_BELOW_TEMPERATURE = 1e-5  # a smaller one divides logits into infinities, and means greedy anyway


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of a request are sampled, and when a sequence stops. Stop strings are not part of it.

    `top_k` 0 keeps all tokens. Tokens that are exactly as likely as the last one that top-k or top-p keeps are kept
    too. `stop_token_ids` end a sequence in addition to the model's own end tokens; neither is sampled before there are
    `min_tokens`. Presence and frequency penalties (0: off) count generated tokens, the repetition penalty (1: off)
    counts prompt tokens too. `logit_bias` is added to the logits of its tokens.
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
