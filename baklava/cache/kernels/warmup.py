"""Compile all kernels for CPUs before they are needed."""

from baklava.cache.kernels import compiled_entries, fused_decode, prompt_attention, reference_attention
from baklava.cache.kernels.numba_runtime import is_available


def prepare_kernels(head_dim: int, query_group: int) -> None:
    """Compile the kernels for heads of this dimension and number of queries, unless numba has them on disk.

    Otherwise the first prompt and the first decode step do it, which takes up to half a minute.
    """
    if not is_available():
        return
    prompt_attention.prepare()
    reference_attention.prepare()
    fused_decode.prepare(head_dim, query_group)
    if head_dim % compiled_entries.CHANNEL_MULTIPLE == 0:
        compiled_entries.prepare()
        compiled_entries.prepare_merge(head_dim)
