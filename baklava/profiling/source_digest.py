"""A digest of the code that computes something, so that a cached result is not read after its formulas changed."""

import ast
import hashlib
from functools import cache
from importlib.util import find_spec, resolve_name
from pathlib import Path


@cache
def source_digest(module: str) -> str:
    """Return the hash of a module's code and of all modules of its package that it imports, directly or not.

    Comments, docstrings and formatting do not change it.
    """
    package = module.partition(".")[0]
    trees: dict[str, ast.Module] = {}
    pending = [module]
    while pending:
        name = pending.pop()
        if name in trees:
            continue
        outer = name.rpartition(".")[0]
        outer_spec = find_spec(outer) if outer else None
        if outer_spec and outer_spec.submodule_search_locations is None:
            continue  # an attribute of a module; looking for it would import the module
        spec = find_spec(name)
        if spec is None or spec.origin is None:
            continue
        trees[name] = ast.parse(Path(spec.origin).read_text())
        parent = name if spec.submodule_search_locations is not None else outer
        imported = [outer, *_imported_modules(trees[name], parent)]
        pending += [other for other in imported if other.partition(".")[0] == package]
    digest = hashlib.sha256()
    for name in sorted(trees):
        digest.update(name.encode())
        digest.update(ast.dump(_without_docstrings(trees[name])).encode())
    return digest.hexdigest()[:16]


def _imported_modules(tree: ast.Module, parent: str) -> list[str]:
    """Return the names that a module imports; of `from a import b` both `a` and `a.b`, which may be a module."""
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            source = resolve_name("." * node.level + (node.module or ""), parent) if node.level else node.module or ""
            names += [source, *(f"{source}.{alias.name}" for alias in node.names)]
    return names


def _without_docstrings(tree: ast.Module) -> ast.Module:
    """Remove statements that are only a string: docstrings of modules, classes, functions and attributes."""
    for node in ast.walk(tree):
        for field in ("body", "orelse", "finalbody"):
            statements = getattr(node, field, None)
            if isinstance(statements, list):
                setattr(node, field, [statement for statement in statements if not _is_string(statement)])
    return tree


def _is_string(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )
