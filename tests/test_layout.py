"""Facts about the layout: imports point one way, functions and files stay small, nothing unsafe is loaded."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PRODUCT = ("baklava", "tuning", "serve_app", "benchmarks", "jobs")

# package: what it must never import
FORBIDDEN = {
    "baklava": {"ray", "optuna", "mlflow", "fastapi", "tuning", "serve_app", "benchmarks"},
    "tuning": {"serve_app", "fastapi", "benchmarks"},
    "serve_app": {"tuning", "optuna", "mlflow", "benchmarks"},
    "benchmarks/kvpress": {"baklava", "tuning", "serve_app", "jobs"},  # they are not in its environment
    "benchmarks/openvino": {"baklava", "tuning", "serve_app", "jobs"},
}

# what one module may import nevertheless, inside its functions only, so that importing the library stays light
LAZY_IMPORTS = {
    "baklava.plan.registry": {"mlflow"},  # plans at models:/NAME@ALIAS, for the server and the evaluation alike
    "baklava.runtime.ray_session": {"ray"},  # one way to connect to a cluster, for the search and the server alike
}

# folders and modules directly under a package, each of which imports only itself and those before it
ORDER = {
    "baklava": "errors serialization console paths plan eviction cache data runtime profiling allocation evaluation",
    "tuning": "study workers optimizers selection reporting tracking search evaluation",
    "serve_app": "engine openai replication api deployment cli",
}
MAX_ENTRIES = 14


def sources(*folders: str) -> list[Path]:
    """Python files of these folders; an environment inside one of them, .venv, is not ours."""
    found = chain.from_iterable((ROOT / folder).rglob("*.py") for folder in folders)
    return sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(ROOT).parts))


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imports(path: Path) -> Iterator[str]:
    """Every module that a file names in an import, wherever in the file; `from a import b` gives a and a.b."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: import by full name"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules(package: str) -> dict[str, Path]:
    return {name_of(path): path for path in sources(package)}


@pytest.mark.parametrize("package", FORBIDDEN)
def test_a_package_never_imports_what_it_must_not_know(package: str) -> None:
    wrong = {
        (name, imported)
        for name, path in modules(package).items()
        for imported in imports(path)
        if imported.split(".")[0] in FORBIDDEN[package] - LAZY_IMPORTS.get(name, set())
    }
    assert wrong == set()


@pytest.mark.parametrize("module", LAZY_IMPORTS)
def test_what_one_module_may_import_is_imported_inside_its_functions(module: str) -> None:
    code = f"import {module}, sys; print([name for name in {LAZY_IMPORTS[module]} if name in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert ran.stdout.strip() == "[]"


@pytest.mark.parametrize("package", ORDER)
def test_every_folder_has_a_place_in_the_order(package: str) -> None:
    found = {name.split(".")[1] for name in modules(package) if "." in name}
    assert found - set(ORDER[package].split()) == set(), "add the folder to ORDER"


@pytest.mark.parametrize("package", ORDER)
def test_folders_import_only_those_before_them(package: str) -> None:
    place = {folder: number for number, folder in enumerate(ORDER[package].split())}
    wrong = {
        (name, imported)
        for name, path in modules(package).items()
        for imported in imports(path)
        if "." in name and imported.startswith(f"{package}.")
        if place.get(imported.split(".")[1], -1) > place[name.split(".")[1]]
    }
    assert wrong == set()


def test_no_folder_has_more_entries_than_one_reads_at_a_glance() -> None:
    folders = {path.parent for path in sources(*PRODUCT)}
    entries = {
        str(folder.relative_to(ROOT)): len([e for e in folder.iterdir() if e.name[0] not in "._"]) for folder in folders
    }
    assert {name: count for name, count in entries.items() if count > MAX_ENTRIES} == {}


@pytest.mark.parametrize("package", ["baklava", "tuning", "serve_app"])
def test_modules_do_not_import_each_other_in_a_circle(package: str) -> None:
    known = modules(package)
    graph = {name: {other for other in imports(path) if other in known} - {name} for name, path in known.items()}
    for name in graph:
        # a plug-in folder's own __init__ gathers its files; they may not reach back into it
        graph[name] = {other for other in graph[name] if not name.startswith(f"{other}.")} | reaching_back(name, known)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"import cycle: {' -> '.join(error.args[1])}")


def reaching_back(name: str, known: dict[str, Path]) -> set[str]:
    """The folder of a module, where the module imports something of the folder's __init__ itself."""
    folder = name.rpartition(".")[0]
    if folder not in known:
        return set()
    taken = {imported for imported in imports(known[name]) if imported.startswith(f"{folder}.")}
    files = {other for other in known if other.startswith(f"{folder}.")}
    from_init = {one for one in taken if one not in files and one.rpartition(".")[0] not in files}
    return {folder} if from_init else set()


def test_light_modules_load_neither_torch_nor_transformers() -> None:
    light = (
        "baklava.plan",
        "baklava.console",
        "baklava.errors",
        "baklava.paths",
        "baklava.data.demo_assets",
        "baklava.runtime.cpu_threads",
        "baklava.runtime.host_memory",
    )
    names = [name for name in modules("baklava") if name.startswith(light)]
    code = f"import {', '.join(names)}, sys; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert ran.stdout.strip() == "[]"


def test_no_script_has_the_name_of_a_stdlib_module() -> None:
    assert [path.name for path in sources("jobs") if path.stem in sys.stdlib_module_names] == []


def unsafe(path: Path) -> Iterator[str]:
    """Whatever would run code out of a file that was only to be read."""
    for node in ast.walk(tree(path)):
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Name(id="torch" | "joblib"), attr="load")):
                yield f"{path.name}:{node.lineno} load"
            case ast.keyword(arg="trust_remote_code" | "allow_pickle", value=value):
                if not (isinstance(value, ast.Constant) and value.value is False):
                    yield f"{path.name}:{value.lineno} {node.arg}"
    for imported in imports(path):
        if imported.split(".")[0] in {"pickle", "cloudpickle", "dill", "shelve", "marshal", "joblib"}:
            yield f"{path.name} imports {imported}"


def test_nothing_in_the_repository_runs_code_from_a_checkpoint_or_unpickles() -> None:
    found = [*chain.from_iterable(unsafe(path) for path in sources(*PRODUCT, "tests"))]
    assert found == []


@pytest.mark.parametrize(
    ("code", "count"),
    [
        ("import torch\ntorch.load('x')", 1),
        ("load(trust_remote_code=True)", 1),
        ("load(trust_remote_code=flag)", 1),
        ("load(trust_remote_code=False)", 0),
        ("from pickle import loads", 2),
    ],
)
def test_the_search_for_unsafe_code_finds_it(tmp_path: Path, code: str, count: int) -> None:
    (tmp_path / "one.py").write_text(code)
    assert len(list(unsafe(tmp_path / "one.py"))) == count
