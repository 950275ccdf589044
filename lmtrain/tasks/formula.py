"""Formulas of grades, such as "0.7 * answer + 0.3 * min(style, 1)": read by an evaluator of our own, never executed."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Iterable, Mapping

from lmtrain.types import LmtrainError, nearest

_LONGEST = 10_000  # characters
_OPERATORS: dict[type, Callable[..., float]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv, ast.Pow: math.pow,
    ast.UAdd: operator.pos, ast.USub: operator.neg,
}  # fmt: skip
#: Name -> (function, least and most arguments).
FUNCTIONS: dict[str, tuple[Callable[..., float], int, int]] = {
    "min": (lambda *values: min(values), 1, 1000), "max": (lambda *values: max(values), 1, 1000),
    "abs": (abs, 1, 1), "floor": (lambda x: float(math.floor(x)), 1, 1), "ceil": (lambda x: float(math.ceil(x)), 1, 1),
    "exp": (math.exp, 1, 1), "sqrt": (math.sqrt, 1, 1), "log": (math.log, 1, 1),
}  # fmt: skip
_TAKES = f"numbers, names of graders, + - * / ^, brackets and {', '.join(FUNCTIONS)}"


class Formula:
    """Numbers, names, + - * / ^ (power), brackets and FUNCTIONS, in floating point; log is the natural one.

    Args:
      names: what may stand for a number.

    Raises:
      LmtrainError: anything else in it, or a name that there is not.
    """

    def __init__(self, text: str, names: Iterable[str]) -> None:
        self.text, self._names = text, list(names)
        if len(text) > _LONGEST:
            raise LmtrainError(f"a formula of {len(text):,} characters, takes at most {_LONGEST:,}")
        if "**" in text:
            raise LmtrainError(f"** is not read; power is written ^. It takes {_TAKES}")
        try:
            if "#" in text:  # what follows would be a comment
                raise ValueError
            # ^ binds like ** in a formula; as Python's own ^ it would bind loosest of all
            self._body = ast.parse(" ".join(text.split()).replace("^", "**"), mode="eval").body
            self._check(self._body)
        except (SyntaxError, ValueError, OverflowError, MemoryError, RecursionError):
            raise LmtrainError(f"not a formula: {text[:200]!r}. It takes {_TAKES}") from None

    def __call__(self, grades: Mapping[str, float]) -> float:
        """The value, which need not lie between 0 and 1.

        Raises:
          LmtrainError: there is none: a division by zero, the root or the logarithm of what has none, no finite number.
        """
        try:
            value = self._value(self._body, grades)
        except (ArithmeticError, ValueError, RecursionError) as error:
            raise LmtrainError(f"{self.text}: {error}") from None
        if not math.isfinite(value):
            raise LmtrainError(f"{self.text}: the value is {value}")
        return value

    def _check(self, node: ast.expr) -> None:
        if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool):
            float(node.value)
        elif isinstance(node, ast.Name):
            if node.id not in self._names:
                hint = nearest(node.id, [*self._names, *FUNCTIONS])
                raise LmtrainError(f"{node.id!r} is none of the graders {', '.join(self._names)}.{hint}")
        elif isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
            self._check(node.operand)
        elif isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            self._check(node.left)
            self._check(node.right)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            self._check_call(node.func.id, node)
        else:
            raise LmtrainError(f"{ast.unparse(node)[:100]!r} is not read. It takes {_TAKES}")

    def _check_call(self, name: str, node: ast.Call) -> None:
        if name not in FUNCTIONS:
            raise LmtrainError(f"there is no function {name!r}, but {', '.join(FUNCTIONS)}.{nearest(name, FUNCTIONS)}")
        _, least, most = FUNCTIONS[name]
        if node.keywords or not least <= len(node.args) <= most:
            takes = "one value" if most == 1 else "one value or more"
            raise LmtrainError(f"{ast.unparse(node)[:100]!r}: {name} takes {takes}")
        for value in node.args:
            self._check(value)

    def _value(self, node: ast.expr, grades: Mapping[str, float]) -> float:
        if isinstance(node, ast.Name):
            return grades[node.id]
        if isinstance(node, ast.UnaryOp):
            return _OPERATORS[type(node.op)](self._value(node.operand, grades))
        if isinstance(node, ast.BinOp):
            return _OPERATORS[type(node.op)](self._value(node.left, grades), self._value(node.right, grades))
        if isinstance(node, ast.Call):
            assert isinstance(node.func, ast.Name)
            return FUNCTIONS[node.func.id][0](*(self._value(value, grades) for value in node.args))
        assert isinstance(node, ast.Constant) and isinstance(node.value, int | float)
        return float(node.value)
