"""Configuration files: get_config(arg) -> ConfigDict -> overrides -> the frozen dataclasses of schema.py.

A file says only what differs from the defaults of schema.py:

    from lmtrain import config

    def get_config(arg=""):
        a = config.parse_arg(arg, steps=1000)          # file.py:steps=200
        c = config.experiment(seed=1)
        c.stages.pretrain = config.stage(steps=a.steps, data=config.data("text", path="books/"))
        return c
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib
import importlib.util
import inspect
import json
import pathlib
import re
import types
import typing
from collections.abc import Callable, Iterable
from typing import Any

from absl import flags as absl_flags
from ml_collections import ConfigDict, config_flags
from ml_collections.config_dict import FieldReference, placeholder

from lmtrain import flags, limits, schema
from lmtrain.schema import ConfigError
from lmtrain.types import LmtrainError

# ------------------------------------------------------------------------------------------- writing an experiment


def experiment(**fields: Any) -> ConfigDict:
    """The ConfigDict of a schema.Experiment without stages; `fields` replace defaults."""
    return _config_dict(schema.Experiment, fields, "experiment")


def tokenizer(kind: str = "bpe", **fields: Any) -> ConfigDict:
    """A tokenizer stage (schema.Tokenizer)."""
    return _config_dict(schema.Tokenizer, {"kind": kind, **fields}, "tokenizer")


def stage(**fields: Any) -> ConfigDict:
    """A training stage (schema.Stage). `loss` holds the settings of its objective."""
    given = fields.pop("loss", {})
    c = _config_dict(schema.Stage, fields, "stage")
    settings = loss_settings(c.objective)
    with c.unlocked():
        c.loss = _config_dict(settings, dict(given), "loss") if settings else ConfigDict()
    return c


def model(**fields: Any) -> ConfigDict:
    """A schema.Model."""
    return _config_dict(schema.Model, fields, "model")


def preset(name: str, **fields: Any) -> ConfigDict:
    """A named shape of models/presets.py, with `fields` replaced."""
    from lmtrain.models import presets

    base = dataclasses.asdict(presets.get(name))
    return _config_dict(schema.Model, {**base, **fields}, "model")


def of(name: str, **fields: Any) -> tuple[ConfigDict, ConfigDict]:
    """(tokenizer stage, model) of a trained model, as init_from names it: to start afresh in its shape, with its
    tokens. `fields` replace those of the model.

    Raises:
      LmtrainError: there is no such model.
    """
    from lmtrain import origins

    found = origins.find(name)
    shape = dataclasses.asdict(found.model) | {"lora": schema.Lora()} | fields
    return tokenizer("file", path=origins.tokenizer(name)), _config_dict(schema.Model, shape, "model")


def data(source: str = "stdlib", **fields: Any) -> ConfigDict:
    """A schema.Data with one source."""
    return _config_dict(schema.Data, {"source": source, **fields}, "data")


def mixture(members: dict[str, ConfigDict], **fields: Any) -> ConfigDict:
    """A schema.Data that draws from several, in proportion to each one's `weight`."""
    c = _config_dict(schema.Data, fields, "data")
    with c.unlocked():
        c.mixture = ConfigDict(dict(members))
    return c


def rollout(*tasks: str, **fields: Any) -> ConfigDict:
    """A schema.Rollout: where reinforcement learning's batches come from."""
    return _config_dict(schema.Rollout, {"tasks": tasks, **fields}, "rollout")


def evaluation(*tasks: str, **fields: Any) -> ConfigDict:
    """A stage that scores every training stage before it (schema.Evaluation)."""
    return _config_dict(schema.Evaluation, {"tasks": tasks, **fields}, "evaluation")


def optim(name: str = "muon", **fields: Any) -> ConfigDict:
    """A schema.Optim."""
    return _config_dict(schema.Optim, {"name": name, **fields}, "optim")


def parse_arg(arg: str, **defaults: Any) -> types.SimpleNamespace:
    """Reads what follows the colon in `file.py:arg`: "a=1,b=x", or a bare word for the first default's value.

    Each value takes the type of its default; a bool may be named alone to switch it on.
    """
    values = dict(defaults)
    parts = re.split(r",(?![^(]*\))", arg)  # not at the commas of "task=addition(digits=2, reversed=True)"
    for i, part in enumerate(p.strip() for p in parts if p.strip()):
        name, eq, text = part.partition("=")
        if not eq and name in defaults and isinstance(defaults[name], bool):
            text = "true"
        elif not eq and i == 0 and defaults:
            name, text = next(iter(defaults)), part
        elif name not in defaults:
            raise ConfigError(
                f"{part!r} after the colon: {flags.unknown(name, defaults, 'an argument of this experiment')}"
            )
        values[name] = flags.parse(text, type(defaults[name]), f"{name} (after the colon)")
    return types.SimpleNamespace(**values)


# ------------------------------------------------------------------------------------------- reading an experiment


