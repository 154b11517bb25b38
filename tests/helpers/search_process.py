"""A tiny model on disk with its tokenizer, texts, and a search as a process."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[2]
WORDS = [f"w{number}" for number in range(60)]
SMALL_SEARCH_OPTIONS = ["--context", "160", "--continuation", "32", "--bits", "16"]


def make_model(folder: Path, config_class: Any = LlamaConfig, **fields: Any) -> Path:
    """Write a random Llama of 3 layers x 2 KV heads, or another model, with a tokenizer of 60 words."""
    vocabulary = {word: number for number, word in enumerate(["<unk>", "<eos>", *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>")
    wrapped.save_pretrained(folder)
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    ends = {"bos_token_id": None, "eos_token_id": 1, "initializer_range": 0.25}
    config = config_class(vocab_size=len(vocabulary), **(shape | heads | ends | fields))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def make_texts(folder: Path, count: int = 6, words: int = 400, seed: int = 0) -> Path:
    """Write texts of random words."""
    folder.mkdir(parents=True)
    source = random.Random(seed)
    for number in range(count):
        (folder / f"text{number}.txt").write_text(" ".join(source.choice(WORDS) for _ in range(words)))
    return folder


def start_search(
    *arguments: object, log: Path, env: Mapping[str, str] | None = None, prefix: Sequence[str] = ()
) -> subprocess.Popen[bytes]:
    """Start jobs/search.py as a process that writes to `log`; `prefix` is a command that enters its network."""
    command = [*prefix, sys.executable, str(ROOT / "jobs/search.py"), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    with log.open("wb") as file:
        # A shell that runs the tests in the background makes them ignore Ctrl-C, which child processes inherit.
        restore_sigint = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        options = {"env": environment, "preexec_fn": restore_sigint, "start_new_session": True}
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, **options)


def wait_until(
    condition: Callable[[], bool], process: subprocess.Popen[bytes], log: Path, seconds: float = 300
) -> None:
    """Wait for something to happen while a process runs; fail with its log if it ends first."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"it ended first:\n{log.read_text()}"
        assert time.monotonic() < deadline, f"it did not happen in {seconds} s:\n{log.read_text()}"
        time.sleep(0.05)


def count_lines(path: Path) -> int:
    """The number of complete lines of a file that may not exist yet."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def descendants(pid: int) -> Iterator[tuple[int, str]]:
    """Yield the ids and command lines of all processes that a process started, directly or not."""
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents.setdefault(int(stat.read_text().rpartition(")")[2].split()[1]), []).append(int(stat.parent.name))
        except OSError:  # it ended meanwhile
            continue
    waiting = [pid]
    while waiting:
        for child in parents.get(waiting.pop(), []):
            waiting.append(child)
            yield child, command_line(child)


def command_line(pid: int) -> str:
    """The command line of a process."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    except OSError:
        return ""


def kill(pid: int) -> None:
    """kill -9; it may have ended already."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
