"""A forward that pauses between layers, so that running sequences decode while a long chunk of a prompt is under way.

A chunk in smaller pieces would be slower, would leave other entries, or would need its full cache until its end. Paused
in a layer, it needs the activations of that layer: each layer of its cache is compressed before the next one begins.
(Layered prefill, arXiv 2510.08055.)
"""

from greenlet import getcurrent, greenlet

from baklava.runtime.batched_forward import forward_one_row
from baklava.runtime.model_loader import LoadedModel
from baklava.runtime.prefill import Logits, TokenChunk


class LayerwiseForward:
    """The forward of one chunk, some layers at a time. Those that do not attend run with the one before them.

    It runs on the thread that made it, on a stack of its own. If it is dropped before its end, that stack is unwound.
    """

    def __init__(self, loaded: LoadedModel, chunk: TokenChunk) -> None:
        self._num_tokens, self._num_layers = len(chunk.ids), loaded.geometry.num_attending_layers
        self._allowance = self._layers_done = 0
        # No reference to self: a stack that refers to its owner would never be freed.
        self._stack = greenlet(_forward)
        self._first: tuple[LoadedModel, TokenChunk] | tuple[()] = (loaded, chunk)  # what the stack begins with

    def run(self, tokens: int) -> Logits | None:
        """Run as many layers as take about as long as all layers for `tokens` tokens; return the logits at the end.

        What is left of the tokens counts next time.
        """
        self._allowance += tokens
        layers = min(self._allowance * self._num_layers // self._num_tokens, self._num_layers - self._layers_done)
        self._allowance -= layers * self._num_tokens // self._num_layers
        if not layers:
            return None
        self._layers_done += layers
        first, self._first = self._first, ()
        logits: Logits | None = self._stack.switch(*first, layers)
        return logits

    @property
    def num_processed(self) -> int:
        """The tokens that all layers would have processed in the same time."""
        return self._num_tokens * self._layers_done // self._num_layers


def _forward(loaded: LoadedModel, chunk: TokenChunk, layers: int) -> Logits:
    """Return the logits after the chunk. Each pause ends with the number of layers until the next one."""
    layers_left = loaded.geometry.num_attending_layers

    def after_layer() -> None:
        nonlocal layers, layers_left
        layers, layers_left = layers - 1, layers_left - 1
        if not layers and layers_left:
            layers = getcurrent().parent.switch(None)

    logits, _ = forward_one_row(loaded, [chunk], after_layer)
    return logits
