"""Facts about the layout: imports point one way, functions and files stay small, nothing unsafe is loaded."""

import ast
import subprocess
import sys
from collections.abc import Iterator
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
    "serve_app": {"tuning", "optuna", "benchmarks"},
    "benchmarks/kvpress": {"baklava", "tuning", "serve_app", "jobs"},  # they are not in its environment
}

# the three wings of the library, each of which knows only itself and those before it
WINGS = {
    "what a plan is": "errors names paths memory files records progress script assets geometry grades sizes plan",
    "living inside one": "packing attention attending model eviction storage heads padding recording sliding ragged "
    "cache repetition prefilling entering batching likelihood spelling decoding compiling",
    "finding one": "hub published corpora texts windows profile importance rankings sensitivity curves profiling "
    "allocation scoring bootstrap tasks suites answering specs naming evaluation comparison formats verdict tally "
    "model_args harness",
}
WING_OF = {module: number for number, modules in enumerate(WINGS.values()) for module in modules.split()}

LONGEST_FUNCTION = 50  # lines of body, the docstring aside
LONGEST_FILE = 300


def sources(*folders: str) -> list[Path]:
    """Python files of these folders; an environment inside one of them, .venv, is not ours."""
    found = chain.from_iterable((ROOT / folder).rglob("*.py") for folder in folders)
    return sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(ROOT).parts))


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[str]:
    """Every module that a file names in an import, wherever in the file; `from a import b` gives a and a.b."""
    for node in ast.walk(ast.parse(path.read_text())):
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
        if imported.split(".")[0] in FORBIDDEN[package]
    }
    assert wrong == set()


def test_only_one_file_of_serving_knows_mlflow() -> None:
    knowing = [
        path.name for path in sources("serve_app") if any(name.split(".")[0] == "mlflow" for name in imports(path))
    ]
    assert len(knowing) <= 1, knowing


def test_every_module_of_the_library_has_a_wing() -> None:
    found = {name.split(".")[1] for name in modules("baklava") if "." in name}
    assert found - WING_OF.keys() == set(), "add the module to a wing in WINGS"


def test_the_wings_of_the_library_know_only_those_before_them() -> None:
    wrong = {
        (name, imported)
        for name, path in modules("baklava").items()
        for imported in imports(path)
        if wing(imported) > wing(name) >= 0
    }
    assert wrong == set()


def wing(module: str) -> int:
    """Number of the wing that a module of the library is in, -1 for the package itself and for what is foreign."""
    package, _, rest = module.partition(".")
    return WING_OF.get(rest.split(".")[0], -1) if package == "baklava" else -1


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


def test_what_a_plan_is_needs_neither_torch_nor_transformers() -> None:
    names = [
        f"baklava.{module}" for module in WINGS["what a plan is"].split() if (ROOT / f"baklava/{module}.py").exists()
    ]
    code = f"import {', '.join(names)}, sys; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert ran.stdout.strip() == "[]"


def test_no_script_has_the_name_of_a_stdlib_module() -> None:
    assert [path.name for path in sources("jobs") if path.stem in sys.stdlib_module_names] == []


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """Name and body lines of every function, without its docstring."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            lines = (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
            yield f"{name_of(path)}.{node.name}", lines


def test_functions_stay_small() -> None:
    sizes = dict(chain.from_iterable(functions(path) for path in sources(*PRODUCT)))
    assert {name: lines for name, lines in sizes.items() if lines > LONGEST_FUNCTION} == {}
    assert sorted(sizes.values())[len(sizes) // 2] <= 8


def test_files_stay_small() -> None:
    lengths = {name_of(path): len(path.read_text().splitlines()) for path in sources(*PRODUCT)}
    assert {name: lines for name, lines in lengths.items() if lines > LONGEST_FILE} == {}


def unsafe(path: Path) -> Iterator[str]:
    """Whatever would run code out of a file that was only to be read."""
    for node in ast.walk(ast.parse(path.read_text())):
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
