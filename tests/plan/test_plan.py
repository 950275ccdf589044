"""lmtrain plan: memory against the compiler, the search, mesh=auto, and what is refused."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import pytest

from lmtrain import cli, config, mesh, schema
from lmtrain.mesh import AXES
from lmtrain.models import presets, transformer
from lmtrain.objectives import pretrain
from lmtrain.plan import ahead, chips, job, memory, plan, search, traffic
from lmtrain.types import LmtrainError

CONFIG = "experiments/pretrain.py:1m,steps=10"
BASE = ["--config.stages.pretrain.batch_size=64"]


def made(name="8b", rows=64, length=4096, topology="v5p:4x4x4", remat="full", optimizer="adamw", accumulate=1,
         microbatches=0, **sizes):  # fmt: skip
    model = dataclasses.replace(presets.get(name), remat=remat, microbatches=microbatches)
    model = transformer.resolve(model, model.vocab_size or 131072)
    stage = schema.Stage(batch_size=rows, accumulate=accumulate, model=model, loss=pretrain.Pretrain(),
                         data=schema.Data(row_length=length), optim=schema.Optim(name=optimizer))  # fmt: skip
    axes = dict.fromkeys(AXES, 1) | sizes
    return job.Job("pretrain", stage, model, chips.parse(topology), axes, job.memories_of(stage, model))


def parts(**how):
    return memory.estimate(made(**how)).parts


def test_fsdp_splits_the_state_and_data_does_not():
    count = transformer.count(made().model)["total"]
    assert parts(data=64)["parameters"] == 4 * count
    assert parts(fsdp=64)["parameters"] == pytest.approx(4 * count / 64, rel=1e-2)
    assert parts(fsdp=64)["optimizer"] == pytest.approx(8 * count / 64, rel=1e-2)


@pytest.mark.parametrize("optimizer", ["muon", "adamw", "lion"])
def test_the_state_is_what_the_run_allocates(optimizer):
    one = made("1m", rows=16, length=64, topology="cpu:8", optimizer=optimizer, fsdp=4, tensor=2)
    abstract, _, _ = one.state()

    def local(tree):
        leaves = [x for x in jax.tree.leaves(tree) if x.ndim]
        return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)

    got = memory.estimate(one).parts
    assert got["parameters"] == local(abstract.params)
    assert got["optimizer"] == pytest.approx(local(abstract.opt_state), rel=1e-4)  # Muon's few coefficients aside


def test_each_rematerialisation_keeps_less_than_the_one_before():
    none, dots, full = (parts(fsdp=64, remat=remat)["activations kept"] for remat in ("none", "dots", "full"))
    assert none > dots > full
    assert full == pytest.approx(32 * 4096 * 4096 * 2, rel=0.01)  # a layer's input in 16 bits, and nothing else


def test_more_microbatches_keep_less_but_for_a_second_gradient():
    one, four = (parts(fsdp=8, data=8, rows=256, accumulate=a) for a in (1, 4))
    assert four["activations kept"] == one["activations kept"] / 4
    assert four["gradients"] == 2 * one["gradients"]


def test_stages_keep_what_their_idle_turns_do_and_hold_a_turn_more():
    none, four, eight = (parts(fsdp=16, stage=s, microbatches=m) for s, m in ((1, 0), (4, 4), (4, 8)))
    rows = none["activations kept"] / 4  # four times as many ways for the batch
    assert (four["activations kept"], eight["activations kept"]) == (rows * 7 / 4, rows * 11 / 8)
    gradient = 2 * four["weights in 16 bits"]
    assert none["a turn of the stages"] == 0
    assert four["a turn of the stages"] == pytest.approx(rows / 4 + gradient)
    assert eight["a turn of the stages"] == pytest.approx(rows / 8 + gradient)


def test_what_is_not_trained_has_no_gradient_in_a_turn_of_the_stages():
    whole = made(fsdp=16, stage=4)
    adapters = {path: 8.0 for path in whole.memories if path[0] != "layers"}
    kept, turn = memory.activations(dataclasses.replace(whole, memories=adapters))[::2]
    assert turn == kept / 7 < memory.activations(whole)[2]


@pytest.mark.parametrize("sizes", [{"fsdp": 64}, {"fsdp": 8, "expert": 8}], ids=str)
def test_products_of_experts_are_worked_out_again_under_dots(sizes):
    none, dots, full = (parts(name="mixtral-8x7b", remat=remat, **sizes)["activations kept"]
                        for remat in ("none", "dots", "full"))  # fmt: skip
    assert none > 5 * dots > 5 * full


def test_the_search_puts_what_fits_first_and_the_fastest_before():
    found = search.ranked(made("1b", rows=16, length=1024, topology="v5e:2x4"))
    fits = [c.fits for c in found]
    assert fits == sorted(fits, reverse=True) and any(fits)
    assert [c.seconds for c in found if c.fits] == sorted(c.seconds for c in found if c.fits)
    assert all(c.job.sizes["fsdp"] * c.job.sizes["data"] * c.job.sizes["tensor"] == 8 for c in found)


def test_a_model_that_no_chip_holds_is_split():
    best = search.ranked(made("70b", rows=512, topology="v5p:8x8x8"), same_batches=True)[0]
    assert best.fits and best.job.sizes["fsdp"] * best.job.sizes["tensor"] > 8


TWO = """from lmtrain import config
def get_config(arg=""):
    c = config.experiment()
    for name, rows, steps in (("heavy", 64, 10), ("light", 4, 1)):
        c.stages[name] = config.stage(model=config.preset("1m", vocab_size=0), batch_size=rows, steps=steps,
                                      data=config.data("text", path="x", row_length=256))
    return c
