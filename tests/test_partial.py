"""Stages that train a part of a model: the rest does not move, is not saved, and is looked after."""

import json
import shutil

import jax
import numpy as np
import pytest

from lmtrain import checkpoint, config, experiment, partial, publish, runs, schema, step
from lmtrain import mesh as meshes
from lmtrain import optim as optim_lib
from lmtrain.data import tokenizer
from lmtrain.interop import export
from lmtrain.models import lora, quantise, transformer
from lmtrain.objectives import pretrain
from lmtrain.types import LmtrainError


def stage(**fields):
    base = dict(steps=4, batch_size=8, samples=0, checkpoint_every=2, eval_every=0, log_every=1,
                optim=config.optim("adamw", lr=0.01))  # fmt: skip
    data = dict(document="paragraph", row_length=32, heldout_rows=8) | fields.pop("data", {})
    path = fields.pop("path", PATH.get("text"))
    return config.stage(**base | fields, data=config.data("text", path=path, **data))


PATH = {}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A run that trained everything: runs of the tests start from it."""
    here = tmp_path_factory.mktemp("base")
    PATH["text"] = str(here / "text.txt")
    (here / "text.txt").write_text("\n\n".join(f"This is line {i}, and {i * 7 % 13} follows." for i in range(200)))
    c = config.experiment()
    c.stages.tokenizer = config.tokenizer("bytes")
    c.stages.pretrain = stage(model=config.model(layers=2, width=32, heads=4, mlp=48, activation="swiglu"))
    experiment.run(c, here / "run")
    return here / "run"


def run(base, to, **fields):
    c = config.experiment()
    c.stages.tune = stage(init_from=fields.pop("init_from", str(base)), **fields)
    return experiment.run(c, to)


def flat(tree):
    return {path: np.asarray(x) for path, _, x in partial.named(tree)}


LORA = dict(model=config.model(lora=schema.Lora(4)))


def test_adapters_alone_are_trained_saved_and_read_back(base, tmp_path):
    done = run(base, tmp_path / "a", **LORA)
    before, after = flat(runs.load(base).params), flat(done.params)
    for path, x in before.items():
        np.testing.assert_array_equal(after[path], x)
    moved = [path for path in after if path not in before]
    assert all(any(part.endswith(lora.SUFFIX) for part in path) for path in moved)
    assert all(np.abs(after[p]).max() > 0 for p in moved)  # B is no longer zero
    saved = checkpoint.load_params(tmp_path / "a/tune/checkpoints")
    assert flat(saved).keys() == set(moved)
    manifest = checkpoint.read_manifest(tmp_path / "a/tune/checkpoints", 4)["arrays"]
    assert all(lora.SUFFIX in name or name in ("step", "key") or name.endswith("count") for name in manifest)
    back = flat(runs.load(tmp_path / "a").params)
    assert back.keys() == after.keys()
    for path, x in after.items():
        np.testing.assert_array_equal(back[path], x)


def test_a_stage_of_adapters_that_was_stopped_ends_with_the_same_bits(base, tmp_path):
    whole = run(base, tmp_path / "a", **LORA)
    with pytest.MonkeyPatch.context() as patch:  # killed between step 2's checkpoint and step 4's
        saves = checkpoint.Checkpoints.save

        def save(self, at, *rest):
            if at == 4:
                raise KeyboardInterrupt
            saves(self, at, *rest)

        patch.setattr(checkpoint.Checkpoints, "save", save)
        with pytest.raises(KeyboardInterrupt):
            run(base, tmp_path / "b", **LORA)
    resumed = run(base, tmp_path / "b", **LORA)
    assert checkpoint.params_sha256(resumed.params) == checkpoint.params_sha256(whole.params)


@pytest.mark.parametrize(
    "fields, moves",
    [
        (dict(freeze=("embed/*", "attn/*")), lambda name: not name.startswith(("embed/", "attn/"))),
        (dict(train=("mlp/*",), freeze=("mlp/gate",)), lambda name: name in ("mlp/up", "mlp/down")),
        (dict(train=("*norm*",)), lambda name: "norm" in name),
    ],
)
def test_patterns_say_what_moves(base, tmp_path, fields, moves):
    done = run(base, tmp_path / "a", **fields)
    before = flat(runs.load(base).params)
    for path, name, x in partial.named(done.params):
        assert np.array_equal(x, before[path]) == (not moves(name)), name
    assert {name for _, name, _ in partial.named(checkpoint.load_params(tmp_path / "a/tune/checkpoints"))} == {
        name for _, name, _ in partial.named(done.params) if moves(name)
    }


def test_a_stage_goes_on_from_the_adapters_of_the_one_before(base, tmp_path):
    c = config.experiment()
    c.stages.one = stage(init_from=str(base), **LORA)
    c.stages.two = stage(steps=3)
    done = experiment.run(c, tmp_path / "a")
    assert done.model.lora.rank == 4
    first, second = (flat(runs.load(tmp_path / "a" / s).params) for s in ("one", "two"))
    for path in first:
        same = np.array_equal(first[path], second[path])
        assert same == (not any(part.endswith(lora.SUFFIX) for part in path))
    moved = tmp_path / "b"
    (tmp_path / "a").rename(moved)  # a run that is moved still finds its stages
    assert flat(runs.load(moved / "two").params).keys() == second.keys()


def test_what_a_stage_rests_on_may_not_change(base, tmp_path):
    shutil.copytree(base, tmp_path / "base")
    run(tmp_path / "base", tmp_path / "a", **LORA)
    c = config.experiment()
    c.stages.tokenizer = config.tokenizer("bytes")
    c.stages.pretrain = stage(steps=6, model=config.model(layers=2, width=32, heads=4, mlp=48, activation="swiglu"))
    experiment.run(c, tmp_path / "base")
    with pytest.raises(
        LmtrainError, match="holds only what it trained; the rest is that of .*, which has changed since"
    ):
        runs.load(tmp_path / "a")


def test_a_stage_does_not_go_on_beside_another_base(base, tmp_path):
    """Stopped in the middle, its base trained on meanwhile: the adapters so far belong to the old one."""
    shutil.copytree(base, tmp_path / "base")
    with pytest.MonkeyPatch.context() as patch:
        saves = checkpoint.Checkpoints.save

        def save(self, at, *rest):
            if at == 4:
                raise KeyboardInterrupt
            saves(self, at, *rest)

        patch.setattr(checkpoint.Checkpoints, "save", save)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "base", tmp_path / "a", **LORA)
    c = config.experiment()
    c.stages.tokenizer = config.tokenizer("bytes")
    c.stages.pretrain = stage(steps=6, model=config.model(layers=2, width=32, heads=4, mlp=48, activation="swiglu"))
    experiment.run(c, tmp_path / "base")
    with pytest.raises(LmtrainError, match="hold only what was trained, and the rest is not what it was then"):
        run(tmp_path / "base", tmp_path / "a", **LORA)


@pytest.mark.slow
def test_adapters_that_would_be_another_model_beside_their_base_are_not_exported_alone(base, tmp_path):
    pytest.importorskip("qwix")
    run(base, tmp_path / "few", quantize="int8", **LORA)
    with pytest.raises(LmtrainError, match="trained beside matrices rounded to int8"):
        publish.export_adapter(str(tmp_path / "few"), str(tmp_path / "out"))
    run(base, tmp_path / "more", train=("*_lora/*", "norm/scale"), **LORA)
    with pytest.raises(LmtrainError, match="trained norm/scale too, which no adapter holds"):
        publish.export_adapter(str(tmp_path / "more"), str(tmp_path / "out"))
    c = config.experiment()
    c.stages.tokenizer = config.tokenizer("file", path=str(base / "tokenizer"), add=("<|a|>",))
    c.stages.tune = stage(init_from=str(base), **LORA)
    experiment.run(c, tmp_path / "new")
    with pytest.raises(LmtrainError, match="has new tokens, whose rows .* lacks"):
        publish.export_adapter(str(tmp_path / "new"), str(tmp_path / "out"))
    with pytest.raises(LmtrainError, match="has no adapters"):
        publish.export_adapter(str(base), str(tmp_path / "out"))
    assert not list(tmp_path.glob("out*"))


def test_adapters_beside_a_stage_that_froze_a_part_rest_on_that_stage(base, tmp_path):
    """Not on what it started from: it trained something."""
    c = config.experiment()
    c.stages.one = stage(init_from=str(base), freeze=("embed/*",))
    c.stages.two = stage(steps=3, **LORA)
    experiment.run(c, tmp_path / "a")
    publish.export_adapter(str(tmp_path / "a"), str(tmp_path / "out"))
    one = runs.load(tmp_path / "a/one")
    for path, x in flat(runs.load(f"hf:{tmp_path / 'out-base'}").params).items():
        np.testing.assert_array_equal(x, flat(one.params)[path])


def test_adapters_on_a_hugging_face_folder_exported_merged(base, tmp_path):
    publish.export(str(base), str(tmp_path / "hf"))
    done = run(base, tmp_path / "a", init_from=f"hf:{tmp_path / 'hf'}", **LORA)
    publish.export(str(tmp_path / "a"), str(tmp_path / "out"))
    merged_cfg, merged = lora.merge(done.model, done.params)
    back = runs.load(f"hf:{tmp_path / 'out'}")
    assert {n for _, n, _ in partial.named(back.params)} == {n for _, n, _ in partial.named(merged)}
    for path, x in flat(back.params).items():
        np.testing.assert_allclose(x, flat(merged)[path], atol=1e-6)
    assert json.loads((tmp_path / "out/config.json").read_text())["model_type"] == "qwen3"


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(train=("atn/*",)), r"train has 'atn/\*', which is the name of no parameter"),
        (dict(freeze=("*",)), "leaves nothing to train"),
        (dict(init_from="", **LORA), "no trained model that it comes from"),
        (dict(init_from="", freeze=("embed/*",)), "no trained model that it comes from"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(base, tmp_path, fields, message):
    with pytest.raises(LmtrainError, match=message):
        run(base, tmp_path / "a", **fields)
    assert not (tmp_path / "a").exists()


def test_an_update_of_adapters_takes_less_memory_than_one_of_everything():
    mesh = meshes.make(schema.Mesh(data=1), devices=jax.devices()[:1])
    need = {}
    for rank in (0, 8):
        cfg = transformer.resolve(schema.Model(layers=6, width=256, heads=4, mlp=1024, lora=schema.Lora(rank)), 512)
        axes = transformer.axes(cfg)
        chosen = partial.trained(schema.Stage(), cfg, axes)
        ours, rest = partial.split(axes, chosen)
        tx, schedule = optim_lib.make(schema.Optim(name="adamw"), 10, ours)
        start, abstract = step.make_init(
            lambda key, cfg=cfg, chosen=chosen: partial.split(transformer.init(cfg, key), chosen)[0], tx, ours, mesh
        )
        loss = partial.objective(pretrain.pretrain) if rest else pretrain.pretrain
        update = step.make_update(loss, transformer.Forward(cfg, mesh), tx, schedule, abstract, mesh,
                                  pretrain.Pretrain(), 1)  # fmt: skip
        batch = {name: np.zeros((2, 64), kind) for name, kind in (
            ("tokens_BT", np.int32), ("targets_BT", np.int32), ("weights_BT", np.float32))}  # fmt: skip
        if rest:
            batch[partial.REST] = partial.split(transformer.shapes(cfg), chosen)[1]
        found = update.lower(abstract, batch).compile().memory_analysis()
        need[rank] = found.argument_size_in_bytes + found.temp_size_in_bytes
    assert need[8] < 0.6 * need[0]


@pytest.mark.slow
def test_a_checkpoint_of_rank_8_adapters_is_below_5_percent_of_its_base(tmp_path):
    """Adam's two moments included. What it takes: a width of some hundreds; here 1,024, a small model of today."""
    model = transformer.resolve(
        schema.Model(layers=2, width=1024, heads=8, kv_heads=4, mlp=2816, activation="swiglu", qk_norm=False), 264
    )
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: rng.normal(0, 0.02, s.shape).astype(np.float32), transformer.shapes(model))
    export.write(tmp_path / "base", model, params, tokenizer.bytes_tokenizer(), settings={}, texts={})
    (tmp_path / "t.txt").write_text("some text\n\n" * 3 + "\n\n".join(f"and line {i}" for i in range(400)))
    lora_8 = config.model(lora=schema.Lora(8, 16.0, ("attn/*", "mlp/*")))
    run(None, tmp_path / "run", init_from=f"hf:{tmp_path / 'base'}", model=lora_8, steps=1, data=dict(row_length=16),
        path=str(tmp_path / "t.txt"))  # fmt: skip
    weight = sum(f.stat().st_size for f in (tmp_path / "base").glob("*.safetensors"))
    (saved,) = (tmp_path / "run/tune/checkpoints").iterdir()
    share = sum(f.stat().st_size for f in saved.rglob("*") if f.is_file()) / weight
    print(f"checkpoint {share:.1%} of the base of {weight / 2**20:.0f} MiB")
    assert 0.01 < share < 0.05


