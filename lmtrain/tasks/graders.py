"""Graders as OpenAI's reinforcement fine-tuning has them: JSON that says what a reply is worth, 0 to 1.

    string_check      input, reference, operation: eq | ne | like | ilike           1 or 0
    text_similarity   input, reference, evaluation_metric                           similarity.py
    python            source, which defines grade(sample, item)                     run in the sandbox
    multi             graders: {NAME: grader}, calculate_output: a formula of names  formula.py

`input` and `reference` are templates (templates.py). A grade that there is not (a reply without the JSON that a
template reads, a program that raises) is 0; one outside 0 to 1 is cut to it.
"""

from __future__ import annotations

import abc
import ast
import json
import keyword
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lmtrain import sandbox
from lmtrain.data import strict
from lmtrain.data.files import content, find, short
from lmtrain.data.messages import Message, Unusable
from lmtrain.data.openai_tools import json_type
from lmtrain.tasks import templates
from lmtrain.tasks.formula import FUNCTIONS, Formula
from lmtrain.tasks.similarity import metrics
from lmtrain.types import LmtrainError, nearest

TYPES = ("string_check", "text_similarity", "python", "multi")
_OPERATIONS = ("eq", "ne", "like", "ilike")
_LONGEST = 256_000  # bytes of a program, as OpenAI has it
_ASKS_A_MODEL = (
    "it asks a model of OpenAI's. Train a reward model and let it take part: rollout.rewards=('score', 'model(RUN)')"
)


class Grade(NamedTuple):
    """A grade, and why there is none where it stands for one that could not be given ("" where it could)."""

    value: float
    fault: str = ""


class Grader(abc.ABC):
    """What a reply is worth."""

    @abc.abstractmethod
    def grade(self, sample: Mapping[str, Any], item: Mapping[str, Any]) -> Grade:
        """Of a reply (`sample_of`) to a row."""

    @abc.abstractmethod
    def paths(self) -> Iterator[templates.Path]:
        """What it reads of a row and of a reply."""

    def check(self, item: Mapping[str, Any]) -> None:
        """Raises Unusable where a row lacks a field that the grader reads."""
        for path in self.paths():
            if path.space == "item":
                try:
                    path.find(item)
                except templates.Missing as missing:
                    raise Unusable("no field for the grader", f"it reads {path}; {missing}") from None

    def score(self, message: Message, item: Mapping[str, Any]) -> Grade:
        """The grade of an assistant's message, cut to 0 to 1."""
        value, fault = self.grade(sample_of(message), item)
        return Grade(min(1.0, max(0.0, value)), fault)