def load(file_and_arg: str, overrides: Iterable[str] = ()) -> ConfigDict:
    """Loads `FILE[:arg]` and applies overrides of the form `--config.a.b=value`.

    Raises ConfigError for a file without get_config, an unknown field or a value of the wrong type.
    """
    path, _, arg = file_and_arg.partition(":")
    get_config = _import_file(path)
    try:
        c = get_config(arg)
    except LmtrainError as e:
        raise ConfigError(f"{file_and_arg}: {e}") from None
    except Exception as e:
        raise ConfigError(f"{file_and_arg}: get_config failed: {type(e).__name__}: {e}") from e
    if not isinstance(c, ConfigDict):
        raise ConfigError(f"{path}: get_config returned {type(c).__name__}, but takes config.experiment(...).")
    return override(c, overrides)


def override(c: ConfigDict, overrides: Iterable[str]) -> ConfigDict:
    """Applies `--config.a.b=value` flags to a ConfigDict, in place, through ml_collections.config_flags."""
    overrides = flags.join_values(list(overrides))
    for flag in overrides:  # a new objective brings its own settings, so those come first
        path, eq, value = flag.removeprefix("--config.").partition("=")
        if eq and re.fullmatch(r"stages\.\w+\.objective", path) and path.split(".")[1] in c.get("stages", {}):
            s = c.stages[path.split(".")[1]]
            settings = loss_settings(value)
            with s.unlocked():
                s.loss = _config_dict(settings, {}, "loss") if settings else ConfigDict()
        if eq and re.fullmatch(r"stages\.\w+\.optim\.args\.\w+", path) and path.split(".")[1] in c.get("stages", {}):
            args = c.stages[path.split(".")[1]].optim.args  # whatever the optimizer of that name takes
            try:
                literal = ast.literal_eval(value)
            except (ValueError, SyntaxError):
                literal = value
            with args.unlocked():
                args[path.rsplit(".", 1)[1]] = literal
    for flag in overrides:
        flags.check_path(c, flag)
    values = absl_flags.FlagValues()
    argv = ["lmtrain", *overrides]
    try:
        config_flags.DEFINE_config_dict("config", c, flag_values=values, sys_argv=argv)
        values(argv)
    except (absl_flags.Error, TypeError, ValueError, AttributeError, KeyError, SyntaxError) as e:
        raise ConfigError(flags.explain(c, overrides, e)) from None
    result: ConfigDict = values["config"].value
    return result


def build(c: ConfigDict) -> schema.Experiment:
    """Turns a ConfigDict into the frozen dataclasses, checking names and types once more (Python may have made it)."""
    e = _dataclass(schema.Experiment, c, "")
    if not 0 <= e.seed < 2**32:
        raise ConfigError(f"seed is {e.seed}, but takes a whole number from 0 to {2**32 - 1}.")
    stages: dict[str, Any] = {}
    for name, s in c.stages.items():
        if not isinstance(s, ConfigDict):
            raise ConfigError(
                f"stages.{name} is {type(s).__name__}, but takes config.stage(...), config.tokenizer(...) or "
                "config.evaluation(...)."
            )
        where = f"stages.{name}"
        if "objective" not in s:
            stages[name] = _dataclass(schema.Tokenizer if "kind" in s else schema.Evaluation, s, where)
            limits.check(stages[name], where)
            continue
        settings = loss_settings(s.objective)
        made = _dataclass(schema.Stage, s, where)
        loss = _dataclass(settings, s.get("loss") or ConfigDict(), f"{where}.loss") if settings else None
        stages[name] = dataclasses.replace(made, loss=loss)
        limits.check(stages[name], where)
    if not any(isinstance(s, schema.Stage) for s in stages.values()):
        raise ConfigError("stages is empty: an experiment needs at least one config.stage(...).")
    return dataclasses.replace(e, stages=stages)


def to_json(e: schema.Experiment) -> dict[str, Any]:
    """A plain nested dict, for config.json."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(e)))
    return plain


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def resolve(name: str, package: str, what: str) -> Callable[..., Any]:
    """Finds a function by a name in one of the package's modules, or by a dotted path "package.module:function".

    Args:
      name: "dapo", or "experiments.idea:loss".
      package: where bare names live, e.g. "lmtrain.objectives".
      what: what it is, for the message: "objective".
    """
    if ":" in name:
        return flags.import_function(name, what)
    known = {}
    folder = pathlib.Path(importlib.import_module(package).__path__[0])
    for file in sorted(folder.glob("[a-z]*.py")):
        module = importlib.import_module(f"{package}.{file.stem}")
        known.update({n: f for n, f in vars(module).items() if n in getattr(module, "__all__", ())})
    if name not in known:
        hint = flags.unknown(name, known, f"a known {what}")
        raise ConfigError(f'{what}: {hint}, or "package.module:function".')
    return known[name]


def loss_settings(objective: str) -> type | None:
    """The dataclass that an objective's fourth argument is annotated with, or None if it takes no settings."""
    fn = resolve(objective, "lmtrain.objectives", "objective")
    try:
        names = list(inspect.signature(fn).parameters)
        hints = typing.get_type_hints(getattr(fn, "func", getattr(fn, "__wrapped__", fn)))
    except (TypeError, ValueError, NameError) as e:
        raise ConfigError(f"objective {objective!r}: its signature cannot be read ({e}).") from None
    if len(names) < 4:
        raise ConfigError(f"objective {objective!r} takes ({', '.join(names)}), not (forward, params, batch, cfg).")
    kind = hints.get(names[3])
    return kind if isinstance(kind, type) and dataclasses.is_dataclass(kind) else None


