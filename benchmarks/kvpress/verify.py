"""Check on a real model that the scores of kvpress's presses mean what they say.

Example:
  benchmarks/kvpress/.venv/bin/python -m benchmarks.kvpress.verify --model path/to/model

Takes some minutes. Ends with code 1, and tells which, where a fact does not hold.
"""

import argparse
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.kvpress.cli import QUIET
from benchmarks.kvpress.loading import Window, exit_code, load
from benchmarks.kvpress.presses import FULL, PRESSES
from benchmarks.kvpress.scoring import Measured, Prefilled, Reference, continue_from, measure, prefill, reference

ROOT = Path(__file__).parents[2]
CONTEXT, CONTINUATION = 512, 48
HEAD_WISE = [name for name, press in PRESSES.items() if not press.frees_memory]


@dataclass
class Bench:
    """The model, two windows of this repository's prose with their references, and the facts that did not hold."""

    model: Any
    windows: list[Window]
    references: list[Reference]
    wrong: list[str] = field(default_factory=list)

    def fact(self, text: str, holds: bool) -> None:
        """Print a fact, and remember it where it does not hold."""
        print(f"{'ok   ' if holds else 'WRONG'}  {text}", flush=True)
        if not holds:
            self.wrong.append(text)

    def measured(self, name: str, kept: float) -> list[Measured]:
        """Scores of both windows."""
        pairs = zip(self.windows, self.references, strict=True)
        return [measure(self.model, window, full, PRESSES[name], int(kept * CONTEXT)) for window, full in pairs]

    def prefilled(self, name: str, kept: float = 0.5) -> Prefilled:
        """The first window's context under a press."""
        return prefill(self.model, self.windows[0], PRESSES[name], int(kept * CONTEXT))


def nothing_evicted_costs_nothing(bench: Bench) -> None:
    """`full`, and every press that may keep all, give the full cache's log-probabilities."""
    for name in PRESSES:
        worst = max(max(abs(each.kl), abs(each.nll - full.nll)) for each, full in _with(bench, name, 1.0))
        bench.fact(f"{name} that keeps all: |dNLL|, |KL| <= {worst:.1e}", worst < 1e-4)


def less_costs_more(bench: Bench) -> None:
    """The mean KL rises as fewer entries stay."""
    for name in PRESSES:
        if name != FULL:
            kl = [sum(each.kl for each in bench.measured(name, kept)) / 2 for kept in (0.75, 0.5, 0.25)]
            text = ", ".join(f"{value:.4f}" for value in kl)
            bench.fact(f"{name} at 75, 50, 25 %: KL {text}", 0 < kl[0] < kl[1] < kl[2])


def entries_are_as_asked(bench: Bench) -> None:
    """Presses that free memory hold what they keep; the others hold all, and hide the rest. The first token is safe."""
    config = bench.model.config
    heads, asked = config.num_hidden_layers * config.num_key_value_heads, CONTEXT // 2
    dense = bench.prefilled(FULL)
    for name, press in PRESSES.items():
        if name == FULL:
            continue
        found = bench.prefilled(name)
        off = abs(found.kept - asked * heads) / heads
        lengths = set(found.lengths)
        expected = {CONTEXT} if not press.frees_memory else lengths if name == "pyramidkv" else {asked}
        shown = f"{min(lengths)} to {max(lengths)}" if len(lengths) > 1 else str(min(lengths))
        bench.fact(f"{name}: {shown} tokens a layer, {found.kept} entries seen", lengths == expected and off < 0.5)
        moved = float((found.logits - dense.logits).abs().max())
        bench.fact(f"{name}: the whole context attends in the prefill (logits moved by {moved:.1e})", moved < 1e-2)


def hidden_entries_are_hidden(bench: Bench) -> None:
    """No logit moves when the entries that a head-wise press hides are overwritten with noise."""
    for name in HEAD_WISE:
        clean, noisy, open_ = (bench.prefilled(name) for _ in range(3))
        _overwrite(noisy)
        _overwrite(open_)
        open_.masked[:] = [None] * len(open_.masked)
        expected = continue_from(bench.model, bench.windows[0], clean)
        moved, unmasked = (
            float((continue_from(bench.model, bench.windows[0], each) - expected).abs().max())
            for each in (noisy, open_)
        )
        text = f"{name}: noise in hidden entries moves logits by {moved:.1e}, by {unmasked:.1f} without the mask"
        bench.fact(text, moved < 1e-4 < 1 < unmasked)


def scores_are_those_of_decoding(bench: Bench) -> None:
    """One forward under our masks gives what kvpress gives token by token, under its own fake keys."""
    for name in PRESSES:
        ours = torch.log_softmax(continue_from(bench.model, bench.windows[0], bench.prefilled(name)), -1)
        own = torch.log_softmax(_decoded(bench, bench.prefilled(name)), -1)
        kl = float((own.exp() * (own - ours)).sum(-1).mean())
        bench.fact(f"{name}: KL between kvpress's own decoding and our forward {kl:.1e}", abs(kl) < 1e-5)


def fake_keys_in_one_forward(bench: Bench) -> None:
    """Not a fact to hold, since it depends on the queries: kvpress's fake keys when the continuation is one forward."""
    window = bench.windows[0]
    for name in HEAD_WISE:
        ours = torch.log_softmax(continue_from(bench.model, window, bench.prefilled(name)), -1)[1:]
        try:
            theirs = _in_one_forward(bench, bench.prefilled(name))
            kl = float((ours.exp() * (ours - torch.log_softmax(theirs, -1))).sum(-1).mean())
            print(f"       {name}: fake keys for {len(theirs)} tokens at once are off by KL {kl:.1e}")
        except ValueError as error:
            print(f"       {name}: fake keys for {len(ours)} tokens at once are not found ({error})")


