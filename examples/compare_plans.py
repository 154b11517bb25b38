"""Score plans by name on your own text: python examples/compare_plans.py my-notes.txt --plans uniform:0.25 uniform:0.5.

The loss of each plan is that over the full cache, in nats per token: 0.01 is about 1 % of perplexity.
"""

import argparse
from statistics import fmean

import baklava
from baklava.allocation.plan_spec import resolve_plan
from baklava.data.documents import load_documents
from baklava.data.windows import cut_windows
from baklava.evaluation.window_scoring import prefill_window, score_plan
from baklava.eviction import build_eviction
from baklava.profiling.profiler import cached_profile

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("texts", nargs="+", help="files or folders; the first half profiles, the second half is scored")
parser.add_argument("--model", default="demo", help="demo, a folder, or the id of a hub model")
parser.add_argument("--plans", nargs="+", default=["uniform:0.25", "uniform+heavy_hitter:0.25", "baklava:0.25"])
parser.add_argument("--context", type=int, default=1024, help="tokens prefilled per window (default: 1024)")
parser.add_argument("--continuation", type=int, default=128, help="tokens scored per window (default: 128)")
arguments = parser.parse_args()

loaded = baklava.load(arguments.model)
documents = load_documents(arguments.texts)
windows = cut_windows(
    documents, loaded.tokenizer, context=arguments.context, continuation=arguments.continuation, per_document=4
)
calibration, scored = windows[: len(windows) // 2], windows[len(windows) // 2 :]

length = arguments.context + arguments.continuation
plans = {}
for spec in arguments.plans:
    plans[spec] = resolve_plan(spec, loaded, length, lambda: cached_profile(loaded, calibration)).plan
evictions = tuple({build_eviction(plan.eviction) for plan in plans.values()})

scores: dict[str, list[float]] = {spec: [] for spec in plans}
for window in scored:
    prefilled = prefill_window(loaded, window, evictions)  # once for all plans
    for spec, plan in plans.items():
        score = score_plan(loaded, prefilled, plan)
        scores[spec].append(score.nll - score.nll_full)

for spec, plan in plans.items():
    print(f"{spec:32} {plan.ratio:6.1%} of the bytes   loss {fmean(scores[spec]):.4f}   n = {len(scored)}")