# ------------------------------------------------------------------------------------------- the parts


def _import_file(path: str) -> Callable[[str], ConfigDict]:
    file = pathlib.Path(path)
    if not file.exists():
        near = sorted(p.name for p in file.parent.glob("*.py")) if file.parent.is_dir() else []
        hint = difflib.get_close_matches(file.name, near, 1, 0.4)
        tail = f" Did you mean {file.parent / hint[0]}?" if hint else ""
        raise ConfigError(f"--config {path}: no such file.{tail}")
    spec = importlib.util.spec_from_file_location(f"lmtrain_config_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise ConfigError(f"--config {path}: not a Python file.")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except LmtrainError as e:
        raise ConfigError(f"{path}: {e}") from None
    except Exception as e:
        line = getattr(e, "lineno", None)
        raise ConfigError(f"{path}{f':{line}' if line else ''}: {type(e).__name__}: {e}") from e
    if not hasattr(module, "get_config"):
        raise ConfigError(f"{path} has no function get_config(arg=''), which returns the experiment.")
    get_config: Callable[[str], ConfigDict] = module.get_config
    return get_config


def _optional(kind: Any) -> tuple[Any, bool]:
    """(X, True) of `X | None`, else (X, False)."""
    args = typing.get_args(kind)
    if type(None) in args:
        rest = [a for a in args if a is not type(None)]
        return (rest[0] if len(rest) == 1 else Any), True
    return kind, False


def _config_dict(cls: type, given: dict[str, Any], where: str) -> ConfigDict:
    """The defaults of a dataclass as a locked ConfigDict, with `given` laid over them."""
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for name in given:
        if name not in fields:
            raise ConfigError(f"{where}: {flags.unknown(name, fields, f'a field of {where}')}")
    for name, f in fields.items():
        kind, optional = _optional(hints[name])
        made = f.default_factory
        default = made() if made is not dataclasses.MISSING else f.default
        value = given.get(name, default)
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            if value is None:
                values[name] = placeholder(ConfigDict)
                continue
            if dataclasses.is_dataclass(value):
                value = {g.name: getattr(value, g.name) for g in dataclasses.fields(value)}
            values[name] = _config_dict(kind, dict(value), f"{where}.{name}")
        elif typing.get_origin(kind) is dict or kind is dict:
            values[name] = ConfigDict(dict(value), sort_keys=False)
        elif value is None and optional:
            values[name] = placeholder(kind)
        else:
            values[name] = _check_type(value, kind, f"{where}.{name}")
    c = ConfigDict(values, sort_keys=False).lock()  # the order of stages counts
    for name in values:
        kind, _ = _optional(hints[name])
        if typing.get_origin(kind) is dict:
            c[name].unlock()  # stages, mixture, args: their names are the writer's
    return c


def _check_type(value: Any, kind: Any, where: str) -> Any:
    if isinstance(value, FieldReference):
        return value
    if kind is Any:
        return value
    if typing.get_origin(kind) is tuple:
        numbers = typing.get_args(kind)[0] is float
        of, like = ((int, float), "numbers, such as (1.0, 2.5)") if numbers else ((str,), "text, such as ('a', 'b')")
        if isinstance(value, (tuple, list)) and all(isinstance(v, of) and not isinstance(v, bool) for v in value):
            return tuple(value)
        raise ConfigError(f"{where} is {value!r}, but takes a tuple of {like}.")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, kind) and not (kind is not bool and isinstance(value, bool)):
        return value
    raise ConfigError(f"{where} is {value!r}, but takes {flags.ARTICLE.get(kind, kind)}.")


def _dataclass(cls: Any, c: ConfigDict, where: str) -> Any:
    """A frozen dataclass from a ConfigDict; `where` is the path to it, for messages."""
    hints = typing.get_type_hints(cls)
    fields = {f.name for f in dataclasses.fields(cls)}
    at = f"{where}." if where else ""
    for name in c:
        if name not in fields:
            raise ConfigError(f"{at}{name}: {flags.unknown(name, fields, 'a field of ' + (where or 'an experiment'))}")
    values: dict[str, Any] = {}
    for name in fields & set(c.keys()):
        kind, optional = _optional(hints[name])
        value = c[name]
        if value is None and optional:
            values[name] = None
        elif dataclasses.is_dataclass(kind):
            values[name] = _dataclass(kind, value, at + name)
        elif typing.get_origin(kind) is dict and typing.get_args(kind)[1] is schema.Data:
            values[name] = {k: _dataclass(schema.Data, v, f"{at}{name}.{k}") for k, v in value.items()}
        elif typing.get_origin(kind) is dict:
            values[name] = value.to_dict() if isinstance(value, ConfigDict) else dict(value)
        else:
            values[name] = _check_type(value, kind, at + name)
    return cls(**values)
