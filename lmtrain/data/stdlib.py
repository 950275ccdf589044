"""The embedded corpus: documentation and source text of the Python that runs this, read from its own files.

Nothing is imported or run: documentation is rendered from syntax trees, laid out as help() does it.
"""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

PARTS = ("docs", "source", "")
_LEFT_OUT = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "pydoc_data"}


def files() -> list[tuple[str, Path]]:
    """(dotted name, path) of every module of the standard library, tests left out; and the topics of help(). Sorted."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        if not _LEFT_OUT.intersection(parts) and all(part.isidentifier() for part in parts):
            found.append((".".join(parts).removesuffix(".__init__"), path))
    topics = root / "pydoc_data" / "topics.py"
    return sorted(found) + ([("pydoc_data.topics", topics)] if topics.is_file() else [])


def documents(part: str) -> Iterator[tuple[str, str | bytes, bytes]]:
    """(name, text, key) of every document of "docs", "source" or "" (both).

    A module's documentation and source have one key, the source: together they are trained on, or together held out.
    """
    for name, path in files():
        source = path.read_bytes()
        if name == "pydoc_data.topics":
            if part != "source":
                yield from ((f"topic {topic}", text, text.encode()) for topic, text in _topics(source))
            continue
        if part != "source" and (text := render(name, source)):
            yield f"help {name}", text, source
        if part != "docs" and source.strip():
            yield f"source {name}", source, source


def _topics(source: bytes) -> list[tuple[str, str]]:
    """What help("TOPIC") shows: pydoc_data/topics.py is one dict literal."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            return sorted(ast.literal_eval(node.value).items())
    return []


def render(name: str, source: bytes) -> str:
    """help(module) from its source text; "" where it does not parse or documents nothing."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):  # lib2to3 and encodings keep files of other versions
        return ""
    summary, _, description = (ast.get_docstring(tree) or "").partition("\n")
    public = _exported(tree)
    definitions = [node for node in tree.body if isinstance(node, ast.ClassDef | _FUNCTION) and public(node.name)]
    definitions.sort(key=lambda node: node.name)
    classes = [_class(node) for node in definitions if isinstance(node, ast.ClassDef)]
    functions = [_function(node) for node in definitions if isinstance(node, _FUNCTION)]
    if not summary and not any(ast.get_docstring(node) for node in definitions):
        return ""
    sections = [("NAME", f"{name} - {summary}" if summary else name)]
    sections += [("DESCRIPTION", description.strip("\n"))] if description.strip() else []
    sections += [("CLASSES", "\n\n".join(classes))] if classes else []
    sections += [("FUNCTIONS", "\n\n".join(functions))] if functions else []
    body = "\n\n".join(f"{title}\n{_indent(text, '    ')}" for title, text in sections)
    return f"Help on module {name}:\n\n{body}\n"


_FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef


def _exported(tree: ast.Module) -> Callable[[str], bool]:
    """A test of names: those of __all__ where it is a literal, else those without a leading underscore."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            try:
                names = set(ast.literal_eval(node.value))
            except ValueError:
                break
            return names.__contains__
    return lambda name: not name.startswith("_")


def _class(node: ast.ClassDef) -> str:
    bases = ", ".join(ast.unparse(base) for base in node.bases) or "builtins.object"
    defined = [n for n in node.body if isinstance(n, _FUNCTION)]
    methods = [n for n in defined if not n.name.startswith("_") or ast.get_docstring(n)]
    parts = [ast.get_docstring(node) or ""]
    if methods:
        methods.sort(key=lambda n: n.name)
        parts += ["Methods defined here:", *map(_function, methods)]
    return f"class {node.name}({bases})\n" + _indent("\n\n".join(filter(None, parts)), " |  ")


def _function(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    prefix = "async " if isinstance(node, ast.AsyncFunctionDef) else ""
    head = f"{prefix}{node.name}({ast.unparse(node.args)}){returns}"
    text = ast.get_docstring(node)
    return f"{head}\n{_indent(text, '    ')}" if text else head


def _indent(text: str, prefix: str) -> str:
    return "\n".join((prefix + line).rstrip() for line in text.splitlines())
