"""Programming problems from a JSON Lines file, scored by their tests in the sandbox: HumanEval's format, or MBPP's.

HumanEval (arXiv 2107.03374)   task_id, prompt, entry_point, test, canonical_solution
MBPP (arXiv 2108.07732)        task_id, text or prompt, test_list, code; test_setup_code, test_imports
"""

from __future__ import annotations

import ast
import builtins
import re
import warnings
from collections.abc import Iterable

from lmtrain import sandbox
from lmtrain.tasks import listed
from lmtrain.tasks.generated import Message, Row, assistant, number, user
from lmtrain.types import LmtrainError


class Code(listed.Listed):
    """A reply scores 1 where its program passes all tests, else 0. The program is what stands in a ``` fence, or all.

    It has the standard library, one thread, no network and no files but its own; see lmtrain.sandbox.

    Args:
      path: the file. Where heldout_path is not set, an eighth of it is held out.
      heldout_path: a second file, held out whole.
      shown: how many tests of MBPP's the prompt shows, for the name and the types of the function.
      seconds, cpu_seconds, memory_mb: limits of one program.
    """

    name = "code"

    def __init__(
        self,
        path: str = "",
        heldout_path: str = "",
        shown: int = 1,
        seconds: float = 10.0,
        cpu_seconds: int = 5,
        memory_mb: int = 512,
        max_tokens: int = 512,
    ):
        super().__init__()
        self.path, self.heldout_path = path, heldout_path
        self.shown, self.max_tokens = number("shown", shown, 0, 100), number("max_tokens", max_tokens, 1, 1 << 20)
        self.limits = sandbox.Limits(float(seconds), cpu_seconds, number("memory_mb", memory_mb, 64, 1 << 20) << 20)
        sandbox.run("", limits=self.limits)  # refuses here, not after an hour, where programs cannot be locked in
        for file in filter(None, (path, heldout_path)):
            next(listed.file_rows(self.name, file, ""), None)  # nor where there is no such file

    def load(self) -> Iterable[tuple[Row, bool | None]]:
        for where, row, held in listed.file_rows(self.name, self.path, self.heldout_path):
            if "test_list" in row:
                yield self._mbpp(row, where), held
            elif "entry_point" in row:
                yield _human_eval(row, where), held
            else:
                raise LmtrainError(
                    f"{where}: neither HumanEval's fields (prompt, entry_point, test) nor MBPP's (text, test_list);"
                    f" there are {', '.join(list(row)[:20])}."
                )

    def problem(self, row: Row) -> str:
        return " ".join(row["question"].split())

    def messages(self, row: Row) -> list[Message]:
        return user(row["question"])

    def score(self, row: Row, reply: str) -> float:
        """
        Raises:
          LmtrainError: this machine cannot lock a program in.
        """
        return float(parses(program(row, reply)) and self.check(row, reply).ok)

    def check(self, row: Row, reply: str) -> sandbox.Result:
        """The score with its reason."""
        return sandbox.check(program(row, reply), row["tests"], row["entry_point"], self.limits, row["setup"])

    def solution(self, row: Row) -> list[Message]:
        if not row["solution"]:
            raise LmtrainError(f"task code: row {row['id']} has no solution (canonical_solution or code) to show.")
        return assistant(f"```python\n{row['solution'].strip()}\n```")

    def _mbpp(self, row: Row, where: str) -> Row:
        text = "text" if "text" in row else "prompt"
        listed.text_fields(row, (text,), where)
        tests = row["test_list"]
        if not isinstance(tests, list) or not tests or not all(isinstance(test, str) for test in tests):
            raise LmtrainError(f"{where}: test_list is {tests!r:.80}, but takes a list of assert statements.")
        imports = row.get("test_imports") or []
        setup = "\n".join([*imports, row.get("test_setup_code") or ""])
        shown = "".join(f"\n{test}" for test in tests[: self.shown])
        code = row.get("code") or ""
        return {
            "id": str(row.get("task_id", where)), "question": row[text] + shown, "prefix": setup, "setup": setup,
            "entry_point": _called(tests, code, setup, where), "tests": "\n".join(tests), "solution": code,
        }  # fmt: skip


def _human_eval(row: Row, where: str) -> Row:
    listed.text_fields(row, ("prompt", "entry_point", "test"), where)
    prompt, solution = row["prompt"], row.get("canonical_solution") or ""
    # The prompt's imports and helpers, which tests may use; its last function has a docstring for a body, or none.
    setup = next((text for text in (prompt, f"{prompt}\n    pass") if _tree(text)), "")
    return {
        "id": str(row.get("task_id", where)), "question": f"Complete this function.\n```python\n{prompt.strip()}\n```",
        "prefix": prompt, "entry_point": row["entry_point"], "tests": row["test"], "setup": setup,
        "solution": prompt + solution if solution else "",
    }  # fmt: skip


def program(row: Row, reply: str) -> str:
    """The program that a reply stands for: what the prompt began, then its function, or the rest of the body."""
    code = extract(reply, row["entry_point"])
    if re.search(_definition(row["entry_point"]), code, re.M):
        return f"{row['prefix']}\n\n{code}"
    indent = "" if code[:1] in (" ", "\t") else "    "  # a template that strips replies takes the first one's away
    return f"{row['prefix']}{indent}{code}"


def extract(reply: str, entry_point: str) -> str:
    """The code of a reply: the last fenced block that defines `entry_point`, else the first one, else all of it."""
    blocks = re.findall(r"^[ \t]*```[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", reply, re.M | re.S)
    defining = [block for block in blocks if re.search(_definition(entry_point), block, re.M)]
    return (defining[-1:] or blocks[:1] or [reply])[0]


def parses(source: str) -> bool:
    """Whether it is Python at all: what is not fails its tests, and need not be run for that."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "\\d" in a program is no matter of this process
        return _tree(source) is not None


def _definition(name: str) -> str:
    return rf"^(?:async[ ]+)?def[ ]+{re.escape(name)}\b|^{re.escape(name)}[ ]*="


def _tree(source: str) -> ast.Module | None:
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _called(tests: list[str], code: str, setup: str, where: str) -> str:
    """The function that the tests are about: they call it, and the solution defines it, or nothing else does."""
    tree = _tree("\n".join(tests)) or ast.Module([], [])
    calls = [n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
    defined = [node.name for node in (_tree(code) or tree).body if isinstance(node, ast.FunctionDef)]
    others = re.findall(r"\w+", setup)
    found = [n for n in calls if n in defined] or [n for n in calls if not hasattr(builtins, n) and n not in others]
    if not found:
        raise LmtrainError(f"{where}: no test in test_list calls a function of the program's: {tests[0]:.80}")
    return found[0]
