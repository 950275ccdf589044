"""Command-line settings, `--config.a.b=value`: how they are written, and one sentence for each that cannot be."""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Callable, Iterable
from typing import Any

from ml_collections import ConfigDict

from lmtrain.schema import ConfigError

#: What a group of fields may be set to as a whole, and which of its fields that sets.
WHOLE = {"--config.mesh=auto": "--config.mesh.auto=True"}

ARTICLE = {int: "a whole number", float: "a number", bool: "true or false", str: "text", tuple: "a tuple"}


def unknown(name: str, known: Iterable[str], of: str) -> str:
    """ "lrate is not a field of optim. Did you mean lr? (fields: ...)"."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, 1, 0.5)
    guess = f" Did you mean {near[0]}?" if near else ""
    more = f" and {len(known) - 60} more" if len(known) > 60 else ""
    return f"{name!r} is not {of}.{guess} (known: {', '.join(known[:60]) or 'none'}{more})"


def import_function(name: str, what: str) -> Callable[..., Any]:
    """The function that "package.module:function" names.

    Args:
      what: the setting that holds the name, for the error: "objective".

    Raises:
      ConfigError: the module does not import, whatever the reason, or has no such function.
    """
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute or module_name.startswith("."):
        raise ConfigError(f'{what} is {name!r}, but takes "package.module:function".')
    try:
        module = importlib.import_module(module_name)
    except Exception as e:
        raise ConfigError(f"{what} {name!r}: cannot import {module_name} ({type(e).__name__}: {e}).") from None
    if not hasattr(module, attribute):
        names = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
        raise ConfigError(f"{what} {name!r}: {unknown(attribute, names, f'in {module_name}')}")
    found = getattr(module, attribute)
    if not callable(found):
        raise ConfigError(f"{what} {name!r} is {type(found).__name__}, but takes a function.")
    return found


def parse(text: str, kind: type, where: str) -> Any:
    """Text as a bool, int, float or str; `where` names it in the error."""
    if kind is bool:
        if text.lower() in ("true", "1", "false", "0"):
            return text.lower() in ("true", "1")
    elif kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    else:
        return text
    raise ConfigError(f"{where} is {text!r}, but takes {ARTICLE[kind]}.")


def join_values(argv: list[str]) -> list[str]:
    """["--config.a", "1"] -> ["--config.a=1"], and refuses what is no override."""
    joined: list[str] = []
    i = 0
    while i < len(argv):
        if not re.match(r"--config\.", argv[i]):
            raise ConfigError(f"unknown argument {argv[i]!r}. Settings are given as --config.stages.NAME.field=value.")
        if "=" not in argv[i] and i + 1 < len(argv) and not argv[i + 1].startswith("--"):
            joined.append(f"{argv[i]}={argv[i + 1]}")
            i += 1
        else:
            joined.append(argv[i])
        i += 1
    return [WHOLE.get(flag, flag) for flag in joined]


def check_path(c: ConfigDict, flag: str) -> None:
    """Raises ConfigError where `--config.a.b=value` names no field of the configuration, or a group of them."""
    path, eq, value = WHOLE.get(flag, flag).removeprefix("--config.").partition("=")
    at: Any = c
    parts = path.split(".")
    for i, part in enumerate(parts):
        if not isinstance(at, ConfigDict):
            raise ConfigError(f"--config.{path}: {'.'.join(parts[:i])} is a {type(at).__name__}, which has no fields.")
        if part not in at:
            of = ".".join(parts[:i]) or "the experiment"
            hint = ""
            if i == 0 and len(c.get("stages", {})):  # --config.optim.lr: say which stage
                homes = [n for n, s in c.stages.items() if part in s]
                hint = f" A stage has it: --config.stages.{homes[0]}.{path}." if homes else ""
            raise ConfigError(f"--config.{path}: {unknown(part, at.keys(), f'a field of {of}')}.{hint}")
        at = at[part]
    if isinstance(at, ConfigDict):
        raise ConfigError(f"--config.{path} is a group of fields; set one of them: {', '.join(sorted(at.keys()))}.")
    if not eq and not isinstance(at, bool):
        raise ConfigError(f"--config.{path} has no value: write --config.{path}=VALUE.")


def explain(c: ConfigDict, overrides: list[str], error: Exception) -> str:
    """One sentence for what config_flags reports: field, what it got, what it takes."""
    for flag in overrides:
        path, _, value = flag.removeprefix("--config.").partition("=")
        at: Any = c
        for part in path.split("."):
            at = at[part]
        kind = type(at)
        if kind in (int, float, bool):
            try:
                parse(value, kind, "")
            except ConfigError:
                return f"--config.{path} is {value!r}, but takes {ARTICLE[kind]} (now {at!r})."
        if isinstance(at, tuple) and f"config.{path}" in str(error):
            return f"--config.{path} is {value!r}, but takes a tuple (now {at!r})."
    return f"settings: {error}"
