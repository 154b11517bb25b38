"""Facts about the package: what the core needs, what it offers, what its scripts say if an extra is missing."""

import re
import shutil
import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path

import pytest
from search_process import make_model

import baklava

ROOT = Path(__file__).parents[2]
NOT_IN_CORE = ("ray", "mlflow", "optuna", "matplotlib", "fastapi", "datasets", "sklearn", "gguf")


def closure(*names: str) -> set[str]:
    """Installed distributions that these need, themselves included, without extras."""
    found: set[str] = set()
    todo = list(names)
    while todo:
        name = todo.pop()
        if name in found:
            continue
        try:
            requires = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # a marker of another platform
            continue
        found.add(name)
        plain = [requirement for requirement in requires if "extra ==" not in requirement]
        todo += [re.split(r"[\s<>=!~;\[(]", requirement, maxsplit=1)[0] for requirement in plain]
    return found


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of an environment that holds the built wheel and what the core names, and nothing else."""
    folder = tmp_path_factory.mktemp("core")
    source = folder / "source"  # a build leaves files beside the sources
    source.mkdir()
    for name in ("baklava", "tuning", "serve_app", "benchmarks"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns(".venv", "__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-index", "--no-build-isolation", "-q"]
    subprocess.run([*command, "--wheel-dir", folder, source], check=True, timeout=300)
    venv.create(folder / "venv")
    python = folder / "venv/bin/python"
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(subprocess.run([python, "-c", where], capture_output=True, text=True, check=True).stdout.strip())
    wheel = next(folder.glob("baklava-*.whl"))
    subprocess.run([sys.executable, "-m", "zipfile", "-e", wheel, site], check=True)
    for name in closure(*core_requirements(next(site.glob("baklava-*.dist-info")) / "METADATA")):
        distribution = metadata.distribution(name)
        for top in {Path(file).parts[0] for file in distribution.files or () if Path(file).parts[0] != ".."}:
            target, link = Path(str(distribution.locate_file(top))), site / top
            if top != "__pycache__" and not link.exists():
                link.symlink_to(target)
    return python


def core_requirements(path: Path) -> list[str]:
    """Names of what the wheel requires without an extra."""
    lines = [line.removeprefix("Requires-Dist: ") for line in path.read_text().splitlines() if "Requires-Dist" in line]
    return [re.split(r"[\s<>=!~;\[(]", line, maxsplit=1)[0] for line in lines if "extra ==" not in line]


def run(python: Path, code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([python, "-I", "-c", code], capture_output=True, text=True, timeout=300, cwd=python.parent)


def test_the_core_alone_generates_under_a_plan(core: Path) -> None:
    code = f"""
import importlib.util
assert not [name for name in {NOT_IN_CORE} if importlib.util.find_spec(name)]
import torch
from transformers import LlamaConfig, LlamaForCausalLM
import baklava
from baklava.allocation.plan_spec import resolve_plan

shape = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
model = LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=2, eos_token_id=None, pad_token_id=0)).eval()
loaded = baklava.LoadedModel.of(model, tokenizer=None, id="random")
plan = resolve_plan("uniform:0.5", loaded, context_length=128).plan
cache = baklava.BudgetedCache(plan)
ids = torch.randint(1, 64, (1, 100))
out = loaded.model.generate(ids, past_key_values=cache, max_new_tokens=8, do_sample=False)
cache.check_integrity(out.shape[1] - 1)
print(out.shape[1], cache.nbytes <= plan.bytes_per_sequence)
"""
    ran = run(core, code)
    assert ran.stdout.split() == ["108", "True"], ran.stderr


def test_importing_the_package_loads_neither_torch_nor_transformers(core: Path) -> None:
    ran = run(core, "import baklava, sys; print([name for name in ('torch', 'transformers') if name in sys.modules])")
    assert ran.stdout.strip() == "[]", ran.stderr


@pytest.mark.parametrize("name", baklava.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(baklava, name).__name__ == name


def test_a_script_without_its_extra_says_which_to_install(core: Path, tmp_path: Path) -> None:
    options = {
        "search": [],
        "serve": ["--plan", "full", "--model", str(make_model(tmp_path / "model"))],
        "evaluate": ["--plan", "full"],
    }
    modules = {point.name: point.module for point in metadata.distribution("baklava").entry_points}
    scripts = [(modules[f"baklava-{script}"], arguments) for script, arguments in options.items()]
    code = f"""
from importlib import import_module
print([import_module(module).main(arguments) for module, arguments in {scripts}])
"""
    ran = run(core, code)
    assert ran.stdout.splitlines()[-1:] == ["[2, 2, 2]"], ran.stderr
    assert re.findall(r"baklava-(\w+): .*baklava\[(\w+)\]", ran.stderr) == [
        ("search", "search"),
        ("serve", "serve"),
        ("evaluate", "eval"),
    ]
    assert "Traceback" not in ran.stderr


def test_the_version_stands_in_one_place() -> None:
    assert "dynamic" in (ROOT / "pyproject.toml").read_text()
    assert f"version: {baklava.__version__}" in (ROOT / "CITATION.cff").read_text()
    assert f"## {baklava.__version__}" in (ROOT / "CHANGELOG.md").read_text()
