"""Caches as safetensors files: the tensors of every layer, with the hash of their content and the plan's digest."""

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from baklava.errors import UserError

FORMAT = "baklava-cache-1"


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a file by renaming a complete one, so that readers never see a part of it."""
    content = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    header = {"format": FORMAT, "sha256": _digest(content, metadata), "metadata": json.dumps(dict(metadata))}
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        save_file(content, part, metadata=header)
        part.replace(path)
    except BaseException as error:
        with suppress(OSError):
            part.unlink()
        if isinstance(error, OSError | SafetensorError):
            raise UserError(f"cannot write {path} ({error}); choose a folder with room") from None
        raise


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a file.

    Raises:
        UserError: it cannot be read, is no cache, or is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read the cache {path} ({error}); prefill the prompt again") from None
    if header.get("format") != FORMAT:
        raise UserError(f"{path} is not a cache that this version writes; give a file of BudgetedCache.save")
    metadata: dict[str, str] = json.loads(header["metadata"])
    if _digest(tensors, metadata) != header["sha256"]:
        raise UserError(f"the cache {path} is damaged: its content has another hash; prefill the prompt again")
    return tensors, metadata


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Return the hash of all names, shapes, dtypes and bytes."""
    digest = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()
