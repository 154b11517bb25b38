"""The presses by name, and how to apply one to a model and leave no trace.

How kvpress 0.5.5 works, read from its source and checked by verify.py: a press is a forward hook on every attention
module. It sees the layer's hidden states, keys and values once the layer has attended to the whole context, and
replaces the layer's cache with the entries that it keeps. Head-wise presses (AdaKV, KVzip) replace nothing: they leave
`masked_key_indices` on the module, for an attention that hides those entries. Decoding evicts nothing.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any
from unittest.mock import patch

from benchmarks.kvpress.loading import UserError

FULL = "full"
OBSERVATION_WINDOW_TOKENS = 64  # the default of SnapKV and PyramidKV
SINK_TOKENS = 4  # always kept by StreamingLLM, expected attention and KVzip

Masked = list[tuple[Any, Any] | None]
"""For each layer the (KV head, token) indices of its hidden entries, or None if it hides nothing."""


@dataclass(frozen=True)
class Press:
    """One of kvpress's methods with its default parameters."""

    build: Callable[[float], Any]  # from the compression ratio
    frees_memory: bool = True  # otherwise it only hides entries
    needs_eager_attention: bool = False  # for the attention probabilities
    min_context_tokens: int = 1  # the shortest context that it can compress
    uses_chat_template: bool = False  # which windows of raw tokens do not have
    rounds_up: bool = False  # rounds the kept entries up, whereas the others round them down

    def ratio(self, entries: int, context: int) -> float:
        """Return the compression ratio at which kvpress's own rounding keeps exactly `entries`."""
        if entries >= context:
            return 0.0
        # a billionth of the context outweighs the rounding error of the division
        return (context - entries) / context + (1e-9 if self.rounds_up else -1e-9)


def _plain(name: str, **params: Any) -> Callable[[float], Any]:
    # kvpress is imported on use, since the environment of this repository's tests does not have it
    return lambda ratio: getattr(import_module("kvpress"), name)(compression_ratio=ratio, **params)


def _ada(name: str, **params: Any) -> Callable[[float], Any]:
    return lambda ratio: import_module("kvpress").AdaKVPress(_plain(name, **params)(ratio))


PRESSES: dict[str, Press] = {
    FULL: Press(lambda ratio: None),
    "streaming": Press(_plain("StreamingLLMPress"), min_context_tokens=SINK_TOKENS + 1),
    "snapkv": Press(_plain("SnapKVPress"), min_context_tokens=OBSERVATION_WINDOW_TOKENS + 1),
    "tova": Press(_plain("TOVAPress"), min_context_tokens=2),
    "expected_attention": Press(_plain("ExpectedAttentionPress"), min_context_tokens=SINK_TOKENS + 2),
    "keydiff": Press(_plain("KeyDiffPress")),
    "key_norm": Press(_plain("KnormPress")),
    "observed_attention": Press(_plain("ObservedAttentionPress"), needs_eager_attention=True),
    "pyramidkv": Press(_plain("PyramidKVPress"), min_context_tokens=OBSERVATION_WINDOW_TOKENS + 1),
    "adakv_snapkv": Press(_ada("SnapKVPress"), frees_memory=False, min_context_tokens=OBSERVATION_WINDOW_TOKENS + 1),
    "adakv_expected_attention": Press(
        _ada("ExpectedAttentionPress"), frees_memory=False, min_context_tokens=SINK_TOKENS + 2
    ),
    # kvpress's own evaluation has this one too: without epsilon a small probability outweighs every value norm
    "adakv_expected_attention_e2": Press(
        _ada("ExpectedAttentionPress", epsilon=1e-2), frees_memory=False, min_context_tokens=SINK_TOKENS + 2
    ),
    "kvzip": Press(
        _plain("KVzipPress"),
        frees_memory=False,
        min_context_tokens=SINK_TOKENS + 1,
        uses_chat_template=True,
        rounds_up=True,
    ),
}


def find_press(name: str, context: int) -> Press:
    """Return the press of this name.

    Raises:
        UserError: the name is unknown, or the context is too short for the press.
    """
    if name not in PRESSES:
        raise UserError(f"there is no press {name!r}; choose among {', '.join(PRESSES)}")
    press = PRESSES[name]
    if context < press.min_context_tokens:
        raise UserError(
            f"a context of {context} tokens is too short for {name}, which needs {press.min_context_tokens}; "
            "cut longer windows or leave it out"
        )
    return press


@contextmanager
def applied_press(press: Press, model: Any, entries: int, context: int) -> Iterator[Masked]:
    """Compress the prefills of the block; the yielded list is filled at its end, and the model is as before."""
    masked: Masked = []
    try:
        with ExitStack() as stack:
            if press.needs_eager_attention:
                stack.enter_context(_attention_implementation(model, "eager"))
            built = press.build(press.ratio(entries, context))
            if press.uses_chat_template:
                stack.enter_context(_raw_text())
            if built is not None:
                stack.enter_context(built(model))
            yield masked
        masked += [_hidden_entries(layer.self_attn) for layer in model.model.layers]
    finally:
        _clean(model)


@contextmanager
def _attention_implementation(model: Any, implementation: str) -> Iterator[None]:
    before = model.config._attn_implementation
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def _raw_text() -> Iterator[None]:
    """Remove the chat template from KVzip's tokenizer.

    KVzip would take the start of a raw text for the template's prefix and not score it, and would ask the model to
    repeat the text as a turn of a chat.
    """
    kvzip = import_module("kvpress.presses.kvzip_press")
    with patch.object(kvzip, "AutoTokenizer", _TokenizerWithoutTemplate):
        yield


class _TokenizerWithoutTemplate:
    @staticmethod
    def from_pretrained(name: str) -> Any:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=True, trust_remote_code=False)
        tokenizer.chat_template = None
        return tokenizer


def _hidden_entries(module: Any) -> tuple[Any, Any] | None:
    indices = getattr(module, "masked_key_indices", None)
    return None if indices is None else (indices[1], indices[2])


def _clean(model: Any) -> None:
    """Remove what presses leave on the modules, so that no run is affected by the one before."""
    model.model.__dict__.pop("forward", None)  # KVzip puts the original back as an attribute
    for layer in model.model.layers:
        for name in ("masked_key_indices", "rotary_emb"):
            if hasattr(layer.self_attn, name):
                delattr(layer.self_attn, name)
