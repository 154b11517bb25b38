"""The server's address and API keys, checked before anything slow starts."""

import hashlib
import ipaddress
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from baklava.errors import UserError
from baklava.runtime.ray_session import starts_cluster

PROXY_MIDDLEWARE_VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
PROXY_MIDDLEWARE_PATH = "serve_app.api.proxy_middleware:middlewares"


def key_digest(key: str) -> str:
    """Return the digest of an API key. Only digests are stored."""
    return hashlib.sha256(key.encode()).hexdigest()


@dataclass(frozen=True)
class ApiKeys:
    """Digests of the API keys, and of the admin keys, which may also change the plan."""

    user: frozenset[str] = frozenset()
    admin: frozenset[str] = frozenset()

    @classmethod
    def from_keys(cls, user: Sequence[str], admin: Sequence[str]) -> "ApiKeys":
        """Return the digests of these keys."""
        return cls(frozenset(map(key_digest, user)), frozenset(map(key_digest, admin)))

    @property
    def all(self) -> frozenset[str]:
        """Digests of all keys."""
        return self.user | self.admin

    @property
    def required(self) -> bool:
        """Whether requests need a key."""
        return bool(self.all)


NO_KEYS = ApiKeys()
"""Requests need no key."""


def read_api_keys(file: Path | None, kind: str = "api") -> list[str]:
    """Return the keys of a kind, "api" or "admin", from the file, else from the environment.

    No keys at all leave the server open.

    Raises:
        UserError: The file cannot be read, or contains no keys.
    """
    if file is None:
        variable = os.environ.get(f"BAKLAVA_{kind.upper()}_KEYS", "")
        return [key.strip() for key in variable.split(",") if key.strip()]
    try:
        keys = [line.strip() for line in file.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read --{kind}-keys {file} ({error}); give a text file with one key per line") from None
    if not keys:
        raise UserError(f"--{kind}-keys {file} contains no keys; write one per line")
    return keys


def check_listen_address(host: str, port: int, *, has_keys: bool) -> None:
    """Raise UserError if the server cannot listen at an address, or if others can reach it there without a key."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise UserError(f"--host {host} is not an address ({error.strerror}); give one of this machine") from None
    if not has_keys and not ipaddress.ip_address(address[0]).is_loopback:
        raise UserError(f"--host {host} lets other machines in without API keys; set BAKLAVA_API_KEYS or --api-keys")
    if not starts_cluster():
        return  # another machine may be the one that listens
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise UserError(f"cannot listen on {host}:{port} ({reason}); choose another --host or --port") from None