def the_start_is_scored(bench: Bench) -> None:
    """KVzip keeps some of the tokens that a chat template's prefix would have hidden from its scores."""
    found = bench.prefilled("kvzip")
    hidden = torch.zeros(bench.model.config.num_hidden_layers, bench.model.config.num_key_value_heads, CONTEXT)
    for layer, indices in enumerate(found.masked):
        if indices:
            hidden[layer][indices] = 1
    share = float(hidden[..., 4:32].mean())
    bench.fact(
        f"kvzip hides {share:.0%} of the entries of tokens 4 to 31, of all {float(hidden.mean()):.0%}", share < 0.9
    )


def nothing_is_left_behind(bench: Bench) -> None:
    """After all of it, the model is as it was."""
    worst = max(max(abs(each.kl), abs(each.nll - full.nll)) for each, full in _with(bench, FULL, 1.0))
    fresh = reference(bench.model, bench.windows[0])
    same = bool(torch.equal(fresh.log_probs, bench.references[0].log_probs))
    modules = [layer.self_attn for layer in bench.model.model.layers]
    # kvpress's attention itself sets masked_key_indices to None in every prefill
    names = ("masked_key_indices", "rotary_emb")
    left = [name for name in names if any(getattr(module, name, None) is not None for module in modules)]
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules)
    bench.fact(f"afterwards the full cache gives the same numbers (|dNLL|, |KL| <= {worst:.1e})", same and worst < 1e-4)
    bench.fact(f"no attribute ({left}) and no hook ({hooks}) is left on the modules", not left and not hooks)


FACTS: tuple[Callable[[Bench], None], ...] = (
    nothing_evicted_costs_nothing,
    less_costs_more,
    entries_are_as_asked,
    hidden_entries_are_hidden,
    scores_are_those_of_decoding,
    fake_keys_in_one_forward,
    the_start_is_scored,
    nothing_is_left_behind,
)


def _with(bench: Bench, name: str, kept: float) -> Iterator[tuple[Measured, Reference]]:
    yield from zip(bench.measured(name, kept), bench.references, strict=True)


def _overwrite(prefilled: Prefilled) -> None:
    draw = torch.Generator().manual_seed(0)
    for layer, hidden in zip(prefilled.cache.layers, prefilled.masked, strict=True):
        if hidden:
            heads, tokens = hidden
            for tensor in (layer.keys, layer.values):
                tensor[0, heads, tokens] = torch.randn(len(heads), tensor.shape[-1], generator=draw)


@contextmanager
def _fake_keys(model: Any, prefilled: Prefilled) -> Iterator[None]:
    """Hide entries as kvpress does, by the indices that its attention patch reads."""
    modules = [layer.self_attn for layer in model.model.layers]
    for module, hidden in zip(modules, prefilled.masked, strict=True):
        module.masked_key_indices = hidden and (torch.zeros_like(hidden[0]), *hidden)
    try:
        yield
    finally:
        for module in modules:
            del module.masked_key_indices


def _decoded(bench: Bench, prefilled: Prefilled) -> Tensor:
    """Logits for every continuation token, one forward each, with nothing of ours in between."""
    logits = [prefilled.logits]
    with _fake_keys(bench.model, prefilled):
        for position, token in enumerate(bench.windows[0].ids[CONTEXT:-1], CONTEXT):
            ids, positions = torch.tensor([[token]]), torch.tensor([[position]])
            logits.append(bench.model(ids, past_key_values=prefilled.cache, position_ids=positions).logits[0])
    return torch.cat(logits)


def _in_one_forward(bench: Bench, prefilled: Prefilled) -> Tensor:
    ids = torch.tensor([bench.windows[0].ids[CONTEXT:-1]])
    positions = torch.arange(CONTEXT, CONTEXT + ids.shape[1])[None]
    with _fake_keys(bench.model, prefilled):
        return bench.model(ids, past_key_values=prefilled.cache, position_ids=positions).logits[0]


def _windows(directory: Path) -> list[Window]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    texts = {path.name: path.read_text() for path in (ROOT / "README.md", ROOT / "docs" / "lab-notes.md")}
    cut = {name: tokenizer(text, add_special_tokens=False)["input_ids"] for name, text in texts.items()}
    return [Window(name, name, tuple(ids[: CONTEXT + CONTINUATION]), CONTEXT) for name, ids in cut.items()]


def main() -> None:
    """Go through all facts."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kvpress.verify", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", type=Path, required=True, help="folder of a model in safetensors")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads (default: 2)")
    chosen = parser.parse_args()
    os.environ |= QUIET
    logging.getLogger("kvpress").setLevel(logging.ERROR)
    torch.set_num_threads(chosen.threads)
    started = time.monotonic()
    model, windows = load(chosen.model), _windows(chosen.model)
    bench = Bench(model, windows, [reference(model, window) for window in windows])
    with torch.inference_mode():
        for fact in FACTS:
            print(f"\n{fact.__name__.replace('_', ' ')}", flush=True)
            fact(bench)
    print(f"\n{len(bench.wrong)} facts do not hold; {time.monotonic() - started:.0f} s")
    sys.exit(bool(bench.wrong))


if __name__ == "__main__":
    sys.exit(exit_code(main))
