"""The presses by name, and their use on a model without traces left behind.

How kvpress 0.5.5 works, read from its source and held by check.py: a press is a forward hook on every attention
module. It sees the layer's hidden states, keys and values once the layer has attended to the whole context, and
replaces the layer's cache by the entries that it keeps. Head-wise presses (AdaKV, KVzip) replace nothing: they leave
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
WINDOW = 64  # SnapKV's and PyramidKV's default observation window, in tokens
SINKS = 4  # what streaming, expected attention and KVzip always keep

Masked = list[tuple[Any, Any] | None]
"""For each layer the (KV head, token) indices of hidden entries, or None where nothing is hidden."""


@dataclass(frozen=True)
class Press:
    """One of kvpress's methods with its default knobs."""

    build: Callable[[float], Any]  # from the compression ratio
    frees_memory: bool = True  # else it only hides entries
    eager: bool = False  # needs the probabilities, which only eager attention gives
    least_context: int = 1  # tokens that must be in the context
    templates: bool = False  # looks for a chat template, which windows of raw tokens do not have
    rounds_up: bool = False  # rounds down what it evicts, where the others round down what they keep

    def ratio(self, entries: int, context: int) -> float:
        """The compression ratio at which kvpress's own rounding keeps just so many entries."""
        if entries >= context:
            return 0.0
        # a billionth of the context, against binary fractions that fall just short
        return (context - entries) / context + (1e-9 if self.rounds_up else -1e-9)


def _plain(name: str, **knobs: Any) -> Callable[[float], Any]:
    # kvpress is imported on use: it is not in the environment that runs the tests of this repository
    return lambda ratio: getattr(import_module("kvpress"), name)(compression_ratio=ratio, **knobs)


def _ada(name: str, **knobs: Any) -> Callable[[float], Any]:
    return lambda ratio: import_module("kvpress").AdaKVPress(_plain(name, **knobs)(ratio))


PRESSES: dict[str, Press] = {
    FULL: Press(lambda ratio: None),
    "streaming": Press(_plain("StreamingLLMPress"), least_context=SINKS + 1),
    "snapkv": Press(_plain("SnapKVPress"), least_context=WINDOW + 1),
    "tova": Press(_plain("TOVAPress"), least_context=2),
    "expected_attention": Press(_plain("ExpectedAttentionPress"), least_context=SINKS + 2),
    "keydiff": Press(_plain("KeyDiffPress")),
    "key_norm": Press(_plain("KnormPress")),
    "observed_attention": Press(_plain("ObservedAttentionPress"), eager=True),
    "pyramidkv": Press(_plain("PyramidKVPress"), least_context=WINDOW + 1),
    "adakv_snapkv": Press(_ada("SnapKVPress"), frees_memory=False, least_context=WINDOW + 1),
    "adakv_expected_attention": Press(_ada("ExpectedAttentionPress"), frees_memory=False, least_context=SINKS + 2),
    # kvpress's own evaluation has this one too: without epsilon a small probability outweighs every value norm
    "adakv_expected_attention_e2": Press(
        _ada("ExpectedAttentionPress", epsilon=1e-2), frees_memory=False, least_context=SINKS + 2
    ),
    "kvzip": Press(_plain("KVzipPress"), frees_memory=False, least_context=SINKS + 1, templates=True, rounds_up=True),
}


def press_of(name: str, context: int) -> Press:
    """The press of this name.

    Raises:
        UserError: an unknown name, or a context that is too short for it.
    """
    if name not in PRESSES:
        raise UserError(f"no press is named {name!r}; the known ones are {', '.join(PRESSES)}")
    press = PRESSES[name]
    if context < press.least_context:
        raise UserError(
            f"a context of {context} tokens is too short for {name}, which needs {press.least_context}; "
            "cut longer windows or leave it out"
        )
    return press


@contextmanager
def applied(press: Press, model: Any, entries: int, context: int) -> Iterator[Masked]:
    """Within it, a prefill is compressed; the list that it gives is filled on leaving. The model is left as it was."""
    masked: Masked = []
    try:
        with ExitStack() as stack:
            if press.eager:
                stack.enter_context(_attending(model, "eager"))
            built = press.build(press.ratio(entries, context))
            if press.templates:
                stack.enter_context(_raw_text())
            if built is not None:
                stack.enter_context(built(model))
            yield masked
        masked += [_hidden(layer.self_attn) for layer in model.model.layers]
    finally:
        _clean(model)


@contextmanager
def _attending(model: Any, implementation: str) -> Iterator[None]:
    before = model.config._attn_implementation
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def _raw_text() -> Iterator[None]:
    """Take the chat template from KVzip's tokenizer: it would count the template's prefix as part of the context.

    It then leaves the scores of as many tokens of a raw text at nothing, and lets the model repeat a chat's turn.
    """
    kvzip = import_module("kvpress.presses.kvzip_press")
    with patch.object(kvzip, "AutoTokenizer", _Templateless):
        yield


class _Templateless:
    @staticmethod
    def from_pretrained(name: str) -> Any:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=True, trust_remote_code=False)
        tokenizer.chat_template = None
        return tokenizer


def _hidden(module: Any) -> tuple[Any, Any] | None:
    indices = getattr(module, "masked_key_indices", None)
    return None if indices is None else (indices[1], indices[2])


def _clean(model: Any) -> None:
    """Remove what presses leave on the modules, so that no run sees anything of the one before."""
    model.model.__dict__.pop("forward", None)  # KVzip puts the original back as an attribute
    for layer in model.model.layers:
        for name in ("masked_key_indices", "rotary_emb"):
            if hasattr(layer.self_attn, name):
                delattr(layer.self_attn, name)
