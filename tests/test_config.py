"""Configuration: files, arguments, overrides, and one readable sentence for everything that cannot be."""

import dataclasses

import pytest

from lmtrain import config, schema
from lmtrain.schema import ConfigError

FILE = """
from lmtrain import config
def get_config(arg=""):
    a = config.parse_arg(arg, steps=7, fast=False)
    c = config.experiment(seed=3)
    c.stages.tokenizer = config.tokenizer("bytes")
    c.stages.pretrain = config.stage(steps=a.steps, model=config.model(layers=2), log_every=1 if a.fast else 5)
    c.stages.again = config.stage(loss=dict(z_loss=0.5))
    return c
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "tiny.py"
    path.write_text(FILE)
    return str(path)


def test_a_file_says_only_what_differs(file):
    e = config.build(config.load(file))
    stage = e.stages["pretrain"]
    assert (e.seed, stage.steps, stage.model.layers, stage.log_every) == (3, 7, 2, 5)
    assert stage.model.width == schema.Model().width
    assert dataclasses.replace(stage.model, layers=schema.Model().layers) == schema.Model()


def test_stages_keep_the_order_they_were_written_in(file):
    assert list(config.build(config.load(file)).stages) == ["tokenizer", "pretrain", "again"]


def test_arguments_after_the_colon(file):
    assert config.build(config.load(file + ":9")).stages["pretrain"].steps == 9
    made = config.build(config.load(file + ":steps=11,fast")).stages["pretrain"]
    assert (made.steps, made.log_every) == (11, 1)
    with pytest.raises(ConfigError, match="stepz.*Did you mean steps"):
        config.load(file + ":fast,stepz=1")
    with pytest.raises(ConfigError, match="steps.*'many'.*whole number"):
        config.load(file + ":steps=many")


def test_overrides_reach_every_depth_and_keep_types(file):
    flags = [
        "--config.seed=5",
        "--config.stages.pretrain.optim.lr=1e-4",
        "--config.stages.pretrain.model.rope_scaling.kind=yarn",
        "--config.stages.pretrain.model.tied=false",
        "--config.stages.pretrain.prompts=('a','b')",
        "--config.stages.again.loss.z_loss",
        "0.25",
    ]
    e = config.build(config.load(file, flags))
    stage = e.stages["pretrain"]
    assert (e.seed, stage.optim.lr, stage.model.rope_scaling.kind, stage.model.tied) == (5, 1e-4, "yarn", False)
    assert stage.prompts == ("a", "b") and e.stages["again"].loss.z_loss == 0.25


def test_loading_twice_is_independent(file):
    config.load(file, ["--config.seed=5"])
    assert config.load(file).seed == 3


@dataclasses.dataclass(frozen=True)
class Mine:
    margin: float = 2.0


def my_loss(forward, params, batch, cfg: Mine):
    """An objective of somebody's own."""


def test_another_objective_brings_its_own_settings(file):
    mine = f"{__name__}:my_loss"
    flags = [f"--config.stages.pretrain.objective={mine}", "--config.stages.pretrain.loss.margin=4"]
    try:
        config.resolve(mine, "lmtrain.objectives", "objective")
    except ConfigError:
        pytest.skip("tests are no importable package here")
    assert config.build(config.load(file, flags)).stages["pretrain"].loss.margin == 4.0


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--config.stages.pretrain.optim.lrate=1", ["optim", "lrate", "Did you mean lr"]),
        ("--config.stages.pretrain.model.layers=abc", ["layers", "'abc'", "whole number"]),
        ("--config.stages.pretrain.model.layers=1.5", ["layers", "'1.5'", "whole number"]),
        ("--config.stages.pretrain.model.tied=maybe", ["tied", "'maybe'", "true or false"]),
        ("--config.stages.pretrain.optim.lr=fast", ["lr", "'fast'", "a number"]),
        ("--config.optim.lr=1", ["optim", "--config.stages.pretrain.optim.lr"]),
        ("--config.stages.sft.steps=1", ["sft", "pretrain"]),
        ("--config.stages.pretrain.model=3", ["group of fields", "layers"]),
        ("--config.seed", ["seed", "no value"]),
        ("--config.stages.pretrain.steps.x=1", ["steps", "no fields"]),
        ("--config.stages.pretrain.objective=pretrian", ["objective", "pretrian", "Did you mean pretrain"]),
        ("--config.stages.pretrain.objective=nowhere:loss", ["objective", "cannot import nowhere"]),
        ("--config.stages.pretrain.loss.zloss=1", ["zloss", "Did you mean z_loss"]),
        ("--workdirr=x", ["--workdirr"]),
    ],
)
def test_a_bad_flag_is_named_with_what_it_takes(file, flag, words):
    with pytest.raises(ConfigError) as error:
        config.build(config.load(file, [flag]))
    for word in words:
        assert word in str(error.value), str(error.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(steps=0), ["stages.s.steps", "0", "at least 1"]),
        (dict(batch_size=10, accumulate=4), ["batch_size=10", "accumulate=4"]),
        (dict(data=dict(row_length=1)), ["row_length", "at least 2"]),
        (dict(data=dict(heldout_fraction=1.5)), ["heldout_fraction", "1.5"]),
    ],
)
def test_impossible_numbers_are_refused(change, words):
    c = config.experiment()
    c.stages.s = config.stage(**change)
    with pytest.raises(ConfigError) as error:
        config.build(c)
    for word in words:
        assert word in str(error.value), str(error.value)


def test_mistakes_in_python_are_named_too():
    with pytest.raises(ConfigError, match="layrs.*Did you mean layers"):
        config.model(layrs=2)
    with pytest.raises(ConfigError, match="layers.*'2'.*whole number"):
        config.model(layers="2")
    with pytest.raises(AttributeError):
        config.stage().stepz = 3
    with pytest.raises(ConfigError, match="no training|at least one|empty"):
        config.build(config.experiment())


def test_a_file_that_fails_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        config.load(str(tmp_path / "none.py"))
    (tmp_path / "quickstart.py").write_text("x = 1")
    with pytest.raises(ConfigError, match="Did you mean .*quickstart.py"):
        config.load(str(tmp_path / "quickstar.py"))
    with pytest.raises(ConfigError, match="get_config"):
        config.load(str(tmp_path / "quickstart.py"))
    (tmp_path / "broken.py").write_text("def get_config(arg=''):\n    return (")
    with pytest.raises(ConfigError, match="broken.py:2.*SyntaxError"):
        config.load(str(tmp_path / "broken.py"))


def test_every_field_survives_the_round_trip_through_json():
    c = config.experiment()
    c.stages.tokenizer = config.tokenizer("bytes")
    c.stages.s = config.stage(
        data=config.mixture({"a": config.data("text", path="x", weight=2.0), "b": config.data("stdlib")}, row_length=32)
    )
    e = config.build(c)
    assert e.stages["s"].data.mixture["a"].weight == 2.0
    plain = config.to_json(e)
    assert plain["stages"]["s"]["data"]["mixture"]["b"]["source"] == "stdlib"
    assert set(plain["stages"]["s"]["model"]) == {f.name for f in dataclasses.fields(schema.Model)}


def test_commas_within_brackets_do_not_part_arguments():
    a = config.parse_arg("task=addition(digits=2,reversed=True),steps=3", steps=1, task="")
    assert a.task == "addition(digits=2,reversed=True)" and a.steps == 3
