"""What imports what: one way between modules, and nothing heavy where people wait."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import featx

PACKAGE = Path(featx.__file__).parent
HEAVY = {"torch", "torchvision", "timm", "sklearn", "scipy", "h5py", "onnx", "onnxruntime", "matplotlib", "pandas"}


def imports_of(path: Path) -> set[str]:
    """The featx modules that a file imports at its top level, `TYPE_CHECKING` blocks left out."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.startswith("featx")}


def modules() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


def test_imports_point_one_way() -> None:
    known = modules()
    graph = {name: imports_of(path) & set(known) - {name} for name, path in known.items()}
    assert len(graph) > 20 and any(graph.values())
    state: dict[str, int] = {}

    def visit(name: str, trail: list[str]) -> None:
        assert state.get(name) != 1, f"modules import each other: {' -> '.join([*trail, name])}"
        if state.get(name) == 2:
            return
        state[name] = 1
        for other in sorted(graph[name]):
            # a package's file may use the package's own __init__, which then imports it lazily
            if other != "featx":
                visit(other, [*trail, name])
        state[name] = 2

    for name in graph:
        visit(name, [])


# Low to high: a room imports from its own and from those before it, inside functions too.
ROOMS = (
    *("errors", "text", "options", "threads", "seals", "files", "records", "identity", "devices", "state"),
    *("metrics", "pixels"),
    *("features", "head", "sources", "cache", "backbones", "engines", "solvers", "heads", "learning", "extraction"),
    *("stored", "runs", "classifier", "measuring", "finetuning", "fitting", "sweeping", "estimators", "shipping"),
    *("reporting", "cli"),
)


def all_imports_of(path: Path) -> set[str]:
    """The rooms that a file imports anywhere, `TYPE_CHECKING` blocks left out."""
    found = set()
    waiting: list[ast.AST] = [ast.parse(path.read_text())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        waiting += ast.iter_child_nodes(node)
    return {name.split(".")[1] for name in found if name.startswith("featx.")} & set(ROOMS)


def test_no_room_imports_from_one_above_it() -> None:
    files = {name: path for name, path in modules().items() if name not in ("featx", "featx.__main__")}
    assert {name.split(".")[1] for name in files} == set(ROOMS)
    for name, path in files.items():
        own = ROOMS.index(name.split(".")[1])
        above = {room for room in all_imports_of(path) if ROOMS.index(room) > own}
        assert not above, f"{name} imports {', '.join(sorted(above))}"


def loaded_by(code: str) -> set[str]:
    out = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print('LOADED', *sorted(sys.modules))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return {name.split(".")[0] for name in out.split("LOADED", 1)[1].split()}


def test_importing_featx_loads_nothing_heavy() -> None:
    loaded = loaded_by("import featx")
    assert "featx" in loaded
    assert not loaded & HEAVY


@pytest.mark.parametrize("first", [True, False])
def test_onnxruntime_is_told_to_report_nothing_whether_it_is_imported_before_featx_or_after(first: bool) -> None:
    code = f"""
import os, sys, types
del os.environ["ORT_DISABLE_TELEMETRY"]
told = []
if {first}:
    sys.modules["onnxruntime"] = types.SimpleNamespace(disable_telemetry_events=lambda: told.append(True))
import featx
assert os.environ["ORT_DISABLE_TELEMETRY"] == "1" and told == [True] * {first}
"""
    assert "featx" in loaded_by(code)


@pytest.mark.parametrize("arguments", ["--help", "--version", "extract --help", "fit --help", "completion bash"])
def test_help_and_version_load_nothing_heavy(arguments: str) -> None:
    code = f"""
import sys
from featx.cli import cli
try:
    cli({arguments.split()!r}, prog_name="featx")
except SystemExit as done:
    assert done.code == 0, done.code
"""
    loaded = loaded_by(code)
    assert "click" in loaded
    assert not loaded & (HEAVY | {"numpy", "jinja2", "yaml"})


def test_only_the_package_and_the_command_line_have_code_in_their_init() -> None:
    inits = [
        path for path in modules().values() if path.name == "__init__.py" and len(path.relative_to(PACKAGE).parts) > 1
    ]
    assert len(inits) > 10
    for path in inits:
        allowed = (ast.Expr, ast.Import, ast.ImportFrom, ast.Assign, ast.For) if path.parent.name == "cli" else ast.Expr
        assert all(isinstance(node, allowed) for node in ast.parse(path.read_text()).body), path


def test_predicting_loads_no_templates() -> None:
    loaded = loaded_by("import featx.cli.shipping, featx.shipping.prediction")
    assert "numpy" in loaded
    assert not loaded & {"jinja2", "yaml", "torch", "matplotlib"}


def test_the_public_names_are_there() -> None:
    assert featx.__all__ == sorted(featx.__all__)
    for name in featx.__all__:
        assert callable(getattr(featx, name)), name
    with pytest.raises(AttributeError, match="extrct"):
        featx.extrct  # noqa: B018


def test_type_checkers_see_the_public_names() -> None:
    stub = ast.parse((PACKAGE / "__init__.pyi").read_text())
    names = {
        alias.asname: node.module for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert names == {name: getattr(featx, name).__module__ for name in featx.__all__}


def test_modules_say_what_they_own() -> None:
    for name, path in modules().items():
        doc = ast.get_docstring(ast.parse(path.read_text()))
        assert doc and doc.splitlines()[0].rstrip()[-1] in ".`", f"{name} opens with no sentence"
