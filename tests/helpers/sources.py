"""The Python sources of the two packages, parsed: imports between rooms, functions, docstrings.

A room is a folder or a file at the top of a package; the package's own `__init__` is none.
"""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = {"sid_kernels": ROOT / "sid_kernels", "sid_trainer": ROOT / "python/sid_trainer"}


@cache
def parse(package: str) -> dict[Path, ast.Module]:
    """Return the syntax tree of each source file by its path relative to the package."""
    folder = PACKAGES[package]
    return {path.relative_to(folder): ast.parse(path.read_text()) for path in sorted(folder.rglob("*.py"))}


def room_of(path: Path) -> str:
    return path.parts[0].removesuffix(".py")


def imported_modules(package: str, path: Path, tree: ast.Module) -> Iterator[str]:
    """Yield the full name of each module or name a file imports, including imports in functions and for type checkers."""
    here = [package, *path.parent.parts]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{name.name}" for name in node.names)


def arrows(package: str) -> dict[tuple[str, str], set[str]]:
    """Return (importing room, imported room) -> the files that import."""
    found: dict[tuple[str, str], set[str]] = {}
    rooms = {room_of(path) for path in parse(package)} - {"__init__"}
    for path, tree in parse(package).items():
        for module in imported_modules(package, path, tree):
            first, _, rest = module.partition(".")
            target = rest.split(".")[0]
            if first == package and target in rooms and room_of(path) not in (target, "__init__"):
                found.setdefault((room_of(path), target), set()).add(str(path))
    return found


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def number_of_parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Count named parameters, `self` and `cls` included; *args and **kwargs count as one each."""
    a = function.args
    return len(a.posonlyargs) + len(a.args) + len(a.kwonlyargs) + (a.vararg is not None) + (a.kwarg is not None)


def is_kernel(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any(ast.unparse(decorator).startswith("triton.jit") for decorator in function.decorator_list)


LOSS_OPTIONS = {"divergence", "label_smoothing", "ignore_index", "reduction"}


def loss_option_places(package: str) -> list[str]:
    """Return FILE:LINE of each innermost signature, call, literal, class or function that names all four loss options."""
    places = []

    def visit(node: ast.AST, path: Path, line: int) -> set[str]:
        line = getattr(node, "lineno", line)
        before, names = len(places), _own_names(node) & LOSS_OPTIONS
        documented = isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None
        for child in ast.iter_child_nodes(node):
            if not (documented and child is node.body[0]):
                names |= visit(child, path, line)
        if names == LOSS_OPTIONS and len(places) == before and not isinstance(node, ast.Module):
            places.append(f"{path}:{line}")
        return names

    for path, tree in parse(package).items():
        visit(tree, path, 1)
    return places


DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def _own_names(node: ast.AST) -> set[str]:
    match node:
        case ast.Name(id=name) | ast.arg(arg=name) | ast.keyword(arg=str(name)) | ast.Attribute(attr=name):
            return {name}
        case ast.Constant(value=str(text)):
            return set(re.findall(r"\w+", text))
    return set()


def cpp_functions() -> Iterator[tuple[str, str, int]]:
    """Yield (FILE:LINE, name, number of parameters) of each C++ function that is defined in csrc and is no kernel."""
    for path in sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh")):
        text = re.sub(r"//[^\n]*", "", path.read_text())
        for found in re.finditer(r"(?P<before>[\w>&*\]])\s*(?P<name>\w*)\((?=[^()]*[\w>&*]\s+[&*]?\w+)", text):
            start, depth = found.end(), 1
            end = start
            while depth and end < len(text):
                depth += {"(": 1, ")": -1}.get(text[end], 0)
                end += 1
            if not re.match(r"\s*(const|noexcept|mutable|->\s*[\w:<>*& ]+|\s)*\{", text[end:]):
                continue
            head = text[text.rfind("\n\n", 0, found.start()) + 1 : found.start()]
            if "__global__" in head.rsplit("}", 1)[-1]:
                continue
            inner = re.sub(r"<[^<>()]*>", "", re.sub(r"<[^<>()]*>", "", text[start : end - 1]))
            line = text.count("\n", 0, found.start()) + 1
            yield f"{path.relative_to(ROOT)}:{line}", found["name"] or "lambda", inner.count(",") + 1


def cpp_loss_option_places() -> list[str]:
    """Return FILE:LINE of each innermost pair of brackets in csrc that names label smoothing, ignore index and reverse."""
    places = []
    for path in sorted(p for p in (ROOT / "csrc").rglob("*") if p.is_file()):
        text = re.sub(r"//[^\n]*", "", path.read_text())
        open_at: list[tuple[int, int]] = []  # position, places found before it
        for i, letter in enumerate(text):
            if letter in "({":
                open_at.append((i, len(places)))
            elif letter in ")}" and open_at:
                start, before = open_at.pop()
                names = set(re.findall(r"\w+", text[start:i]))
                if len(places) == before and {"label_smoothing", "ignore_index", "reverse"} <= names:
                    places.append(f"{path.relative_to(ROOT)}:{text.count(chr(10), 0, start) + 1}")
    return places
