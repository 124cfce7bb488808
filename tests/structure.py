"""Counts what the structure of the code is judged by: code lines, long functions, patched names.

python tests/structure.py
"""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TEMPLATES = (".html", ".css", ".js", ".jinja", ".md")


def code_lines(path: Path) -> int:
    """Lines of a file that are neither blank nor, in Python, only a comment or part of a docstring."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return sum(1 for line in text.splitlines() if line.strip())
    counted: set[int] = set()
    skipped = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in skipped:
            counted.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        # a string that is a statement: a docstring, or the text under a field
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            counted -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(counted)


def package_files(root: Path = ROOT) -> list[Path]:
    """Python and template files of the package."""
    return sorted(p for p in (root / "featx").rglob("*") if p.suffix in (".py", *TEMPLATES))


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """Each function of a file, as `file:name`, with its lines from `def` to its end."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            yield f"{path.as_posix()[path.as_posix().rindex('featx/') :]}:{node.name}", lines


def long_functions(root: Path = ROOT, most: int = 60) -> dict[str, int]:
    """The functions of the package that are longer than `most` lines."""
    return {
        name: lines
        for path in package_files(root)
        if path.suffix == ".py"
        for name, lines in functions(path)
        if lines > most
    }


def patches(path: Path) -> list[int]:
    """Line numbers where a test replaces one of featx's own names.

    `monkeypatch.setattr` and `setitem`, `mock.patch`, and assignments to an attribute of an imported featx module.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    modules: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "featx":
            modules |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            modules |= {(a.asname or a.name).split(".")[0] for a in node.names if a.name.split(".")[0] == "featx"}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            name, first = node.func.attr, node.args[0] if node.args else None
            by_monkeypatch = name in ("setattr", "setitem", "delattr") and isinstance(node.func.value, ast.Name)
            if (by_monkeypatch or name in ("patch", "object")) and first is not None and _is_ours(first, modules):
                found.append(node.lineno)
        elif isinstance(node, ast.Assign | ast.AugAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name | ast.Attribute):
                    root = _root(target.value)
                    if root in modules and root.islower():
                        found.append(node.lineno)
    return found


def _is_ours(node: ast.expr, modules: set[str]) -> bool:
    if isinstance(node, ast.Constant):
        return str(node.value).startswith("featx")
    return _root(node) in modules


def _root(node: ast.expr) -> str:
    while isinstance(node, ast.Attribute | ast.Call | ast.Subscript):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else ""


def all_patches(root: Path = ROOT) -> dict[str, int]:
    """How often each test file replaces a name of featx."""
    counted = {p.relative_to(root).as_posix(): len(patches(p)) for p in sorted((root / "tests").rglob("*.py"))}
    return {name: count for name, count in counted.items() if count}


if __name__ == "__main__":
    import sys

    given = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else ROOT
    sizes = {path: code_lines(path) for path in package_files(given)}
    print(f"code lines: {sum(sizes.values()):,} in {len(sizes)} files")
    print(f"functions over 60 lines: {len(long_functions(given))}")
    for name, lines in sorted(long_functions(given).items(), key=lambda item: -item[1]):
        print(f"  {lines}  {name}")
    print(f"patches of featx's names in tests: {sum(all_patches(given).values())}")
    for name, count in sorted(all_patches(given).items(), key=lambda item: -item[1]):
        print(f"  {count}  {name}")
