"""Write an eviction method and see whether it beats recency: python examples/custom_eviction.py my-notes.txt."""

import argparse
from dataclasses import dataclass
from typing import ClassVar

import torch

import baklava
from baklava.allocation.plan_spec import resolve_plan
from baklava.data.documents import load_documents
from baklava.data.windows import cut_windows
from baklava.evaluation.window_scoring import prefill_window, score_plan
from baklava.eviction import METHODS, Eviction, Observation, QuerySample, build_eviction


@dataclass(frozen=True)
class ValueNorm(Eviction):
    """Keep the entries whose values have the largest norm: they change the output most when they are attended to."""

    name: ClassVar[str] = "value_norm"

    @property
    def query_sample(self) -> QuerySample:
        """Look at no queries: entries are scored when one of them must go."""
        return QuerySample(window=0)

    def score(self, observation: Observation) -> torch.Tensor:
        """Return a score per entry; entries with higher scores stay longer."""
        return observation.value.float().norm(dim=-1)


METHODS[ValueNorm.name] = ValueNorm  # in the package it would be a line in baklava/eviction/__init__.py

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("texts", nargs="+", help="files or folders")
parser.add_argument("--model", default="demo", help="demo, a folder, or the id of a hub model")
parser.add_argument("--context", type=int, default=1024, help="tokens prefilled per window (default: 1024)")
parser.add_argument("--continuation", type=int, default=128, help="tokens scored per window (default: 128)")
arguments = parser.parse_args()

loaded = baklava.load(arguments.model)
lengths = {"context": arguments.context, "continuation": arguments.continuation}
window = cut_windows(load_documents(arguments.texts), loaded.tokenizer, **lengths)[0]
for name in ("uniform", f"uniform+{ValueNorm.name}", "uniform+heavy_hitter"):
    plan = resolve_plan(f"{name}:0.25", loaded, len(window.ids)).plan
    prefilled = prefill_window(loaded, window, (build_eviction(plan.eviction),))
    print(f"{name:24} KL to the full cache {score_plan(loaded, prefilled, plan).kl:.4f} nats per token")
