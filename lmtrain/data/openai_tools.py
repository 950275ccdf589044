"""Tools as OpenAI's fine-tuning files define and call them.

"tools": [{"type": "function", "function": {"name": ..., "description": ..., "parameters": JSON schema, "strict": ...}}]
"functions": [{"name": ..., "description": ..., "parameters": JSON schema}]      the older form
"parallel_tool_calls": false        an assistant's message calls one tool at most
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lmtrain.data import strict
from lmtrain.data.files import short
from lmtrain.data.messages import Unusable
from lmtrain.types import nearest

_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")


@dataclasses.dataclass(frozen=True)
class Tools:
    """What a line lets the assistant call.

    Attributes:
      listed: the definitions in the newer form, whichever the line has.
      names: that tool_calls may have.
      functions: that function_call may have.
      parallel: whether one message may call several.
    """

    listed: tuple[dict[str, Any], ...] = ()
    names: tuple[str, ...] = ()
    functions: tuple[str, ...] = ()
    parallel: bool = True


# ------------------------------------------------------------------------------------------------------------- values
def json_type(value: Any) -> str:
    """What a value is, in JSON's terms."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else "true or false"
    kinds = {"text": str, "a number": int | float, "a list": list, "an object": Mapping}
    return next((name for name, kind in kinds.items() if isinstance(value, kind)), type(value).__name__)


def members(value: Any, at: str, needed: Sequence[str], optional: Sequence[str] = ()) -> dict[str, Any]:
    """An object's fields; null ones are left out.

    Raises:
      Unusable: no object, a field that it does not take, or one that it lacks.
    """
    if not isinstance(value, Mapping):
        raise Unusable("wrong type", f"{at} is {json_type(value)}, takes an object with {', '.join(needed)}")
    takes = (*needed, *optional)
    for name in value:
        if name not in takes:
            what = f"{at}.{short(name, 60)}" if at else short(name, 60)
            raise Unusable("unknown field", f"{what}; there are {', '.join(takes)}.{nearest(name, takes)}")
    found = {name: field for name, field in value.items() if field is not None}
    for name in needed:
        if name not in found:
            got = "it is null" if name in value else f"it has {short(', '.join(value)) or 'nothing'}"
            raise Unusable("missing field", f"{at or 'the line'} has no {name}: {got}")
    return found


def text(value: Any, at: str) -> str:
    """`value` where it is text that says something. Raises Unusable."""
    if not isinstance(value, str):
        raise Unusable("wrong type", f"{at} is {json_type(value)}, takes text")
    if not value.strip():
        raise Unusable("wrong type", f"{at} is empty text")
    return value


def true_or_false(value: Any, at: str) -> bool:
    """`value` where it is one of the two. Raises Unusable."""
    if not isinstance(value, bool):
        raise Unusable("wrong type", f"{at} is {short(repr(value), 60)}, takes true or false")
    return value


# -------------------------------------------------------------------------------------------------------- definitions
def read(row: Mapping[str, Any], at: str = "") -> Tools:
    """The tools of a line, or of its `input`.

    Args:
      at: what stands before the fields' names in errors: "input.".

    Raises:
      Unusable: a definition that is none; names the place and what was expected.
    """
    parallel = row.get("parallel_tool_calls")
    if parallel is not None:
        true_or_false(parallel, f"{at}parallel_tool_calls")
    given, older = row.get("tools"), row.get("functions")
    if given and older:
        raise Unusable("unusable tool", f"{at}tools and {at}functions are both there; functions is the older form")
    functions = []
    for k, tool in enumerate(_list(given, f"{at}tools")):
        here = f"{at}tools[{k}]"
        fields = members(tool, here, ("type", "function"))
        if fields["type"] != "function":
            raise Unusable("unusable tool", f"{here}.type is {short(repr(fields['type']), 60)}, takes 'function'")
        functions.append(_function(fields["function"], f"{here}.function"))
    legacy = [_function(f, f"{at}functions[{k}]") for k, f in enumerate(_list(older, f"{at}functions"))]
    for where, named in (("tools", functions), ("functions", legacy)):
        names = [function["name"] for function in named]
        if twice := [name for name in names if names.count(name) > 1]:
            raise Unusable("a tool twice", f"{at}{where} define {twice[0]!r} {names.count(twice[0])} times")
    return Tools(
        tuple({"type": "function", "function": function} for function in functions or legacy),
        tuple(function["name"] for function in functions),
        tuple(function["name"] for function in legacy),
        parallel is not False,
    )


def _list(given: Any, at: str) -> list[Any]:
    if given is not None and not isinstance(given, list):
        raise Unusable("wrong type", f"{at} is {json_type(given)}, takes a list")
    return given or []


def _function(given: Any, at: str) -> dict[str, Any]:
    fields = members(given, at, ("name",), ("description", "parameters", "strict"))
    if not isinstance(fields["name"], str) or not _NAME.fullmatch(fields["name"]):
        got = short(repr(fields["name"]), 80)
        raise Unusable("unusable tool", f"{at}.name is {got}, takes up to 64 letters, digits, _ and -")
    if "description" in fields and not isinstance(fields["description"], str):
        raise Unusable("wrong type", f"{at}.description is {json_type(fields['description'])}, takes text")
    if "strict" in fields:
        true_or_false(fields["strict"], f"{at}.strict")
    if "parameters" in fields:
        _check_parameters(fields["parameters"], f"{at}.parameters")
    return fields


