"""The naive way: a process per trial, which loads the model and feeds every window through the cache.

python -m benchmarks.search.naive MODEL PLAN WINDOWS STEP feeds STEP tokens of a continuation per forward (1 is how it
is served; as many as there are is the least that can be done) and prints {"seconds", "scores": [{"window", "nll",
"kl"}], "reference_seconds"}. The last are those of the full cache, which a KL needs and a perplexity does not.
"""

import json
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache

from baklava.model import LoadedModel, load
from baklava.plan import BudgetPlan
from baklava.prefilling import prefill
from baklava.windows import Window

Ids = Int[Tensor, "1 tokens"]
LogProbs = Float[Tensor, "tokens vocabulary"]


@torch.inference_mode()
def score(loaded: LoadedModel, plan: BudgetPlan, window: Window, step: int) -> dict[str, Any]:
    """NLL of the continuation, in nats per token, and KL to the full cache, which is prefilled once more for that."""
    started, ids = time.perf_counter(), torch.tensor([window.ids], device=loaded.device)
    full = DynamicCache()
    logits = loaded.model(ids[:, : window.context], past_key_values=full, logits_to_keep=1).logits[:, -1]
    reference = _stepped(loaded, ids, window.context, step, full, logits)
    referred = time.perf_counter() - started
    cache, logits = prefill(loaded, plan, ids[:, : window.context])
    with cache.teacher_forcing() if step > 1 else nullcontext():
        found = _stepped(loaded, ids, window.context, step, cache, logits)
    nll = -found.gather(-1, ids[0, window.context :, None]).mean()
    kl = (reference.exp() * (reference - found)).sum(-1).mean()
    return {"window": window.name, "nll": float(nll), "kl": float(kl), "reference_seconds": referred}


def _stepped(loaded: LoadedModel, ids: Ids, context: int, step: int, cache: Any, logits: Tensor) -> LogProbs:
    """Log-probabilities of all tokens behind the context, `step` of them from one forward of the tokens before."""
    rows, last = [logits], ids.shape[1] - 1
    for start in range(context, last, step):
        rows.append(loaded.model(ids[:, start : min(start + step, last)], past_key_values=cache).logits[0])
    return torch.log_softmax(torch.cat(rows).float(), -1)


def main(arguments: Sequence[str]) -> None:
    """Score the windows of a file with the plan of another."""
    model, plan_file, windows_file, step = arguments
    started = time.perf_counter()
    loaded, plan = load(model), BudgetPlan.read(plan_file)
    windows = [Window(**{**each, "ids": tuple(each["ids"])}) for each in json.loads(Path(windows_file).read_text())]
    scores = [score(loaded, plan, window, int(step)) for window in windows]
    referred = sum(each["reference_seconds"] for each in scores)
    print(json.dumps({"seconds": time.perf_counter() - started, "scores": scores, "reference_seconds": referred}))


if __name__ == "__main__":
    main(sys.argv[1:])
