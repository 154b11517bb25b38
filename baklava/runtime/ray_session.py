"""A connection to a Ray cluster, for the search, the evaluation and the server."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from baklava.console import log
from baklava.errors import UserError

CONNECT_TIMEOUT_SECONDS = 5.0


def configure_ray_environment() -> None:
    """Set the defaults of what Ray reads when it is imported; what is set already stays."""
    defaults = {
        "RAY_AUTH_MODE": "token",  # Ray's ports listen on every interface, and need no token by default
        "RAY_USAGE_STATS_ENABLED": "0",
        # At the end actors are killed, and Ray would log that it retries the calls to them.
        "RAY_enable_output_error_log_if_still_retry": "0",
    }
    if not os.environ.get("RAY_ADDRESS"):
        # A cluster of this machine's own stays on the loopback address. Ray would look for another one by connecting to
        # an address on the internet.
        defaults["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


@contextmanager
def ray_session(*, object_store_bytes: int, num_cpus: int | None = None, log_to_driver: bool = False) -> Iterator[None]:
    """Connect to the cluster at `$RAY_ADDRESS`, or start one on this machine that ends with the block.

    If Ray is connected already, use that connection and leave it open.

    Args:
        object_store_bytes: Size of the object store of a cluster started here.
        num_cpus: CPUs that a cluster started here offers; all that the machine has if None.
        log_to_driver: Whether Ray copies the output of its workers to this process.

    Raises:
        UserError: no cluster answers at the address, or none can be started here, for example since `$RAY_AUTH_MODE`
            would leave it open.
    """
    # Imported here, since the library itself does not need Ray.
    import ray
    from ray.exceptions import RayError

    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    if not address or address == "local":
        _check_auth_mode()
    else:
        check_answers(address)
    log(f"ray: connecting to {address}" if address else "ray: starting on this machine")
    local = {"num_cpus": num_cpus, "include_dashboard": False, "object_store_memory": object_store_bytes}
    try:
        # Without "local", Ray would join any cluster that was started on this machine.
        ray.init(address or "local", log_to_driver=log_to_driver, logging_level="ERROR", **({} if address else local))
    except (OSError, ValueError, RayError) as error:
        if address:
            raise UserError(
                f"no Ray cluster answers at {address} ({error}); check RAY_ADDRESS and the token"
            ) from error
        raise UserError(f"Ray cannot start on this machine ({error}); check its free memory and /tmp") from error
    try:
        yield
    finally:
        ray.shutdown()


def _check_auth_mode() -> None:
    mode = os.environ.get("RAY_AUTH_MODE", "")
    if mode != "token":
        raise UserError(
            f"RAY_AUTH_MODE is {mode!r}, and Ray only starts here with token authentication, because who reaches one "
            "of its ports can run code; set RAY_AUTH_MODE=token"
        )


def check_answers(address: str) -> None:
    """Raise UserError if nothing listens at a cluster's HOST:PORT; Ray itself would retry for minutes."""
    host, _, port = address.rpartition("/")[2].rpartition(":")
    if not port.isdecimal():
        return  # Ray resolves "auto" and "local" itself
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_SECONDS).close()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UserError(f"no Ray cluster answers at {address} ({reason}); check RAY_ADDRESS") from None
