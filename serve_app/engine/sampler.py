"""Chooses the next tokens of many sequences in one batch. What a sequence gets depends on no other."""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from baklava.runtime.logprobs import TokenLogprob, token_logprobs
from serve_app.engine.sampling_params import SamplingParams

TOP_P_CANDIDATES = 128
"""Tokens among which top-p is tried first: sorting a whole vocabulary takes longer."""

Scores = Float[Tensor, "rows vocabulary"]
Probabilities = Float[Tensor, "rows vocabulary"]
Column = Float[Tensor, "rows 1"]

UNDRAWN = -1
"""In place of a token of a row whose probabilities are not numbers."""


class SamplingState:
    """What one sequence brings to a batch: its parameters, its random generator, and the tokens that penalties count.

    The generator is its own, so requests cannot influence each other.

    Args:
        params: the request's sampling parameters.
        prompt: token ids, which the repetition penalty counts.
        end_ids: tokens that end the sequence; they are not sampled before there are `min_tokens`.
        index: of the sequence in its request; added to the seed.
        num_logprobs: alternatives to return with the log-probability of each token; None for no log-probabilities.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt: Sequence[int],
        end_ids: frozenset[int],
        index: int = 0,
        num_logprobs: int | None = None,
    ) -> None:
        self.params, self.num_logprobs = params, num_logprobs
        self.bias: tuple[Tensor, Tensor] | None = None  # tokens, and what is added to their logits
        self.masked_ids: Tensor | None = None  # end tokens, below min_tokens
        self._prompt, self._end_ids = prompt, sorted(end_ids)
        self._num_generated = 0
        self._penalized: _PenalizedTokens | None = None
        self._random = random.Random(None if params.seed is None else (params.seed + index) % 2**64)
        self.uniform = self._random.random()  # at least 0 and below 1; decides the next token if it is drawn

    @property
    def needs_scores(self) -> bool:
        """Whether more is needed of the logits than which one is the largest."""
        return not self.params.is_greedy or self.has_logit_processors or self.num_logprobs is not None

    @property
    def below_min_tokens(self) -> bool:
        """Whether end tokens must not be sampled yet."""
        return self._num_generated < self.params.min_tokens and bool(self._end_ids)

    @property
    def has_logit_processors(self) -> bool:
        """Whether the next token is chosen by other scores than the raw logits."""
        return self.params.has_penalties or bool(self.params.logit_bias) or self.below_min_tokens

    @property
    def penalties(self) -> tuple[Tensor, Tensor] | None:
        """Tokens that a penalty counts, each of them once, and what is subtracted from their logits."""
        return self._penalized.tensors if self._penalized else None

    def build_logit_processors(self, vocabulary: int, device: torch.device) -> None:
        """Build what `bias`, `penalties` and `masked_ids` return, once."""
        params = self.params
        if params.logit_bias and self.bias is None:
            values = torch.tensor(list(params.logit_bias.values()), dtype=torch.float, device=device)
            self.bias = torch.tensor(list(params.logit_bias), device=device), values
        if self.below_min_tokens and self.masked_ids is None:
            self.masked_ids = torch.tensor(self._end_ids, device=device)
        if params.has_penalties and self._penalized is None:
            prompt = self._prompt if params.repetition_penalty != 1 else ()
            self._penalized = _PenalizedTokens(params, prompt, vocabulary, device)

    def append(self, token: int) -> None:
        """Count a token that was generated, and advance the generator if it was drawn."""
        self._num_generated += 1
        if not self.below_min_tokens:
            self.masked_ids = None
        if not self.params.is_greedy:
            self.uniform = self._random.random()
        if self._penalized:
            self._penalized.append(token)


class _PenalizedTokens:
    """The distinct tokens that the penalties of a sequence count, on the device; a new one takes a spare place."""

    def __init__(self, params: SamplingParams, prompt: Sequence[int], vocabulary: int, device: torch.device) -> None:
        self._params = params
        self._places = {token: place for place, token in enumerate(dict.fromkeys(prompt))}
        self._num_generated: Counter[int] = Counter()
        capacity = min(len(self._places) + params.max_tokens, vocabulary)
        self._ids = torch.zeros(capacity, dtype=torch.long, device=device)
        self._ids[: len(self._places)] = torch.tensor(list(self._places), dtype=torch.long, device=device)
        self._subtracted = torch.zeros(capacity, device=device)

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        return self._ids[: len(self._places)], self._subtracted[: len(self._places)]

    def append(self, token: int) -> None:
        if token not in self._places:
            self._places[token] = place = len(self._places)
            self._ids[place] = token
        self._num_generated[token] += 1
        frequency = self._params.frequency_penalty * self._num_generated[token]
        self._subtracted[self._places[token]] = frequency + self._params.presence_penalty


@dataclass(frozen=True)
class SampledToken:
    """A row's next token, with its log-probability by the raw logits if the row's state asks for it."""

    id: int
    logprob: TokenLogprob | None = None


def sample_tokens(logits: Scores, states: Sequence[SamplingState]) -> list[SampledToken | Exception]:
    """Choose the next token of every row, without appending it to the row's state.

    A greedy row takes the most likely token. Any other is drawn after temperature and truncation, with a number of the
    row's own generator. No row depends on the others, and one that cannot be sampled gets an exception.
    """
    if not any(state.needs_scores for state in states):
        return [SampledToken(token) for token in logits.argmax(-1).tolist()]
    try:
        return _sample_batch(logits, states)
    except Exception as error:
        if len(states) == 1:
            return [error]
    return [sample_tokens(logits[row : row + 1], [state])[0] for row, state in enumerate(states)]


def _sample_batch(logits: Scores, states: Sequence[SamplingState]) -> list[SampledToken | Exception]:
    rows = range(len(states))
    scores = logits
    if any(state.has_logit_processors for state in states):
        scores = logits.to(torch.float, copy=True)
        _process_logits(scores, states)
    drawn = [row for row in rows if not states[row].params.is_greedy]
    if not drawn:
        tokens = scores.argmax(-1)
    elif len(drawn) == len(states):
        tokens = _draw(scores, states)
    else:
        greedy = [row for row in rows if states[row].params.is_greedy]
        tokens = torch.empty(len(states), dtype=torch.long, device=logits.device)
        tokens[greedy] = scores[greedy].argmax(-1)
        tokens[drawn] = _draw(scores[drawn], [states[row] for row in drawn])
    ids: list[int] = tokens.tolist()
    sampled: list[SampledToken | Exception] = [
        ValueError("no token can be drawn, since the logits are not numbers") if id == UNDRAWN else SampledToken(id)
        for id in ids
    ]
    if scored := [row for row in rows if states[row].num_logprobs is not None and ids[row] != UNDRAWN]:
        nums = [states[row].num_logprobs or 0 for row in scored]
        logprobs = token_logprobs(_select(logits, scored), [ids[row] for row in scored], max(nums))
        for row, num, logprob in zip(scored, nums, logprobs, strict=True):
            sampled[row] = SampledToken(ids[row], replace(logprob, top=logprob.top[:num]))
    return sampled


def _select(tensor: Tensor, rows: Sequence[int]) -> Tensor:
    """Return these rows, in ascending order, without a copy if they are all."""
    return tensor if len(rows) == len(tensor) else tensor[rows]


def _process_logits(scores: Scores, states: Sequence[SamplingState]) -> None:
    """Apply bias, penalties and min_tokens to the scores, in this order."""
    for state in states:
        state.build_logit_processors(scores.shape[-1], scores.device)
    if bias := {row: state.bias for row, state in enumerate(states) if state.bias}:
        scores[_index({row: ids for row, (ids, _) in bias.items()})] += torch.cat(
            [values for _, values in bias.values()]
        )
    if penalties := {row: state.penalties for row, state in enumerate(states) if state.penalties}:
        rows, ids = _index({row: ids for row, (ids, _) in penalties.items()})
        repetition = torch.tensor([state.params.repetition_penalty for state in states], device=scores.device)[rows]
        penalized = scores[rows, ids]
        penalized = torch.where(penalized > 0, penalized / repetition, penalized * repetition)
        scores[rows, ids] = penalized - torch.cat([subtracted for _, subtracted in penalties.values()])
    if masked := {row: state.masked_ids for row, state in enumerate(states) if state.masked_ids is not None}:
        scores[_index(masked)] = -torch.inf


def _index(ids: Mapping[int, Tensor]) -> tuple[Int[Tensor, " tokens"], Int[Tensor, " tokens"]]:
    """Return the index of these tokens of each row."""
    tokens = torch.cat(list(ids.values()))
    lengths = torch.tensor([len(row_ids) for row_ids in ids.values()])
    return torch.tensor(list(ids)).repeat_interleave(lengths).to(tokens.device), tokens


def _draw(scores: Scores, states: Sequence[SamplingState]) -> Int[Tensor, " rows"]:
    """Draw a token of each row by inverting its cumulative distribution; UNDRAWN if it has none."""
    params = [state.params for state in states]
    uniform = torch.tensor([[state.uniform] for state in states], device=scores.device)
    temperature = torch.tensor([[one.temperature] for one in params], device=scores.device)
    probabilities, ids = _truncate((scores.float() / temperature).softmax(-1), params)
    # In double precision on an accelerator, whose parallel sum may otherwise step up where a probability is 0
    cumulative = probabilities.cumsum(-1, dtype=torch.float if scores.device.type == "cpu" else torch.double)
    total = cumulative[:, -1:]
    point = torch.minimum(uniform * total, total.nextafter(torch.zeros_like(total)))
    places = torch.searchsorted(cumulative, point, right=True)
    tokens = places if ids is None else ids.gather(-1, places)
    return torch.where(total > 0, tokens, UNDRAWN)[:, 0]


def _truncate(
    probabilities: Probabilities, params: Sequence[SamplingParams]
) -> tuple[Probabilities, Int[Tensor, "rows candidates"] | None]:
    """Set to 0 what top-k, top-p and min-p leave out.

    What they keep is decided by a smallest probability, and tokens stay in the order of their ids: in a sort, the order
    of equally likely ones may depend on the other rows.

    Returns:
        probabilities of the whole vocabulary, or of candidates among which are all that are kept, and their ids.
    """
    cut = [row for row, one in enumerate(params) if one.top_k or one.top_p < 1]
    if not cut and not any(one.min_p for one in params):
        return probabilities, None
    min_p = torch.tensor([[one.min_p] for one in params], device=probabilities.device)
    threshold = min_p * probabilities.amax(-1, keepdim=True)
    ids = None
    if cut:
        part, params = _select(probabilities, cut), [params[row] for row in cut]
        num_candidates = max(one.top_k + 1 if one.top_k else TOP_P_CANDIDATES for one in params)
        top = part.topk(min(num_candidates, part.shape[-1]))
        smallest = _smallest_kept(top.values, params, part.shape[-1])
        has_all = (top.values[:, -1:] < smallest)[:, 0].tolist()
        if len(cut) == len(probabilities) and all(has_all):
            ids, order = top.indices.sort(-1)
            probabilities = top.values.gather(-1, order)
        if rest := [row for row, has in enumerate(has_all) if not has and not params[row].top_k]:
            ordered = _sort_descending(part[rest])
            smallest[rest] = _smallest_kept(ordered, [params[row] for row in rest], part.shape[-1])
        threshold[cut] = threshold[cut].maximum(smallest)
    return probabilities * (probabilities >= threshold), ids


def _smallest_kept(
    ordered: Float[Tensor, "rows candidates"], params: Sequence[SamplingParams], vocabulary: int
) -> Column:
    """Return the smallest of each row's largest probabilities that top-k, and top-p of what that leaves, keep."""
    device, candidates = ordered.device, ordered.shape[-1]
    top_k = torch.tensor([[min(one.top_k or vocabulary, vocabulary)] for one in params], device=device)
    top_p = torch.tensor([[one.top_p if one.top_p < 1 else torch.inf] for one in params], device=device)
    cumulative = ordered.cumsum(-1)
    mass = torch.where(top_k < vocabulary, cumulative.gather(-1, top_k.clamp(max=candidates) - 1), 1)
    is_kept = (cumulative - ordered < top_p * mass) & (torch.arange(candidates, device=device) < top_k)
    return ordered.gather(-1, is_kept.sum(-1, keepdim=True).clamp(min=1) - 1)


def _sort_descending(probabilities: Probabilities) -> Probabilities:
    if probabilities.device.type == "cpu":  # NumPy sorts values without their places, in a small part of the time
        return torch.from_numpy(np.sort(probabilities.numpy())).flip(-1)
    return probabilities.sort(descending=True).values
