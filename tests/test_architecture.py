"""Who may import whom. A room that reaches where it should not is found here, before it becomes a habit."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
BASE = {"types", "schema", "flags", "limits", "config", "mesh", "storage", "log"}
ROOMS = {
    "types": set(),
    "schema": {"types"},
    "flags": {"types", "schema"},
    "limits": {"types", "schema", "flags"},
    "config": {"types", "schema", "flags", "limits"},
    "mesh": {"types", "schema"},
    "storage": {"types"},
    "log": {"types", "schema", "mesh", "storage"},
    "compilation": set(),
    "profiling": {"schema", "log"},
    "data": BASE,
    "models": BASE,
    "optim": BASE,
    "objectives": {"types", "schema"},
    "partial": {"types", "schema"},
    "step": {"types", "schema", "mesh", "optim", "partial"},
    "manifest": {"types", "log", "storage"},
    "bucket": {"types", "manifest", "storage"},
    "scattered": {"types", "mesh", "manifest", "storage", "stored", "bucket"},
    "nearby": {"manifest"},
    "stored": {"types"},
    "checkpoint": {"types", "schema", "mesh", "optim", "log", "manifest", "nearby", "stored", "scattered"},
    "engine": BASE | {"models"},
    "interop": BASE | {"data", "models", "tasks", "sandbox"},
    "sandbox": {"types"},
    "tasks": BASE | {"data", "sandbox"},
    "rollout": BASE | {"engine", "tasks", "data", "models", "objectives.common"},
    # An evaluation plays the conversations that training plays.
    "eval": BASE | {"engine", "tasks", "data", "models", "objectives.common", "rollout"},
    # It keeps evaluation rows out of what is trained on, and lets a trained model write some of that.
    "prepare": BASE | {"data", "tasks", "rollout", "eval", "engine", "runs", "record", "evaluate", "compilation"},
    "goodput": {"storage"},
    "hosts": BASE | {"scattered"},
    "train": BASE
    | {
        "compilation",
        "goodput",
        "hosts",
        "profiling",
        "nearby",
        "data",
        "models",
        "objectives",
        "optim",
        "partial",
        "step",
        "checkpoint",
        "engine",
        "eval",
        "rollout",
        "tasks",
    },
}
ANYTHING = {
    "experiment",
    "preflight",
    "feeds",
    "scoring",
    "evaluate",
    "record",
    "remote",
    "runs",
    "resume",
    "origins",
    "publish",
    "helps",
    "terminal",
    "cli",
    "report",
    "bench",
    "bench_post",
    "bench_arguments",
    "plan",
    "serve",
    "__init__",
    "__main__",
}
# Read when they are called, so that a configuration can name a preset, and data a task whose demonstrations it is.
LAZY = {("config", "models.presets"), ("config", "origins"), ("data", "tasks")}


def imports(file):
    """(room of the importer, dotted path inside lmtrain of what it imports)."""
    inside = file.relative_to(ROOT / "lmtrain").with_suffix("")
    room = inside.parts[0]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "lmtrain":
            base = node.module.split(".")[1:]
            for name in node.names:
                yield room, ".".join([*base, name.name])
        elif isinstance(node, ast.Import):
            for name in node.names:
                if name.name.split(".")[0] == "lmtrain":
                    yield room, ".".join(name.name.split(".")[1:])


FILES = sorted((ROOT / "lmtrain").rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_a_room_imports_only_what_it_may(file):
    for room, target in imports(file):
        to = target.split(".")[0]
        if room in ANYTHING or to == room or (room, target) in LAZY:
            continue
        assert room in ROOMS, f"{file}: the room {room!r} has no rule; give it one in this test"
        allowed = any(target == a or target.startswith(f"{a}.") for a in ROOMS[room])
        assert allowed, f"{file}: {room} may not import lmtrain.{target}"


def test_experiments_are_never_imported_by_the_package():
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [n.name for n in node.names] if isinstance(node, ast.Import) else []
            assert not any(n.split(".")[0] in ("experiments", "tests") for n in names), file


def test_no_file_is_longer_than_a_sitting():
    long = {str(f.relative_to(ROOT)): n for f in FILES if (n := len(f.read_text().splitlines())) > 500}
    assert not long


def test_nothing_knows_the_machine_it_was_written_on():
    for file in [*FILES, *ROOT.glob("*.*"), *ROOT.glob("experiments/*"), *ROOT.glob("tests/**/*.py")]:
        if file.is_file() and file != pathlib.Path(__file__):
            text = file.read_text(errors="replace")
            assert "/work/" not in text and "/root/" not in text, file
