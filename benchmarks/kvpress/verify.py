"""Verify on a real model that presses are scored correctly.

Example:
  benchmarks/kvpress/.venv/bin/python -m benchmarks.kvpress.verify --model path/to/model

This takes some minutes. If a check fails, it is named and the exit code is 1.
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

from benchmarks.kvpress.cli import OFFLINE_ENVIRONMENT
from benchmarks.kvpress.loading import Window, load, run_cli
from benchmarks.kvpress.presses import FULL, PRESSES
from benchmarks.kvpress.scoring import Prefilled, PressScores, Reference, continue_from, prefill, reference, score_press

ROOT = Path(__file__).parents[2]
CONTEXT, CONTINUATION = 512, 48
HEAD_WISE_PRESSES = [name for name, press in PRESSES.items() if not press.frees_memory]


@dataclass
class Verification:
    """The model, two windows of this repository's prose with their references, and the checks that failed."""

    model: Any
    windows: list[Window]
    references: list[Reference]
    failed: list[str] = field(default_factory=list)

    def check(self, text: str, passed: bool) -> None:
        """Print the result of a check, and record a failure."""
        print(f"{'ok    ' if passed else 'FAILED'}  {text}", flush=True)
        if not passed:
            self.failed.append(text)

    def scores(self, name: str, kept: float) -> list[PressScores]:
        """Score a press on both windows."""
        pairs = zip(self.windows, self.references, strict=True)
        return [score_press(self.model, window, full, PRESSES[name], int(kept * CONTEXT)) for window, full in pairs]

    def prefilled(self, name: str, kept: float = 0.5) -> Prefilled:
        """Prefill the first window's context under a press."""
        return prefill(self.model, self.windows[0], PRESSES[name], int(kept * CONTEXT))


def nothing_evicted_costs_nothing(verification: Verification) -> None:
    """`full`, and every press that may keep all, give the full cache's log-probabilities."""
    for name in PRESSES:
        worst = max(max(abs(each.kl), abs(each.nll - full.nll)) for each, full in _with(verification, name, 1.0))
        verification.check(f"{name} that keeps all: |dNLL|, |KL| <= {worst:.1e}", worst < 1e-4)


def less_costs_more(verification: Verification) -> None:
    """The mean KL rises as fewer entries stay."""
    for name in PRESSES:
        if name != FULL:
            kl = [sum(each.kl for each in verification.scores(name, kept)) / 2 for kept in (0.75, 0.5, 0.25)]
            text = ", ".join(f"{value:.4f}" for value in kl)
            verification.check(f"{name} at 75, 50, 25 %: KL {text}", 0 < kl[0] < kl[1] < kl[2])


def requested_entries_are_kept(verification: Verification) -> None:
    """Presses that free memory store only what they keep; the others store all entries, and hide the rest."""
    config = verification.model.config
    heads, requested = config.num_hidden_layers * config.num_key_value_heads, CONTEXT // 2
    dense = verification.prefilled(FULL)
    for name, press in PRESSES.items():
        if name == FULL:
            continue
        found = verification.prefilled(name)
        off = abs(found.kept - requested * heads) / heads
        lengths = set(found.lengths)
        expected = {CONTEXT} if not press.frees_memory else lengths if name == "pyramidkv" else {requested}
        shown = f"{min(lengths)} to {max(lengths)}" if len(lengths) > 1 else str(min(lengths))
        verification.check(
            f"{name}: {shown} tokens a layer, {found.kept} entries seen", lengths == expected and off < 0.5
        )
        moved = float((found.logits - dense.logits).abs().max())
        verification.check(
            f"{name}: the whole context attends in the prefill (logits moved by {moved:.1e})", moved < 1e-2
        )


def hidden_entries_are_hidden(verification: Verification) -> None:
    """No logit moves when the entries that a head-wise press hides are overwritten with noise."""
    for name in HEAD_WISE_PRESSES:
        clean, noisy, unmasked_prefill = (verification.prefilled(name) for _ in range(3))
        _overwrite(noisy)
        _overwrite(unmasked_prefill)
        unmasked_prefill.masked[:] = [None] * len(unmasked_prefill.masked)
        expected = continue_from(verification.model, verification.windows[0], clean)
        moved, unmasked = (
            float((continue_from(verification.model, verification.windows[0], each) - expected).abs().max())
            for each in (noisy, unmasked_prefill)
        )
        text = f"{name}: noise in hidden entries moves logits by {moved:.1e}, by {unmasked:.1f} without the mask"
        verification.check(text, moved < 1e-4 < 1 < unmasked)


def scores_are_those_of_decoding(verification: Verification) -> None:
    """One forward under our masks gives what kvpress gives token by token, under its own fake keys."""
    for name in PRESSES:
        ours = torch.log_softmax(
            continue_from(verification.model, verification.windows[0], verification.prefilled(name)), -1
        )
        own = torch.log_softmax(_decoded(verification, verification.prefilled(name)), -1)
        kl = float((own.exp() * (own - ours)).sum(-1).mean())
        verification.check(f"{name}: KL between kvpress's own decoding and our forward {kl:.1e}", abs(kl) < 1e-5)


