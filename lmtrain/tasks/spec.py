"""How a configuration names a task or a reward: "addition", "addition(digits=2)", "package.module:Class(n=3)"."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Callable, Iterable
from typing import Any

from lmtrain.types import LmtrainError, nearest


def parse(spec: str, what: str) -> tuple[str, dict[str, Any]]:
    """("addition", {"digits": 2}) of "addition(digits=2)". Values are Python literals.

    Args:
      what: "task" or "reward", for the error.

    Raises:
      LmtrainError: it is written otherwise.
    """
    if not isinstance(spec, str):
        raise LmtrainError(f"{what} is {spec!r}, but takes text, such as 'NAME' or 'NAME(setting=1)'.")
    name, bracket, rest = spec.strip().partition("(")
    name = name.strip()
    if not bracket:
        return name, {}
    try:
        call = ast.parse(f"f({rest}", mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise LmtrainError(
            f"{what} {spec!r}: {getattr(error, 'msg', error)}; write {name}(setting=1, other='x')."
        ) from None
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
        raise LmtrainError(f"{what} {spec!r}: settings have names; write {name}(setting=1, other='x').")
    settings: dict[str, Any] = {}
    for keyword in call.keywords:
        try:
            value = ast.literal_eval(keyword.value)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            text = ast.unparse(keyword.value)
            quoted = f"; text stands in quotes: {keyword.arg}={text!r}" if isinstance(keyword.value, ast.Name) else ""
            raise LmtrainError(
                f"{what} {spec!r}: {keyword.arg}={text} is no number, text, True or False{quoted}."
            ) from None
        if keyword.arg is None:
            raise LmtrainError(f"{what} {spec!r}: ** is not read; write each setting with its name.")
        settings[keyword.arg] = value
    return name, settings


def several(text: str) -> list[str]:
    """["a", "b(x=1, y=2)"] of "a, b(x=1, y=2)": cut at commas that stand in no bracket and no quotes."""
    out, depth, quote = [""], 0, ""
    for c in text:
        if quote:
            quote = "" if c == quote else quote
        elif c in "'\"":
            quote = c
        depth += 0 if quote else (c in "([{") - (c in ")]}")
        if c == "," and not depth and not quote:
            out.append("")
        else:
            out[-1] += c
    return [name.strip() for name in out if name.strip()]


def imported(name: str, spec: str, what: str) -> Any:
    """What "package.module:name" stands for.

    Raises:
      LmtrainError: the module does not import, or has no such name.
    """
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise LmtrainError(
            f"{what} {spec!r}: cannot import {module_name!r}: {type(error).__name__}: {error}"
        ) from error
    if not attribute or not hasattr(module, attribute):
        public = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
        raise LmtrainError(f"{what} {spec!r}: {module_name} has no {attribute!r}.{nearest(attribute, public)}")
    return getattr(module, attribute)


def check(function: Callable[..., Any], settings: dict[str, Any], spec: str, what: str, given: int = 0) -> None:
    """Refuses settings that `function` does not take by name, and values of another type than the default.

    Args:
      given: how many of the first parameters are not settings.

    Raises:
      LmtrainError: names the setting, what it got and what it takes.
    """
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # some built-in types have none
        return
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters)
    known = {p.name: p for p in parameters[given:] if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
    for name, value in settings.items():
        if name in known:
            _check_type(value, known[name].default, f"{what} {spec!r}: {name}")
        elif not open_ended:
            takes = ", ".join(n if p.default is p.empty else f"{n}={p.default!r}" for n, p in known.items())
            raise LmtrainError(
                f"{what} {spec!r}: {name!r} is no setting of it.{nearest(name, known)} (settings: {takes or 'none'})"
            )


def _check_type(value: Any, default: Any, where: str) -> None:
    """Raises LmtrainError where a value is of another type than the default; a whole number will do for a float."""
    takes = {
        bool: "True or False", int: "a whole number", float: "a number", str: "text in quotes",
        tuple: "a list in brackets, such as ('a', 'b')",
    }.get(type(default))  # fmt: skip
    right = {float: (int, float), tuple: (tuple, list)}.get(type(default), type(default))
    if takes and (not isinstance(value, right) or isinstance(value, bool) is not isinstance(default, bool)):
        raise LmtrainError(f"{where} is {value!r}, but takes {takes} (default {default!r}).")


def unknown(name: str, known: Iterable[str], what: str) -> LmtrainError:
    """The error for a name that there is not."""
    known = sorted(known)
    return LmtrainError(
        f"{what} {name!r} is not known.{nearest(name, known)} (known: {', '.join(known)}; or 'package.module:name')"
    )
