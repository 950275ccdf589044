"""Arithmetic with a tool: the model asks a calculator and says what it answered.

An assistant's turn that calls `calculator` is followed by a tool message with the result, or with what is wrong:

    user       What is 37*48-5?
    assistant  calls calculator with 37*48-5
    tool       1771
    assistant  1771
"""

from __future__ import annotations

import ast
import json
import math
import operator
import random
from collections.abc import Callable, Sequence
from typing import Any

from lmtrain.tasks import numbers
from lmtrain.tasks.generated import Generated, Message, Row, assistant, number, user
from lmtrain.types import LmtrainError

CALLS = 4  # turns with calls, after which nobody answers any more
_LONGEST, _DIGITS = 200, 40  # characters of an expression, digits of a number
_OPERATORS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow,
    ast.UAdd: operator.pos, ast.USub: operator.neg,
}  # fmt: skip


def evaluate(expression: str) -> int | float:
    """The value of an expression of numbers, + - * / // % ** and brackets. Nothing is executed.

    Raises:
      LmtrainError: anything else in it, too long, no real number, or a number of more than 40 digits on the way.
    """
    if len(expression) > _LONGEST:
        raise LmtrainError(f"longer than {_LONGEST} characters")
    try:
        tree = ast.parse(expression.strip(), mode="eval")
        return _value(tree.body)
    except ZeroDivisionError:
        raise LmtrainError("division by zero") from None
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise LmtrainError("not an expression") from None
    except OverflowError:
        raise LmtrainError("too large") from None


def _value(node: ast.expr) -> int | float:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool):
        return _bounded(node.value)
    if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.operand))
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Pow) and abs(left) > 1 and abs(right) * math.log10(abs(left)) > _DIGITS:
            raise LmtrainError("too large")  # before it is computed: 9**9**9 has 369 million digits
        return _bounded(_OPERATORS[type(node.op)](left, right))
    raise LmtrainError("takes numbers, + - * / // % ** and brackets")


def _bounded(value: int | float | complex) -> int | float:
    if isinstance(value, complex) or not abs(value) < 10**_DIGITS:
        raise LmtrainError("too large, or no real number")
    return value


def calculate(arguments: str) -> str:
    """What the tool says to a call: the value (a whole one without a point), or "error: ...".

    Args:
      arguments: the expression, or {"expression": "..."} as JSON.
    """
    if arguments.lstrip().startswith("{"):
        try:
            given = json.loads(arguments)
        except (ValueError, RecursionError):
            given = None
        if not isinstance(given, dict) or not isinstance(given.get("expression"), str):
            return 'error: takes {"expression": "1+2"}'
        arguments = given["expression"]
    try:
        value = evaluate(arguments)
    except LmtrainError as error:
        return f"error: {error}"
    return str(int(value)) if value == int(value) else f"{value:.10g}"


class Calculator(Generated):
    """Questions of `terms` whole numbers of up to `digits` digits, too large to be worked out by the model itself."""

    name = "calculator"
    max_tokens = 40

    def __init__(self, terms: int = 3, digits: int = 3, seed: int = 0):
        super().__init__(seed)
        self.terms, self.digits = number("terms", terms, 2, 6), number("digits", digits, 1, 6)

    def draw(self, rng: random.Random) -> Row:
        text = ""
        for i in range(self.terms):
            text += (rng.choice("+-*") if i else "") + str(rng.randrange(1, 10 ** rng.randint(1, self.digits)))
        if self.terms > 2 and rng.random() < 0.3:  # brackets around the first two
            end = [i for i, c in enumerate(text) if c in "+-*"][1]
            text = f"({text[:end]}){text[end:]}"
        return {"expression": text, "answer": str(evaluate(text))}

    def problem(self, row: Row) -> str:
        return row["expression"]

    def messages(self, row: Row) -> list[Message]:
        return user(f"What is {row['expression']}?")

    def respond(self, row: Row, messages: Sequence[Message]) -> list[Message] | None:
        """A tool message for each call of the last turn; None where it called nothing, or has called too often."""
        calls = messages[-1].get("tool_calls") or ()
        turns = sum(bool(m.get("tool_calls")) for m in messages)
        if not calls or turns > CALLS:
            return None
        return [{"role": "tool", "content": _reply(call)} for call in calls[:CALLS]]

    def score(self, row: Row, reply: str) -> float:
        return float(self.answer(row, reply) == row["answer"])

    def answer(self, row: Row, reply: str) -> str:
        return numbers.last(reply)

    def solution(self, row: Row) -> list[Message]:
        call = {"name": "calculator", "arguments": row["expression"]}
        asked = {"role": "assistant", "content": "", "tool_calls": [call]}
        return [asked, {"role": "tool", "content": calculate(row["expression"])}, *assistant(row["answer"])]


def _reply(call: dict[str, str]) -> str:
    if call["name"] != "calculator":
        return f"error: no tool {call['name'][:40]!r}; there is calculator"
    return calculate(call["arguments"])