def sample_of(message: Message) -> dict[str, Any]:
    """What a grader may read of an assistant's message: output_text, output_json (where the text is that of an object
    or a list, else null), output_tools, choices."""
    text = message.get("content") or ""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    tools = [
        {"id": f"call_{k}", "type": "function", "function": {"name": c["name"], "arguments": c["arguments"]}}
        for k, c in enumerate(message.get("tool_calls") or ())
    ]
    said = {"role": "assistant", "content": text, **({"tool_calls": tools} if tools else {})}
    return {
        "output_text": text, "output_json": value if isinstance(value, dict | list) else None, "output_tools": tools,
        "choices": [{"index": 0, "finish_reason": "tool_calls" if tools else "stop", "message": said}],
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ the kinds
class StringCheck(Grader):
    """Whether two texts are equal, or the first has the second in it."""

    def __init__(self, given: dict[str, Any], at: str) -> None:
        self.input, self.reference = (
            templates.Template(given[name], f"{at}.{name}") for name in ("input", "reference")
        )
        self.operation = _one_of(given["operation"], _OPERATIONS, f"{at}.operation")

    def paths(self) -> Iterator[templates.Path]:
        yield from (*self.input.paths, *self.reference.paths)

    def grade(self, sample: Mapping[str, Any], item: Mapping[str, Any]) -> Grade:
        try:
            text, reference = (template.fill(sample, item) for template in (self.input, self.reference))
        except templates.Missing:
            return Grade(0.0)
        if self.operation in ("eq", "ne"):
            return Grade(float((text == reference) == (self.operation == "eq")))
        if self.operation == "ilike":
            text, reference = text.casefold(), reference.casefold()
        return Grade(float(reference in text))


class TextSimilarity(Grader):
    """How alike two texts are."""

    def __init__(self, given: dict[str, Any], at: str) -> None:
        self.input, self.reference = (
            templates.Template(given[name], f"{at}.{name}") for name in ("input", "reference")
        )
        name = given["evaluation_metric"]
        if name == "cosine":
            raise LmtrainError(
                f"{at}.evaluation_metric is 'cosine', which needs OpenAI's embeddings; takes {', '.join(metrics())}"
            )
        self.metric = metrics()[_one_of(name, tuple(metrics()), f"{at}.evaluation_metric")]

    def paths(self) -> Iterator[templates.Path]:
        yield from (*self.input.paths, *self.reference.paths)

    def grade(self, sample: Mapping[str, Any], item: Mapping[str, Any]) -> Grade:
        try:
            return Grade(self.metric(self.input.fill(sample, item), self.reference.fill(sample, item)))
        except templates.Missing:
            return Grade(0.0)


# What the program prints goes nowhere, so that its last word, the grade, is all that comes out.
_RUN = """
import contextlib, io, json, sys
source, sample, item = json.load(sys.stdin)
names = {"__name__": "grader"}
with contextlib.redirect_stdout(io.StringIO()):
    exec(compile(source, "grader.py", "exec"), names)
    grade = names["grade"](sample, item)
print(json.dumps(float(grade) if isinstance(grade, (int, float)) else {"type": type(grade).__name__}))
"""


class Python(Grader):
    """A program's function grade(sample, item), in the sandbox: the standard library, one thread, no network."""

    def __init__(self, given: dict[str, Any], at: str, limits: sandbox.Limits) -> None:
        self.source, self.limits = given["source"], limits
        if len(self.source.encode("utf-8", "surrogatepass")) >= _LONGEST:
            raise LmtrainError(f"{at}.source has {len(self.source):,} characters, takes fewer than {_LONGEST:,} bytes")
        try:
            tree = ast.parse(self.source)
        except SyntaxError as error:
            raise LmtrainError(f"{at}.source, line {error.lineno}: {error.msg}") from None
        except (ValueError, MemoryError, RecursionError) as error:
            raise LmtrainError(f"{at}.source: {short(str(error)) or type(error).__name__}") from None
        self._function = _grade_function(tree, f"{at}.source")
        foreign = sorted(_imported(tree) - sys.stdlib_module_names)
        if foreign:
            raise LmtrainError(f"{at}.source imports {', '.join(foreign)}; the sandbox has the standard library alone")
        sandbox.run("", limits=limits)  # refuses here, not in training, where programs cannot be locked in

    def paths(self) -> Iterator[templates.Path]:
        """The fields that the function takes by item["FIELD"], whatever happens; what it asks for first may lack."""
        if self._function is None:
            return
        given = self._function.args
        name = (given.posonlyargs + given.args)[1].arg
        asked = {
            node.left.value
            for node in ast.walk(self._function)
            if isinstance(node, ast.Compare)
            and isinstance(node.left, ast.Constant)
            and isinstance(node.left.value, str)
        }
        for node in _outside_try(self._function):
            if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id == name:
                key = node.slice
                if isinstance(node.ctx, ast.Load) and isinstance(key, ast.Constant) and isinstance(key.value, str):
                    if key.value not in asked:
                        yield templates.Path("item", (key.value,))

    def grade(self, sample: Mapping[str, Any], item: Mapping[str, Any]) -> Grade:
        result = sandbox.run(_RUN, json.dumps([self.source, sample, item]), self.limits)
        if result.error:
            return Grade(0.0, result.error)
        if not result.output:
            return Grade(0.0, "the program ended before grade returned")
        value = json.loads(result.output)
        if isinstance(value, dict):
            return Grade(0.0, f"grade returned {value['type']}, takes a number")
        return Grade(value) if math.isfinite(value) else Grade(0.0, f"grade returned {value}")


class Multi(Grader):
    """A formula of the grades of others."""

    def __init__(self, given: dict[str, Any], at: str, limits: sandbox.Limits) -> None:
        graders = given["graders"]
        if not isinstance(graders, dict) or not graders:
            raise LmtrainError(f"{at}.graders is {json_type(graders)}, takes an object with a grader or more")
        for name, grader in graders.items():
            if not name.isidentifier() or keyword.iskeyword(name) or name in FUNCTIONS:
                raise LmtrainError(f"{at}.graders: {short(name)!r} cannot stand in a formula; take another name")
            if isinstance(grader, dict) and grader.get("type") == "multi":
                raise LmtrainError(
                    f"{at}.graders.{name} is a multi grader in another one, which the format does not have"
                )
        self.graders = {name: make(grader, f"{at}.graders.{name}", limits) for name, grader in graders.items()}
        try:
            self.formula = Formula(given["calculate_output"], self.graders)
        except LmtrainError as error:
            raise LmtrainError(f"{at}.calculate_output: {error}") from None

    def paths(self) -> Iterator[templates.Path]:
        for grader in self.graders.values():
            yield from grader.paths()

    def grade(self, sample: Mapping[str, Any], item: Mapping[str, Any]) -> Grade:
        grades = {name: grader.grade(sample, item) for name, grader in self.graders.items()}
        faults = [f"{name}: {grade.fault}" for name, grade in grades.items() if grade.fault]
        try:
            value = self.formula({name: grade.value for name, grade in grades.items()})
        except LmtrainError as error:
            return Grade(0.0, "; ".join([*faults, f"calculate_output: {error}"]))
        return Grade(value, "; ".join(faults))


# -------------------------------------------------------------------------------------------------------------- reading
#: type -> (fields that it needs, fields that it may have). The second change no grade: a name, an evaluation's
#: threshold, the packages of OpenAI's machines.
_FIELDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "string_check": (("input", "reference", "operation"), ("name",)),
    "text_similarity": (("input", "reference", "evaluation_metric"), ("name", "pass_threshold")),
    "python": (("source",), ("name", "image_tag", "pass_threshold")),
    "multi": (("graders", "calculate_output"), ("name",)),
}


