"""A Ray head node in a namespace with only loopback."""

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from search_process import ROOT, descendants, kill

RAY = str(Path(sys.executable).with_name("ray"))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class Loopback:
    """A network namespace that has nothing but loopback, where this machine lets us make one; else its own network."""

    def __init__(self) -> None:
        inside = "ip link set lo up && echo up && exec sleep infinity"
        self.process = subprocess.Popen(
            ["unshare", "--net", "sh", "-c", inside], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert self.process.stdout is not None
        made = self.process.stdout.readline() == "up\n"
        self.prefix = ["nsenter", "--net", "--target", str(self.process.pid)] if made else []

    def stop(self) -> None:
        self.process.kill()
        self.process.communicate()


class Head:
    """A head node with a token of its own, and another machine that submits jobs to it: it shares no folder with it."""

    def __init__(self, root: Path, temp: str, network: Loopback) -> None:
        self.token, self.port, self.dashboard = root / "token", free_port(), free_port()
        self.token.write_text("b" * 64)
        self.token.chmod(0o600)
        self.network, self.temp, self.home = network, Path(temp), root / "laptop"
        own = {"BAKLAVA_DATA": str(root / "data"), "BAKLAVA_CACHE": str(root / "cache")}
        secret = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.token)}
        # The tests run with what a driver sets for a cluster of its own, under which Ray refuses a second node.
        several = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1"}
        self.env = {**os.environ, **own, **secret, **several, "OMP_NUM_THREADS": "1"}
        self.log = root / "head.log"
        where = [f"--port={self.port}", f"--dashboard-port={self.dashboard}", f"--temp-dir={temp}"]
        only_here = ["--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1"]
        sizes = ["--num-cpus=2", "--object-store-memory=268435456"]
        command = [*network.prefix, RAY, "start", "--head", "--block", *where, *only_here, *sizes]
        with self.log.open("wb") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=self.env)

    @property
    def checkout(self) -> Path:
        """The checkout of the machine that submits."""
        copy = self.home / "baklava"
        if not copy.exists():
            rest = shutil.ignore_patterns(".*", "runs", "__pycache__", "docs", "plans", "tests")
            shutil.copytree(ROOT, copy, ignore=rest)
        return copy

    def job(self, *arguments: object, token: str | None = None) -> subprocess.CompletedProcess[str]:
        """`ray job submit` of a script in the checkout, from a machine that has the token; waits for its end."""
        (self.home / ".ray").mkdir(parents=True, exist_ok=True)
        (self.home / ".ray/auth_token").write_text(token or self.token.read_text())
        env = {"HOME": str(self.home), "PATH": os.environ["PATH"], "RAY_AUTH_MODE": "token", "LANG": "C.UTF-8"}
        submit = [RAY, "job", "submit", "--address", f"http://127.0.0.1:{self.dashboard}", "--working-dir", "."]
        command = [*self.network.prefix, *submit, "--", sys.executable, *map(str, arguments)]
        return subprocess.run(command, env=env, cwd=self.checkout, capture_output=True, text=True, timeout=300)

    def job_log(self) -> str:
        """What the dashboard shows of the last job."""
        logs = self.temp.glob("session_latest/logs/job-driver-*.log")
        return max(logs, key=lambda path: path.stat().st_mtime).read_bytes().decode()

    def wait(self) -> None:
        """Wait until jobs are taken."""
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text()
            if "Ray runtime started" in self.log.read_text():
                return
            time.sleep(0.2)
        pytest.fail(self.log.read_text())

    def stop(self) -> None:
        for pid in [pid for pid, _ in descendants(self.process.pid)] + [self.process.pid]:
            kill(pid)
        self.process.wait()
