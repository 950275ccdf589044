"""The two processes of the sandbox. Started with a clean environment; imports nothing of lmtrain.

    program   what a model wrote. Locked in, it is run; for `check` it then answers calls: arguments in, result out.
    tester    the tests. Locked in by itself, it never runs a line of the program: calls go to the other process as
              plain values, and what comes back is compared here. It alone has the pipe on which the verdict goes.

Nothing the program can reach holds an expected value, an assert statement or a verdict, so there is nothing to forge:
the best it can do is to give right answers.
"""

from __future__ import annotations

import builtins
import json
import os
import sys
import types

import jail
import wire

TYPE_CHECKING = False  # typing takes longer to import than all that happens here
if TYPE_CHECKING:
    from typing import Any


def main() -> None:
    """Enters the jail, says on `status` that it did or why not, then plays the role it was given."""
    given = json.loads(sys.argv[1])
    sys.path.pop(0)  # this folder: before the paths that stay open are read off sys.path
    fds = given["fds"]
    try:
        jail.enter(parent=given["parent"], folder=given["folder"], **given["limits"])
    except (jail.Refused, OSError, ValueError) as error:
        os.write(fds["status"], f"{error}\n".encode())
        os._exit(1)
    os.write(fds["status"], b"ready\n")
    source = _text(fds["source"])
    if given["role"] == "tester":
        _test(source, _text(fds["setup"]), given["entry_point"], fds)
    os.close(fds["status"])
    if given["entry_point"]:
        _answer(source, given["entry_point"], fds)
    else:
        _run(source)


def _text(fd: int) -> str:
    with open(fd, "rb") as file:
        return file.read().decode("utf-8", "surrogatepass")


# ---------------------------------------------------------------- the program


def _run(source: str) -> None:
    """As `python FILE` would: the exit status says how it ended."""
    module = sys.modules["__main__"] = types.ModuleType("__main__")
    sys.argv = ["program.py"]
    exec(compile(source, "program.py", "exec"), vars(module))


def _answer(source: str, name: str, fds: dict[str, int]) -> None:
    """Runs the program, then answers calls of its function `name` for as long as somebody asks."""
    module = sys.modules["solution"] = types.ModuleType("solution")
    sys.argv = ["program.py"]
    exec(compile(source, "program.py", "exec"), vars(module))
    lines = wire.Lines(fds["calls"])
    while (line := lines.next()) is not None:
        function = vars(module).get(name)
        if not callable(function):
            wire.send(fds["replies"], {"failed": f"the program has no function {name}"})
            continue
        try:
            arguments, keywords = wire.decode(json.loads(line))
            reply = {"value": wire.encode(function(*arguments, **keywords))}
        except wire.Odd as error:
            reply = {"failed": f"{name} returned {error}"}
        except Exception as error:
            reply = {"raised": [type(error).__name__, str(error)[:1000]]}
        wire.send(fds["replies"], reply)


# ---------------------------------------------------------------- the tests


class _Over(BaseException):
    """The program cannot be asked any more. No Exception, and remembered: tests that catch everything still fail."""


class _Asked:
    """The program's function, as tests see it."""

    def __init__(self, name: str, fds: dict[str, int]):
        self.__name__, self.calls, self.over = name, 0, ""
        self._fd, self._lines = fds["calls"], wire.Lines(fds["replies"])

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        self.calls += 1
        if self.over:
            raise _Over
        try:
            question = wire.encode([arguments, keywords])
        except wire.Odd as error:
            self._end(f"the tests give {self.__name__} {error}")
        try:
            wire.send(self._fd, question)
            line = self._lines.next()
        except OSError:
            line = None
        if line is None:
            self._end("the program ended, or gave an endless answer")
        try:
            ((kind, content),) = json.loads(line).items()
            if kind == "value":
                return wire.decode(content)
            if kind == "failed":
                self._end(str(content))
            name, message = content
            raised = _error(str(name), str(message))
        except Exception as broken:
            self._end(f"the program's answer could not be read: {type(broken).__name__}")
        raise raised

    def _end(self, reason: str) -> Any:
        self.over = reason[:1000]
        raise _Over


def _error(name: str, message: str) -> Exception:
    """A built-in exception by its name. Not those that end a loop: within all(map(...)) they would pass for success."""
    found: Any = getattr(builtins, name, None)
    plain = isinstance(found, type) and issubclass(found, Exception) and not issubclass(found, UnicodeError)
    if plain and name not in ("StopIteration", "StopAsyncIteration", "ExceptionGroup"):
        return found(message)
    return RuntimeError(f"{name}: {message}")


def _test(tests: str, setup: str, name: str, fds: dict[str, int]) -> None:
    """Runs the tests and writes the verdict: {"ok": bool, "error": str}. Never returns."""
    asked = _Asked(name, fds)
    module = sys.modules["tests"] = types.ModuleType("tests")
    try:
        exec(compile(setup, "setup", "exec"), vars(module))
        setattr(module, name, asked)
        vars(module).pop("check", None)
        exec(compile(tests, "tests", "exec"), vars(module))
        check: Any = vars(module).get("check")
        if check is not None and check is not asked:
            check(asked)
        error = "" if asked.calls else f"the tests never called {name}"
    except BaseException as failure:
        import traceback

        error = "".join(traceback.format_exception_only(failure)).strip() + _where(failure, tests)
    error = asked.over or error
    wire.send(fds["status"], {"ok": not error, "error": error[:4000]})
    os._exit(0)


def _where(failure: BaseException, tests: str) -> str:
    """The line of the tests at which it failed."""
    import traceback

    numbers = [at.lineno for at in traceback.extract_tb(failure.__traceback__) if at.filename == "tests" and at.lineno]
    return f" in: {tests.splitlines()[numbers[-1] - 1].strip()[:300]}" if numbers else ""