def load(path: str, limits: sandbox.Limits | None = None) -> Grader:
    """The grader of a file.

    Args:
      limits: of one run of a python grader; None: the sandbox's own.

    Raises:
      LmtrainError: no such file, or a grader that is none; names the file, the field, what it has and what it takes.
    """
    files = find(path, "grader")
    if len(files) != 1:
        raise LmtrainError(f"grader: {path} stands for {len(files)} files, takes one")
    try:
        text = content(files[0]).decode("utf-8-sig")
        return make(strict.parse(text), "grader", limits or sandbox.Limits(), whole=True)
    except UnicodeDecodeError:
        raise LmtrainError(f"{files[0]}: not UTF-8") from None
    except LmtrainError as error:
        raise LmtrainError(f"{Path(path)}: {error}") from None


def make(given: Any, at: str, limits: sandbox.Limits, whole: bool = False) -> Grader:
    """The grader that an object describes.

    Args:
      at: what errors call it.
      whole: it is not a part of another, so it must read something of the reply.

    Raises:
      LmtrainError: names the field, what it has and what it takes.
    """
    if not isinstance(given, dict):
        raise LmtrainError(f"{at} is {json_type(given)}, takes an object with type: {', '.join(TYPES)}")
    kind = given.get("type")
    if kind in ("score_model", "label_model"):
        raise LmtrainError(f"{at}.type is {kind!r}: {_ASKS_A_MODEL}. Takes {', '.join(TYPES)}")
    if "type" not in given:
        raise LmtrainError(f"{at} has no type{nearest('type', given)} ({', '.join(TYPES)})")
    kind = _one_of(kind, TYPES, f"{at}.type")
    needed, optional = _FIELDS[kind]
    for name in given:
        if name not in ("type", *needed, *optional):
            takes = ("type", *needed, *optional)
            raise LmtrainError(f"{at}.{short(name)} is no field of {kind}.{nearest(name, takes)} ({', '.join(takes)})")
    for name in needed:
        if name not in given:
            raise LmtrainError(f"{at} ({kind}) has no {name}; it takes {', '.join(needed)}")
    for name, value in given.items():
        _check_type(name, value, f"{at}.{name}")
    made = {"string_check": StringCheck, "text_similarity": TextSimilarity}.get(kind)
    grader: Grader = made(given, at) if made else {"python": Python, "multi": Multi}[kind](given, at, limits)
    if whole and not _reads_the_reply(grader):
        raise LmtrainError(
            f"{at} reads nothing of the reply, so every reply gets one grade; write {{{{sample.output_text}}}}"
        )
    return grader


def _check_type(name: str, value: Any, at: str) -> None:
    if name == "pass_threshold":
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise LmtrainError(f"{at} is {json_type(value)}, takes a number")
    elif name not in ("type", "graders") and not isinstance(value, str):
        raise LmtrainError(f"{at} is {json_type(value)}, takes text")


def _one_of(value: Any, takes: tuple[str, ...], at: str) -> str:
    if not isinstance(value, str) or value not in takes:
        hint = nearest(value, takes) if isinstance(value, str) else ""
        raise LmtrainError(f"{at} is {short(repr(value), 80)}, takes {', '.join(takes)}.{hint}")
    return value


def _reads_the_reply(grader: Grader) -> bool:
    if isinstance(grader, Multi):
        return any(map(_reads_the_reply, grader.graders.values()))
    return isinstance(grader, Python) or any(path.space == "sample" for path in grader.paths())


def _grade_function(tree: ast.Module, at: str) -> ast.FunctionDef | None:
    """`grade` as the source defines it; None where it is no `def` but assigned or imported."""
    found = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "grade"]
    if found:
        given = found[-1].args
        if len(given.posonlyargs + given.args) != 2 or None in given.kw_defaults:
            raise LmtrainError(f"{at}, line {found[-1].lineno}: grade takes two arguments, (sample, item)")
        return found[-1]
    stored = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    froms = [alias for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names]
    if "grade" not in stored | {alias.asname or alias.name for alias in froms}:
        names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        raise LmtrainError(f"{at} defines no function grade(sample, item).{nearest('grade', names)}")
    return None


def _imported(tree: ast.AST) -> set[str]:
    """The packages that a program imports, but for those that it tries to."""
    found = set()
    for node in _outside_try(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found


def _outside_try(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, ast.Try):
            yield node
            yield from _outside_try(node)
