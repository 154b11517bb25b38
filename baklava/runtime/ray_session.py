"""A connection to a Ray cluster, for the search, the evaluation and the server."""

import json
import os
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from baklava.console import log
from baklava.errors import UserError
from baklava.paths import check_temp_dir, check_writable, home_dir, reason_of
from baklava.runtime.cpu_threads import available_cpus, openmp_environment

CONNECT_TIMEOUT_SECONDS = 5.0

JOB_CONFIG_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""What `ray job submit` tells the process that it starts."""

MAX_TEMP_DIR_BYTES = 39
"""Longest path in which Ray can start: the name of a socket has 107 bytes, and Ray adds up to 68 of its own."""


def configure_ray_environment() -> None:
    """Set the defaults of what Ray reads when it is imported; what is set already stays."""
    defaults = {
        "RAY_AUTH_MODE": "token",  # Ray's ports listen on every interface, and need no token by default
        "RAY_USAGE_STATS_ENABLED": "0",
        # At the end actors are killed, and Ray would log that it retries the calls to them.
        "RAY_enable_output_error_log_if_still_retry": "0",
    }
    if starts_cluster():
        # A cluster of this machine's own stays on the loopback address. Ray would look for another one by connecting to
        # an address on the internet.
        defaults["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        # Ray's default is 15. Beside any busy process, the client of a server included, workers would hardly run.
        defaults["RAY_worker_niceness"] = "0"
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    # A job's driver inherits OMP_NUM_THREADS=1 from the actor that starts it. Users set it in the job's environment.
    if JOB_CONFIG_VARIABLE in os.environ and "OMP_NUM_THREADS" not in _job_environment():
        os.environ.pop("OMP_NUM_THREADS", None)


def starts_cluster() -> bool:
    """Return whether a session starts a cluster on this machine, instead of using the one at `$RAY_ADDRESS`."""
    return os.environ.get("RAY_ADDRESS", "") in ("", "local")


@contextmanager
def ray_session(*, object_store_bytes: int, num_cpus: int | None = None, log_to_driver: bool = False) -> Iterator[None]:
    """Connect to the cluster at `$RAY_ADDRESS`, or start one on this machine that ends with the block.

    If Ray is connected already, use that connection and leave it open.

    Args:
        object_store_bytes: Size of the object store of a cluster started here.
        num_cpus: CPUs that a cluster started here offers; all that this process may use if None.
        log_to_driver: Whether Ray copies the output of its workers to this process.

    Raises:
        UserError: no cluster answers at the address, or none can be started here, for example since `$RAY_AUTH_MODE`
            would leave it open, or since no folder takes its sockets.
    """
    # Imported here, since the library itself does not need Ray.
    import ray
    from ray.exceptions import RayError

    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS") or "local"
    options: dict[str, object] = {}
    if starts_cluster():
        _check_auth_mode()
        check_temp_dir()
        options = {
            "num_cpus": num_cpus or available_cpus(),
            "include_dashboard": False,
            "object_store_memory": object_store_bytes,
            "_temp_dir": str(_local_temp_dir() / "ray"),
        }
        _provide_token()
        log("ray: starting on this machine")
    else:
        check_answers(address)
        # The workers of a cluster started elsewhere do not inherit this process's environment. Ray refuses variables
        # that the job's environment has already.
        variables = {name: value for name, value in openmp_environment().items() if name not in _job_environment()}
        options = {"runtime_env": {"env_vars": variables}}
        log(f"ray: connecting to {address}")
    try:
        with _deferred_interrupt(), _own_signals():
            # Without "local", Ray would join any cluster that was started on this machine.
            ray.init(address, log_to_driver=log_to_driver, logging_level="ERROR", **options)
    except (OSError, ValueError, RuntimeError, RayError) as error:
        if starts_cluster():
            folder = options["_temp_dir"]
            raise UserError(
                f"Ray cannot start on this machine ({error}); check its free memory and the disk of {folder}"
            ) from error
        raise UserError(f"no Ray cluster answers at {address} ({error}); check RAY_ADDRESS and the token") from error
    try:
        yield
    finally:
        ray.shutdown()


def _job_environment() -> dict[str, str]:
    """Return the environment variables that were given to `ray job submit`, if it started this process."""
    config = json.loads(os.environ.get(JOB_CONFIG_VARIABLE) or "{}")
    return (config.get("runtime_env") or {}).get("env_vars") or {}


def _local_temp_dir() -> Path:
    """Return the folder for the files of a cluster started here: `$RAY_TMPDIR`, else `$TMPDIR` if it suits, else /tmp.

    Raises:
        UserError: Ray cannot use it.
    """
    remedy = f"set RAY_TMPDIR to a writable folder of at most {MAX_TEMP_DIR_BYTES} bytes"
    if named := os.environ.get("RAY_TMPDIR"):
        folder = Path(named).expanduser().absolute()
        if reason := _why_unusable(folder):
            raise UserError(f"Ray cannot start in RAY_TMPDIR, since {folder} {reason}; {remedy}, or unset it")
        return folder
    problems: list[str] = []
    for folder in (Path(os.environ.get("TMPDIR") or "/tmp").expanduser().absolute(), Path("/tmp")):
        reason = _why_unusable(folder)
        if reason is None:
            if problems:
                log(f"ray: keeps its files in {folder}, since TMPDIR {problems[0]}")
            return folder
        problems.append(reason)
    raise UserError(f"Ray cannot start on this machine, since {folder} {reason}; {remedy}")


def _why_unusable(folder: Path) -> str | None:
    size = len(os.fsencode(folder))
    if size > MAX_TEMP_DIR_BYTES:
        return f"has a path of {size} bytes, too long for the names of sockets"
    try:
        check_writable(folder / "ray")
    except OSError as error:
        return f"cannot be written ({reason_of(error)})"
    return None


def _provide_token() -> None:
    """Make a token for this process if Ray has none and could not store one in the home folder."""
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return
    stored = home_dir() / ".ray" / "auth_token"
    try:
        if not stored.is_file():
            check_writable(stored.parent)
    except OSError:
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


@contextmanager
def _deferred_interrupt() -> Iterator[None]:
    """Let Ctrl-C take effect after the block: in a hook of a fork its exception is lost, and a lock stays held."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    pending: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: pending.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if pending:
            signal.raise_signal(signal.SIGINT)


@contextmanager
def _own_signals() -> Iterator[None]:
    """Start Ray inside the block so that this process handles its signals itself, and Ray's processes get none of them.

    Ctrl-C, `timeout` and the end of a terminal signal the whole process group, and a replica would end amid its
    requests. On Linux the kernel ends Ray's processes with this one. Elsewhere Ray relies on the group for that.
    """
    from ray._private import services, utils

    handler = signal.getsignal(signal.SIGTERM)
    popen, set_sigterm_handler = services.ConsolePopen, utils.set_sigterm_handler
    if sys.platform == "linux":
        services.ConsolePopen = partial(popen, start_new_session=True)
    utils.set_sigterm_handler = lambda handler: None
    try:
        yield
    finally:
        services.ConsolePopen, utils.set_sigterm_handler = popen, set_sigterm_handler
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray's core sets one that prints a stack and aborts


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
        raise UserError(f"no Ray cluster answers at {address} ({reason_of(error)}); check RAY_ADDRESS") from None
