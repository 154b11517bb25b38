"""What a search ran in: the packages of this Python, and the machine."""

import platform
from importlib.metadata import distributions

import torch


def packages() -> str:
    """Every installed package with its version, as `pip freeze` writes them, but for the checkout itself."""
    found = {dist.name: dist.version for dist in distributions() if dist.name not in (None, "baklava")}
    return "".join(f"{name}=={found[name]}\n" for name in sorted(found, key=str.lower))


def machine() -> dict[str, str]:
    """Python, system and accelerators of the machine that drives the search, as tags."""
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    named = {"python": platform.python_version(), "system": platform.platform(), "host": platform.node()}
    return {**named, "gpus": ", ".join(gpus) or "none"}