"""


@pytest.fixture
def two_stages(tmp_path):
    (tmp_path / "two.py").write_text(TWO)
    return str(tmp_path / "two.py")


def test_mesh_auto_divides_every_stage(two_stages):
    e = config.build(config.override(config.load(two_stages), ["--config.mesh=auto"]))
    assert e.mesh.auto
    chosen = search.auto(e, jax.devices())
    assert not chosen.auto and mesh.make(chosen).size == 8
    alone = search.ranked(search.make_any(e, "heavy", chips.of_devices(jax.devices())), same_batches=True)[0]
    assert alone.job.ways == 8 and 4 % alone.job.ways  # what the stage that computes most would take, were it alone
    sizes = mesh.resolve(chosen, 8)
    for name in ("heavy", "light"):
        job.make(e, name, chips.of_devices(jax.devices()), sizes)  # refuses a mesh that divides unevenly


def test_the_plan_of_mesh_auto_is_on_the_runs_mesh(two_stages):
    for stage in ("heavy", "light"):
        got = plan(two_stages, "v5e:2x4", stage, overrides=["--config.mesh=auto"])
        assert math.prod(got["mesh"].get(axis, 1) for axis in mesh.BATCH_AXES) in (1, 2, 4)


def test_no_mesh_for_every_stage_is_one_message(two_stages):
    with pytest.raises(LmtrainError, match=r"no mesh of 8 devices divides every batch_size.*light: 3 \(accumulate=3"):
        plan(two_stages, "v5e:2x4", overrides=["--config.mesh=auto", "--config.stages.light.batch_size=3",
                                               "--config.stages.light.accumulate=3"])  # fmt: skip


@pytest.mark.parametrize(
    "shape, overrides, says", [
        ("2x4", ["--config.mesh=auto", "--config.stages.pretrain.batch_size=8",
                 "--config.stages.pretrain.accumulate=8"], "mesh.auto: no mesh of 8 devices"),
        ("2x2", ["--config.stages.pretrain.batch_size=4", "--config.stages.pretrain.accumulate=4"],
         "must be a multiple of 16"),
        ("2x2", ["--config.mesh.fsdp=3", *BASE], "asks for a multiple of 3 devices"),
    ])  # fmt: skip
def test_a_search_describes_its_best_where_the_configured_mesh_does_not_divide(shape, overrides, says, capsys):
    got = plan(CONFIG, f"v5e:{shape}", searches=True, overrides=overrides)
    assert says in got["note"] and "Not as configured" in capsys.readouterr().out
    best = got["search"][0]
    assert (got["mesh"], got["accumulate"], got["remat"]) == (best["mesh"], best["accumulate"], best["remat"])
    with pytest.raises(LmtrainError, match=says):
        plan(CONFIG, f"v5e:{shape}", overrides=overrides)


def test_a_search_keeps_the_configured_mesh_where_it_divides():
    got = plan(CONFIG, "v5e:2x2", searches=True, overrides=["--config.mesh.data=1", "--config.mesh.fsdp=4", *BASE])
    assert got["mesh"] == {"fsdp": 4} and "note" not in got


def test_devices_that_are_missing_are_named_before_anything_is_compiled(capsys):
    assert cli.main(["plan", "--config", CONFIG, *BASE, "--topology", "cpu:16", "--compile"]) == 2
    said = capsys.readouterr()
    assert "16 devices, 8 are here" in said.err and "compiling" not in said.out + said.err


def test_the_plan_is_written_down(tmp_path, capsys):
    assert cli.main(["plan", "--config", CONFIG, "--topology", "v5e:4x4", *BASE, "--price", "1.5", "--search",
                     "--json", str(tmp_path / "p.json")]) == 0  # fmt: skip
    said = capsys.readouterr().out
    assert "MFU" in said and "in money" in said and "the best by the roofline" in said
    got = json.loads((tmp_path / "p.json").read_text())
    assert got["devices"] == 16 and got["memory"]["fits"] and 0 < got["mfu"] <= 1
    assert got["cost"] == pytest.approx(1.5 * got["days"] * 24 * 16)
    assert got["tokens"] == 10 * 64 * 256


def test_a_well_known_shape_takes_the_tokenizers_vocabulary():
    e, name = job.read("experiments/pretrain.py:mixtral-8x7b")
    assert job.models(e)[name].vocab_size == 131072 != transformer.resolve(presets.get("mixtral-8x7b")).vocab_size


def test_past_what_is_compiled_the_plan_says_so(capsys):
    plan(CONFIG, "v5p:16x16x24", slices=16, overrides=["--config.stages.pretrain.batch_size=98304"])
    assert "not compiled at this size" in capsys.readouterr().out


@pytest.mark.parametrize(
    "more, says", [
        (["--topology", "v5x:4x4"], "no chip"),
        (["--topology", "v5e:4x4", "--stage", "pretrian"], "Did you mean pretrain?"),
        (["--topology", "v5e:4x4", "--config.mesh.fsdp=3"], "asks for a multiple of 3 devices, but 16"),
        (["--topology", "v5e:4x4", "--config.stages.pretrain.batch_size=24"], "must be a multiple of 16"),
        (["--topology", "v5e:4x4", "--price", "-1"], "--price is -1"),
        (["--topology", "v5e:4x4", "--search", "--config.stages.pretrain.batch_size=3",
          "--config.stages.pretrain.data.row_length=255"], "a multiple of 16 does"),
        (["--topology", "v5x:4x4", "--json", "no/such/folder/p.json"], "in a folder that is there"),
        (["--topology", "v5e:4x4", "--slices", "3", "--config.mesh.fsdp=48"], "only the data axis"),
    ])  # fmt: skip
def test_what_cannot_be_planned_is_refused_in_one_sentence(more, says, capsys):
    assert cli.main(["plan", "--config", CONFIG, *BASE, *more]) == 2
    assert says in capsys.readouterr().err


def test_out_of_memory_is_read_off_both_of_libtpus_messages():
    begin = "RESOURCE_EXHAUSTED: Ran out of memory on HBM, "
    one = begin + "the total memory required for HLO temporaries (56.00G) exceeds available HBM (15.75G)."
    two = begin + "used more. Used 18.50G of 15.75G hbm. Exceeded hbm capacity by 2.75G."
    assert ahead.out_of_memory(one) == (56 * 2**30, 15.75 * 2**30)
    assert ahead.out_of_memory(two) == (18.5 * 2**30, 15.75 * 2**30)
    assert ahead.out_of_memory("INVALID_ARGUMENT: no such thing") is None


def test_mfu_is_bounded_by_what_is_computed_twice():
    none, full = (traffic.roofline(made(fsdp=64, remat=remat)) for remat in ("none", "full"))
    assert none.mfu <= 1 and full.mfu <= 0.75 + 1e-6 and none.mfu_serial <= none.mfu


def test_within_its_own_error_of_the_limit_the_plan_says_neither_yes_nor_no(capsys):
    need = memory.estimate(made(fsdp=64))
    said = [need.says(need.total * more) for more in (1.3, 1.05, 0.95, 0.7)]
    assert said == ["fits", "at the limit", "at the limit", "does not fit"]
    surely = [c for c in search.ranked(made("1b", rows=16, length=1024, topology="v5e:2x4")) if c.fits]
    assert all(c.memory.total <= 0.85 * c.job.topology.chip.memory for c in surely)


def test_heads_narrower_than_a_tpus_lanes_are_counted_as_padded():
    def kept(head_dim, heads):
        model = dataclasses.replace(made("117m").model, head_dim=head_dim, heads=heads, kv_heads=heads)
        return memory._traced(model, "dots", "G", 1024, "bfloat16", "splash", 1)

    padded = 2 * 1024 * 12 * (128 - 64)  # the output of attention, once, in 16 bits
    assert kept(64, 12) - kept(128, 6) == pytest.approx(padded + 4 * 1024 * 6)  # and each head's sum, float32


def test_the_height_of_a_cpus_program_has_what_it_works_in():
    program = jax.jit(lambda x: jnp.sort(jnp.sin(x) @ x.T, axis=0) @ x).lower(jnp.zeros((256, 256))).compile()
    assert ahead.height(program.memory_analysis(), "cpu") >= 3 * 256 * 256 * 4  # argument, product, result
