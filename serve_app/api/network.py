"""Where the server listens and who may ask it, checked before anything slow starts."""

import hashlib
import ipaddress
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from baklava.errors import UserError


def key_digest(key: str) -> str:
    """What is kept of an API key."""
    return hashlib.sha256(key.encode()).hexdigest()


@dataclass(frozen=True)
class Keys:
    """Digests of the API keys, and of those among them that may change what is served."""

    plain: frozenset[str] = frozenset()
    admin: frozenset[str] = frozenset()

    @classmethod
    def of(cls, plain: Sequence[str], admin: Sequence[str]) -> "Keys":
        """What is kept of keys."""
        return cls(frozenset(map(key_digest, plain)), frozenset(map(key_digest, admin)))

    @property
    def all(self) -> frozenset[str]:
        """Every key that is let in."""
        return self.plain | self.admin

    @property
    def any(self) -> bool:
        """Whether keys are asked for at all."""
        return bool(self.all)


NO_KEYS = Keys()
"""Nobody is asked for a key."""


def api_keys(file: Path | None, kind: str = "api") -> list[str]:
    """Keys of a kind, api or admin, from the file, else from the environment; none leaves the server open."""
    if file is None:
        return _entries(os.environ.get(f"BAKLAVA_{kind.upper()}_KEYS", "").split(","))
    try:
        keys = _entries(file.read_text().splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read --{kind}-keys {file} ({error}); give a text file with one key a line") from None
    if not keys:
        raise UserError(f"--{kind}-keys {file} has no keys; write one a line")
    return keys


def check_address(host: str, port: int, *, guarded: bool) -> None:
    """Raise UserError for an address that cannot be listened on, or that others can reach without a key."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise UserError(f"--host {host} is no address ({error.strerror}); give an address of this machine") from None
    if not guarded and not ipaddress.ip_address(address[0]).is_loopback:
        raise UserError(f"--host {host} lets other machines in without API keys; set BAKLAVA_API_KEYS or --api-keys")
    if os.environ.get("RAY_ADDRESS"):
        return  # the machine that will listen may be another one
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise UserError(f"cannot listen on {host}:{port} ({reason}); choose another --host or --port") from None


def check_answers(address: str) -> None:
    """Raise UserError when nothing answers at a cluster's HOST:PORT, which Ray would wait for for minutes."""
    host, _, port = address.rpartition("/")[2].rpartition(":")
    if not port.isdecimal():
        return  # "auto" and "local" are Ray's own to find
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UserError(f"no Ray cluster answers at {address} ({reason}); check RAY_ADDRESS") from None


def _entries(texts: Sequence[str]) -> list[str]:
    return [text.strip() for text in texts if text.strip()]
