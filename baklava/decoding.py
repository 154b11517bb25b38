"""Going on from a prompt inside a plan, with every option of transformers' generate that draws one token at a time."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import BaseStreamer, GenerationMode

from baklava.errors import UserError
from baklava.likelihood import check_fed
from baklava.model import LoadedModel
from baklava.plan import BudgetPlan
from baklava.prefilling import prefill

Row = Int[Tensor, "rows _"]

ONE_BY_ONE = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)


@torch.inference_mode()
def decode(loaded: LoadedModel, plan: BudgetPlan, prompt: Sequence[int], **options: Any) -> list[int]:
    """The tokens behind a prompt that enters as its plan says, also chunk by chunk or repeated.

    `options` are those of `model.generate`, which makes the logits processors and stopping criteria of them.

    Raises:
        UserError: beams or another way to generate that needs more than one sequence.
        RuntimeError: the cache held more than its plan, or never saw the tokens.
    """

    def draw(
        model: Any,
        input_ids: Row,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        streamer: BaseStreamer | None = None,
        **unused: Any,
    ) -> Row:
        _check_one_by_one(generation_config)
        cache, logits = prefill(loaded, plan, input_ids)
        while True:
            scores = logits_processor(input_ids, logits.float())
            token = _drawn(scores, sampled=bool(generation_config.do_sample))
            input_ids = torch.cat([input_ids, token], 1)
            if streamer is not None:
                streamer.put(token.cpu())
            if bool(stopping_criteria(input_ids, scores).all()):
                check_fed(cache, input_ids.shape[1] - 1)
                if streamer is not None:
                    streamer.end()
                return input_ids
            logits = model(token, past_key_values=cache, logits_to_keep=1).logits[:, -1]

    ids = torch.tensor([list(prompt)], device=loaded.device)
    made = loaded.model.generate(ids, attention_mask=torch.ones_like(ids), custom_generate=draw, **options)
    return made[0, len(prompt) :].tolist()


def _check_one_by_one(config: GenerationConfig) -> None:
    mode = config.get_generation_mode()
    if mode not in ONE_BY_ONE or (config.num_return_sequences or 1) > 1:
        raise UserError(
            f"{mode.value} with {config.num_return_sequences or 1} sequences was asked for, but a plan bounds one "
            "sequence at a time; leave it to greedy decoding or sampling"
        )


def _drawn(scores: Tensor, sampled: bool) -> Row:
    return torch.softmax(scores, -1).multinomial(1) if sampled else scores.argmax(-1, keepdim=True)