@pytest.mark.parametrize(
    "objective", ["dpo", "ppo", *(pytest.param(o, marks=pytest.mark.slow) for o in ("sft", "reward", "kto", "grpo"))]
)
def test_every_stage_of_post_training_takes_adapters_from_its_first_step(base, tmp_path, objective):
    """Right on a base that has none: references and values come from a model without them."""
    pairs = [{"prompt": f"a{i}", "chosen": f"yes {i}", "rejected": "no"} for i in range(60)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    c = config.experiment()
    how = dict(steps=2, batch_size=8, samples=0, eval_every=0, init_from=str(base), objective=objective,
               optim=config.optim("adamw", lr=0.01), **LORA)  # fmt: skip
    if objective in ("grpo", "ppo"):
        # Random replies are never right, so they are rewarded for what some of them do.
        how |= dict(rollout=config.rollout("spelling", group=4, max_tokens=8, rewards=("no_repetition(n=1)",)))
        how |= dict(data=config.data(row_length=64, heldout_rows=8))
    elif objective == "sft":
        how |= dict(data=config.data("task", path="spelling", limit=100, row_length=64))
    else:
        how |= dict(data=config.data("jsonl", path=str(tmp_path / "pairs.jsonl"), row_length=128))
    c.stages.tune = config.stage(**how)
    done = experiment.run(c, tmp_path / "a")
    before, after = flat(runs.load(base).params), flat(runs.load(tmp_path / "a").params)
    for path, x in before.items():
        np.testing.assert_array_equal(after[path], x)
    new = {name: x for path, name, x in partial.named(done.params) if path not in before}
    moved = {name.split("/")[-1] for name, x in new.items() if name.endswith("/b") and np.abs(x).max() > 0}
    moved |= {name.split("/")[0] for name, x in new.items() if name.startswith("scalar") and np.abs(x).max() > 0}
    assert moved == ({"b", "scalar"} if objective in ("reward", "ppo") else {"b"})


# -------------------------------------------------------------------------------------------------------- new tokens
def test_new_tokens_start_as_the_mean_of_all_others_and_are_trained(base, tmp_path):
    """Tokens added to a run's tokenizer: one row each, the old ids and rows as they were; then SFT with them."""
    c = config.experiment()
    c.stages.tokenizer = config.tokenizer("file", path=str(base / "tokenizer"), add=("<|thought|>", "<|tool|>"))
    c.stages.tune = stage(init_from=str(base), steps=1, optim=config.optim("adamw", lr=0.0, warmup=0))
    done = experiment.run(c, tmp_path / "a")
    old = runs.load(base)
    assert done.model.vocab_size == old.model.vocab_size + 2 and done.tokenizer.extends(old.tokenizer)
    assert done.tokenizer.special("<|tool|>") == old.model.vocab_size + 1
    assert done.tokenizer.encode("a <|tool|> b") == old.tokenizer.encode("a <|tool|> b")  # in a text it is text
    rows, before = np.asarray(done.params["embed"]["table"]), np.asarray(old.params["embed"]["table"])
    np.testing.assert_array_equal(rows[:-2], before)
    np.testing.assert_allclose(rows[-2:], np.broadcast_to(before.mean(0), (2, rows.shape[1])), atol=1e-7)


def test_new_tokens_beside_frozen_ones_come_back_when_the_run_is_opened(base, tmp_path):
    c = config.experiment()
    c.stages.tokenizer = config.tokenizer("file", path=str(base / "tokenizer"), add=("<|thought|>",))
    c.stages.tune = stage(init_from=str(base), **LORA)
    done = experiment.run(c, tmp_path / "a")
    back = runs.load(tmp_path / "a")
    assert back.model.vocab_size == runs.load(base).model.vocab_size + 1
    for path, x in flat(done.params).items():
        np.testing.assert_array_equal(flat(back.params)[path], x)


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(add=("<|end|>",)), r"tokenizer.add has '<\|end\|>', which is a token already"),
        (dict(add=("<|a|>", "<|a|>")), "which is a token already"),
        (dict(add=(" ",)), "which is empty"),
        (dict(kind="bytes", path="", add=("<|a|>",)), "add goes with kind='file'"),
    ],
)
def test_tokens_that_cannot_be_added_are_refused(base, tmp_path, fields, message):
    c = config.experiment()
    c.stages.tokenizer = config.tokenizer(**dict(kind="file", path=str(base / "tokenizer")) | fields)
    c.stages.tune = stage(init_from=str(base))
    with pytest.raises(LmtrainError, match=message):
        experiment.run(c, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_tokenizer_that_only_looks_larger_is_another_one(base, tmp_path):
    text = (base / "tokenizer/tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(text.replace('"<|pad|>"', '"<|fill|>"'))
    c = config.experiment()
    c.stages.tokenizer = config.tokenizer("file", path=str(tmp_path), add=("<|a|>",))
    c.stages.tune = stage(init_from=str(base))
    with pytest.raises(LmtrainError, match="trained with another tokenizer"):
        experiment.run(c, tmp_path / "a")


# --------------------------------------------------------------------------------------------------------- few bits
@pytest.mark.parametrize("kind, worst", [("int8", 0.01), ("nf4", 0.12)])
def test_a_quantised_base_is_near_what_it_was_and_comes_back_as_it_was_trained_with(base, tmp_path, kind, worst):
    pytest.importorskip("qwix")
    done = run(base, tmp_path / "a", quantize=kind, **LORA)
    before = flat(runs.load(base).params)
    back = flat(runs.load(tmp_path / "a").params)
    trained_with = flat(quantise.dequantised(done.params))
    assert back.keys() == trained_with.keys()
    apart = {}
    for path, x in back.items():
        np.testing.assert_allclose(x, trained_with[path], atol=1e-7)
        if path in before:
            apart[path] = np.linalg.norm(x - before[path]) / np.linalg.norm(before[path])
    matrices = {path for path in apart if path[-1] in quantise.MATRICES}
    assert all(0 < apart[path] < worst for path in matrices) and len(matrices) == 8 - 1  # q k v o gate up down
    assert all(apart[path] == 0 for path in apart.keys() - matrices)


@pytest.mark.slow
def test_a_quantised_model_computes_what_its_matrices_in_floating_point_do():
    pytest.importorskip("qwix")
    batch = {"tokens_BT": np.arange(24).reshape(2, 12), "targets_BT": np.ones((2, 12), np.int32)}
    for fields in (dict(), dict(experts=4, activation="swiglu", tied=False), dict(pattern="WG", window=4, layers=3)):
        cfg = transformer.resolve(
            schema.Model(**dict(layers=2, width=64, heads=4, mlp=96, zero_init=False) | fields), 40
        )
        params = transformer.init(cfg, jax.random.key(0))
        forward = transformer.Forward(cfg)
        loss = jax.jit(lambda p, f=forward: f.losses(p, batch).nll_BT)
        for kind in quantise.KINDS:
            few = quantise.quantised(params, kind)
            assert any(map(quantise.is_quantised, jax.tree.leaves(few, is_leaf=quantise.is_quantised)))
            np.testing.assert_allclose(loss(few), loss(quantise.rounded(params, kind)), atol=1e-5)
            assert np.abs(np.asarray(loss(few) - loss(params))).max() > 1e-5


def test_what_is_trained_is_not_quantised(base, tmp_path):
    with pytest.raises(LmtrainError, match="quantize is 'int8', but everything is trained"):
        run(base, tmp_path / "a", quantize="int8")
    with pytest.raises(LmtrainError, match="quantize: 'int4'.*(int8|nf4)"):
        run(base, tmp_path / "a", quantize="int4", **LORA)
