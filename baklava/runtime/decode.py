"""Decode one sequence with the options of generate()."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import BaseStreamer, GenerationMode

from baklava.errors import UserError
from baklava.plan.budget_plan import BudgetPlan
from baklava.runtime.model_loader import LoadedModel
from baklava.runtime.prefill import prefill

Row = Int[Tensor, "rows _"]

SUPPORTED_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)


@torch.inference_mode()
def generate(loaded: LoadedModel, plan: BudgetPlan, prompt: Sequence[int], **options: Any) -> list[int]:
    """Return the tokens that follow a prompt, which is prefilled as its plan says.

    `options` are those of `model.generate`, which turns them into logits processors and stopping criteria. Without an
    `eos_token_id` or a `generation_config` among them, the model's and the tokenizer's end tokens end the text.

    Raises:
        UserError: the options need more than one sequence, as beams do.
        RuntimeError: the cache exceeded its plan, or did not see the tokens.
    """

    def sample_loop(
        model: Any,
        input_ids: Row,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        streamer: BaseStreamer | None = None,
        **unused: Any,
    ) -> Row:
        _check_single_sequence(generation_config)
        cache, logits = prefill(loaded, plan, input_ids)
        while True:
            scores = logits_processor(input_ids, logits.float())
            if generation_config.do_sample:
                token = torch.softmax(scores, -1).multinomial(1)
            else:
                token = scores.argmax(-1, keepdim=True)
            input_ids = torch.cat([input_ids, token], 1)
            if streamer is not None:
                streamer.put(token.cpu())
            if bool(stopping_criteria(input_ids, scores).all()):
                cache.check_integrity(input_ids.shape[1] - 1)
                if streamer is not None:
                    streamer.end()
                return input_ids
            logits = model(token, past_key_values=cache, logits_to_keep=1).logits[:, -1]

    if "generation_config" not in options and loaded.eos_token_ids:
        options.setdefault("eos_token_id", sorted(loaded.eos_token_ids))
    ids = loaded.as_batch(prompt)
    output = loaded.model.generate(ids, attention_mask=torch.ones_like(ids), custom_generate=sample_loop, **options)
    return output[0, len(prompt) :].tolist()


def _check_single_sequence(config: GenerationConfig) -> None:
    mode = config.get_generation_mode()
    if mode not in SUPPORTED_MODES or (config.num_return_sequences or 1) > 1:
        raise UserError(
            f"{mode.value} with {config.num_return_sequences or 1} sequences is not supported, since a plan "
            "budgets one sequence at a time; use greedy decoding or sampling"
        )