def fake_keys_in_one_forward(verification: Verification) -> None:
    """Print how far off fake keys are if the continuation is one forward; not a check, since queries decide it."""
    window = verification.windows[0]
    for name in HEAD_WISE_PRESSES:
        ours = torch.log_softmax(continue_from(verification.model, window, verification.prefilled(name)), -1)[1:]
        try:
            theirs = _in_one_forward(verification, verification.prefilled(name))
            kl = float((ours.exp() * (ours - torch.log_softmax(theirs, -1))).sum(-1).mean())
            print(f"       {name}: fake keys for {len(theirs)} tokens at once are off by KL {kl:.1e}")
        except ValueError as error:
            print(f"       {name}: fake keys for {len(ours)} tokens at once are not found ({error})")


def the_start_is_scored(verification: Verification) -> None:
    """KVzip keeps some of the tokens that a chat template's prefix would have hidden from its scores."""
    found = verification.prefilled("kvzip")
    hidden = torch.zeros(
        verification.model.config.num_hidden_layers, verification.model.config.num_key_value_heads, CONTEXT
    )
    for layer, indices in enumerate(found.masked):
        if indices:
            hidden[layer][indices] = 1
    share = float(hidden[..., 4:32].mean())
    verification.check(
        f"kvzip hides {share:.0%} of the entries of tokens 4 to 31, of all {float(hidden.mean()):.0%}", share < 0.9
    )


def nothing_is_left_behind(verification: Verification) -> None:
    """After all checks, the model is unchanged."""
    worst = max(max(abs(each.kl), abs(each.nll - full.nll)) for each, full in _with(verification, FULL, 1.0))
    fresh = reference(verification.model, verification.windows[0])
    same = bool(torch.equal(fresh.log_probs, verification.references[0].log_probs))
    modules = [layer.self_attn for layer in verification.model.model.layers]
    # kvpress's attention itself sets masked_key_indices to None in every prefill
    names = ("masked_key_indices", "rotary_emb")
    left = [name for name in names if any(getattr(module, name, None) is not None for module in modules)]
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules)
    verification.check(
        f"afterwards the full cache gives the same numbers (|dNLL|, |KL| <= {worst:.1e})", same and worst < 1e-4
    )
    verification.check(f"no attribute ({left}) and no hook ({hooks}) is left on the modules", not left and not hooks)


CHECKS: tuple[Callable[[Verification], None], ...] = (
    nothing_evicted_costs_nothing,
    less_costs_more,
    requested_entries_are_kept,
    hidden_entries_are_hidden,
    scores_are_those_of_decoding,
    fake_keys_in_one_forward,
    the_start_is_scored,
    nothing_is_left_behind,
)


def _with(verification: Verification, name: str, kept: float) -> Iterator[tuple[PressScores, Reference]]:
    yield from zip(verification.scores(name, kept), verification.references, strict=True)


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


def _decoded(verification: Verification, prefilled: Prefilled) -> Tensor:
    """Logits for every continuation token, one forward each, with nothing of ours in between."""
    logits = [prefilled.logits]
    with _fake_keys(verification.model, prefilled):
        for position, token in enumerate(verification.windows[0].ids[CONTEXT:-1], CONTEXT):
            ids, positions = torch.tensor([[token]]), torch.tensor([[position]])
            logits.append(verification.model(ids, past_key_values=prefilled.cache, position_ids=positions).logits[0])
    return torch.cat(logits)


def _in_one_forward(verification: Verification, prefilled: Prefilled) -> Tensor:
    ids = torch.tensor([verification.windows[0].ids[CONTEXT:-1]])
    positions = torch.arange(CONTEXT, CONTEXT + ids.shape[1])[None]
    with _fake_keys(verification.model, prefilled):
        return verification.model(ids, past_key_values=prefilled.cache, position_ids=positions).logits[0]


def _windows(directory: Path) -> list[Window]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    texts = {path.name: path.read_text() for path in (ROOT / "README.md", ROOT / "docs" / "lab-notes.md")}
    cut = {name: tokenizer(text, add_special_tokens=False)["input_ids"] for name, text in texts.items()}
    return [Window(name, name, tuple(ids[: CONTEXT + CONTINUATION]), CONTEXT) for name, ids in cut.items()]


def main() -> None:
    """Run all checks."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kvpress.verify", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", type=Path, required=True, help="folder of a model in safetensors")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads (default: 2)")
    args = parser.parse_args()
    os.environ |= OFFLINE_ENVIRONMENT
    logging.getLogger("kvpress").setLevel(logging.ERROR)
    torch.set_num_threads(args.threads)
    started = time.monotonic()
    model, windows = load(args.model), _windows(args.model)
    verification = Verification(model, windows, [reference(model, window) for window in windows])
    with torch.inference_mode():
        for check in CHECKS:
            print(f"\n{check.__name__.replace('_', ' ')}", flush=True)
            check(verification)
    print(f"\n{len(verification.failed)} checks failed; {time.monotonic() - started:.0f} s")
    sys.exit(bool(verification.failed))


if __name__ == "__main__":
    sys.exit(run_cli(main))