def _check_parameters(given: Any, at: str) -> None:
    """A JSON schema of an object; {} is a function that takes nothing."""
    _check_schema(given, at)
    if given and (not isinstance(given, Mapping) or given.get("type") != "object"):
        got = short(repr(given.get("type") if isinstance(given, Mapping) else given), 60)
        raise _no_schema(f"{at}.type is {got}, takes 'object': arguments have names")


def _check_schema(given: Any, at: str) -> None:
    """The keywords of JSON Schema that hold schemas, types or names; others may hold what they like."""
    if isinstance(given, bool):
        return
    if not isinstance(given, Mapping):
        raise _no_schema(f"{at} is {json_type(given)}, takes an object")
    types = given.get("type", [])
    for kind in types if isinstance(types, list) else [types]:
        if not isinstance(kind, str) or kind not in _TYPES:
            hint = nearest(kind, _TYPES) if isinstance(kind, str) else ""
            raise _no_schema(f"{at}.type is {short(repr(kind), 60)}, takes {', '.join(_TYPES)}.{hint}")
    for word in ("properties", "$defs", "definitions"):
        if word in given:
            if not isinstance(given[word], Mapping):
                raise _no_schema(f"{at}.{word} is {json_type(given[word])}, takes an object of schemas")
            for name, schema in given[word].items():
                _check_schema(schema, f"{at}.{word}.{short(name, 60)}")
    for word in ("items", "additionalProperties", "not"):
        if word in given:
            _check_schema(given[word], f"{at}.{word}")
    for word in ("anyOf", "oneOf", "allOf", "prefixItems"):
        if word in given:
            for k, schema in enumerate(_filled(given[word], f"{at}.{word}", "schemas")):
                _check_schema(schema, f"{at}.{word}[{k}]")
    if "enum" in given:
        _filled(given["enum"], f"{at}.enum", "values")
    required = given.get("required", [])
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise _no_schema(f"{at}.required is {short(repr(required), 60)}, takes a list of names")


def _filled(given: Any, at: str, what: str) -> list[Any]:
    if not isinstance(given, list) or not given:
        got = "an empty list" if given == [] else json_type(given)
        raise _no_schema(f"{at} is {got}, takes a list of {what}")
    return given


def _no_schema(detail: str) -> Unusable:
    return Unusable("parameters are no JSON schema", detail)


# -------------------------------------------------------------------------------------------------------------- calls
def calls(given: Any, at: str, tools: Tools) -> tuple[list[dict[str, str]], list[str]]:
    """The calls of an assistant's `tool_calls` as lmtrain has them, and their ids.

    Raises:
      Unusable: names the call, what it has and what it takes.
    """
    if not isinstance(given, list) or not given:
        got = "an empty list" if given == [] else json_type(given)
        raise Unusable("unusable tool call", f"{at} is {got}, takes a list of calls; leave it out where there are none")
    found, ids = [], []
    for k, item in enumerate(given):
        here = f"{at}[{k}]"
        fields = members(item, here, ("id", "type", "function"))
        if fields["type"] != "function":
            raise Unusable("unusable tool call", f"{here}.type is {short(repr(fields['type']), 60)}, takes 'function'")
        name = text(fields["id"], f"{here}.id")
        if name in ids:
            raise Unusable("an id twice", f"{here}.id is {short(name)!r}, and so is an earlier call's")
        found.append(call(fields["function"], f"{here}.function", tools.names, "tools"))
        ids.append(name)
    if len(found) > 1 and not tools.parallel:
        raise Unusable("calls in parallel", f"{at} has {len(found)} calls, but parallel_tool_calls is false")
    return found, ids


def call(given: Any, at: str, names: Iterable[str], where: str) -> dict[str, str]:
    """{"name", "arguments"} of a call of one of `names`, which the line's field `where` defines. Raises Unusable."""
    fields = members(given, at, ("name", "arguments"))
    name, arguments = text(fields["name"], f"{at}.name"), fields["arguments"]
    names = list(names)
    if not names:
        raise Unusable("a call without tools", f"{at}.name is {short(name)!r}, but the line defines no {where}")
    if name not in names:
        hint = nearest(name, names)
        raise Unusable("unknown tool", f"{at}.name is {short(name)!r}; {where} are {short(', '.join(names))}.{hint}")
    if not isinstance(arguments, str):
        raise Unusable(
            "unusable arguments", f"{at}.arguments is {json_type(arguments)}, takes an object's JSON as text"
        )
    try:
        value = strict.parse(arguments)
    except Unusable as error:
        raise Unusable("unusable arguments", f"{at}.arguments: {error.reason}: {error.detail}") from None
    if not isinstance(value, dict):
        raise Unusable(
            "unusable arguments", f"{at}.arguments is the JSON of {json_type(value)}, takes that of an object"
        )
    return {"name": name, "arguments": arguments}
