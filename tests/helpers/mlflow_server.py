"""A real MLflow server."""

import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
from search_process import descendants, kill


class MlflowServer:
    """`mlflow server` as a process."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        store = ["--backend-store-uri", f"sqlite:///{folder}/server.db", "--artifacts-destination", str(folder / "a")]
        self.command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--port", str(self.port), *store]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not self.up():
            assert self.process.poll() is None
            time.sleep(0.2)

    def up(self) -> bool:
        try:
            return httpx.get(f"{self.uri}/health", timeout=2).status_code == 200
        except httpx.TransportError:
            return False

    def stop(self) -> None:
        for pid in [pid for pid, _ in descendants(self.process.pid)] + [self.process.pid]:
            kill(pid)
        self.process.wait()
