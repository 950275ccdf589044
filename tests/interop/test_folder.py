"""Folders that cannot be: each is refused by name, before anything is trained. And what needs no torch to be shown."""

import dataclasses
import json
import shutil
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lmtrain import mesh as meshes
from lmtrain import schema
from lmtrain.data import tokenizer
from lmtrain.interop import export, huggingface
from lmtrain.interop.families import FAMILIES
from lmtrain.models import transformer
from lmtrain.types import LmtrainError

V = 264  # of the bytes tokenizer
LLAMA = dict(activation="swiglu", qk_norm=False, tied=False)
MODELS = {
    "llama": LLAMA | dict(rope_scaling=schema.RopeScaling("llama3", 8.0, 64)),
    "mistral": LLAMA | dict(pattern="W", window=9),
    "qwen2": LLAMA | dict(qkv_bias=True, pattern="GWW", window=9),
    "qwen3": LLAMA | dict(qk_norm=True),
    "qwen3_moe": LLAMA | dict(qk_norm=True, experts=4, expert_mlp=24, router_norm=False),
    "mixtral": LLAMA | dict(experts=4),
    "gemma2": dict(activation="geglu", norm="gemma", post_norm=True, embed_scale=True, qk_norm=False, pattern="WG",
                   window=9, attn_softcap=5.0, logit_softcap=4.0, attn_scale=0.25),
    "gemma3_text": dict(activation="geglu", norm="gemma", post_norm=True, embed_scale=True, pattern="WWG", window=9,
                        rope_theta=1e6, rope_local_theta=1e4),
    "gpt2": dict(kv_heads=4, activation="gelu", norm="layernorm", positions="learned", max_positions=64, qk_norm=False,
                 qkv_bias=True, out_bias=True, mlp_bias=True),
    "phi3": LLAMA | dict(rotary=0.5, rope_scaling=schema.RopeScaling(
        "longrope", 4.0, 32, short=(1.0, 1.5), long=(2.0, 4.0))),
    "olmo2": LLAMA | dict(qk_norm=True, qk_norm_over="all", pre_norm=False, post_norm=True),
    "apertus": {},
    "arcee": dict(qk_norm=False, mlp_bias=True),
}  # fmt: skip


def model(kind):
    base = dict(layers=3, width=32, heads=4, kv_heads=2, mlp=48, zero_init=False)
    return transformer.resolve(schema.Model(**base | MODELS[kind]), V)


def parameters(cfg):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: rng.normal(0, 0.3, s.shape).astype(np.float32), transformer.shapes(cfg))


def write(to, kind="llama", **how):
    cfg = model(kind)
    params = parameters(cfg)
    export.write(to, cfg, params, tokenizer.bytes_tokenizer(), settings={}, texts={}, **how)
    return cfg, params


def same(a, b):
    flat = jax.tree_util.tree_leaves_with_path
    assert [p for p, _ in flat(a)] == [p for p, _ in flat(b)]
    for (path, x), (_, y) in zip(flat(a), flat(b), strict=True):
        np.testing.assert_array_equal(x, y, err_msg=str(path))


@pytest.mark.parametrize("kind", FAMILIES)
def test_what_is_written_reads_back_as_the_same_model_to_the_bit(kind, tmp_path):
    cfg, params = write(tmp_path / "m", kind, shard_bytes=30_000)
    assert json.loads((tmp_path / "m/config.json").read_text())["model_type"] == kind
    folder = huggingface.open_folder(f"hf:{tmp_path / 'm'}")
    assert export.differences(cfg, folder.model) == []
    same(folder.params(), params)
    assert folder.tokenizer().fingerprint == tokenizer.bytes_tokenizer().fingerprint


@pytest.mark.parametrize("kind", ["llama", "gpt2", "phi3", "qwen3_moe"])
@pytest.mark.parametrize("sizes", [dict(fsdp=4, tensor=2), dict(expert=2, fsdp=2, tensor=2), dict(data=8)])
def test_shards_hold_what_the_whole_holds(kind, sizes, tmp_path):
    """Read straight into the shards of a mesh, fused tensors and experts among them."""
    cfg, params = write(tmp_path / "m", kind, dtype="float32")
    mesh = meshes.make(schema.Mesh(**{"data": 1} | sizes))
    shardings = meshes.shardings(transformer.axes(cfg), mesh)
    got = huggingface.open_folder(str(tmp_path / "m")).params(shardings)
    same(got, params)
    for x, sharding in zip(jax.tree.leaves(got), jax.tree.leaves(shardings), strict=True):
        assert x.sharding == sharding


def test_a_model_that_no_class_computes_is_refused_with_what_is_in_the_way(tmp_path):
    cfg = transformer.resolve(schema.Model(layers=2, width=32, heads=4, embed_norm=True), V)
    with pytest.raises(LmtrainError, match="no class of transformers computes this model; apertus would, but for "
                                           "model.embed_norm=True"):  # fmt: skip
        export.choose(cfg)
    assert not (tmp_path / "m").exists()
    with pytest.raises(LmtrainError, match="--family is 'lama'.* Did you mean llama?"):
        export.choose(cfg, "lama")


def test_an_interrupted_export_leaves_nothing_and_one_that_is_there_is_not_touched(tmp_path, monkeypatch):
    write(tmp_path / "m")
    before = (tmp_path / "m/model.safetensors").read_bytes()
    with pytest.raises(LmtrainError, match="is there already"):
        write(tmp_path / "m")
    assert (tmp_path / "m/model.safetensors").read_bytes() == before
    monkeypatch.setattr(export, "_joined", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "n")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]


# -------------------------------------------------------------------------------------------------------- wrong input
def config(folder, **changes):
    file = folder / "config.json"
    values = json.loads(file.read_text())
    for name, value in changes.items():
        values[name] = value
        if value is ...:
            del values[name]
    file.write_text(json.dumps(values))


def tensors(folder, change):
    file = folder / "model.safetensors"
    held = dict(load_file(file))
    change(held)
    save_file(held, file)


def cut(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5000])


def another_tokenizer(folder):
    config(folder, vocab_size=200)
    tensors(folder, lambda t: t.update({n: t[n][:200].copy() for n in ("model.embed_tokens.weight", "lm_head.weight")}))


NORM = "model.layers.1.input_layernorm.weight"
WRONG = {
    "architecture": (lambda f: config(f, model_type="lama"), "model_type is 'lama'; .*Did you mean llama?"),
    "unknown architecture": (lambda f: config(f, model_type="bert"), "model_type is 'bert'; lmtrain reads llama, "),
    "a class": (lambda f: config(f, architectures=["LlamaForTokenClassification"]), "architectures is .*TokenClass"),
    "a field": (lambda f: config(f, qk_layernorm=True), "field qk_layernorm=True is not understood"),
    "a misspelt field": (lambda f: config(f, rope_tetha=5.0), "rope_tetha=5.0 is not understood.*mean rope_theta?"),
    "quantised": (lambda f: config(f, quantization_config={"bits": 4}), "quantization_config is .*'bits': 4"),
    "activation": (lambda f: config(f, hidden_act="gelu"), "hidden_act is 'gelu', which .* takes 'silu'"),
    "a kind": (lambda f: config(f, num_hidden_layers="3"), "num_hidden_layers is '3', but takes int"),
    "partial rotary": (lambda f: config(f, partial_rotary_factor=0.5), "partial_rotary_factor is 0.5, but this family"),
    "missing field": (lambda f: config(f, hidden_size=...), "hidden_size is missing, but takes int"),
    "rope kind": (lambda f: config(f, rope_parameters={"rope_type": "yarm", "factor": 2.0}), "'yarm' is .* mean yarn"),
    "rope field": (lambda f: config(f, rope_parameters={"rope_type": "linear", "factor": 2.0, "alpha": 1}),
                   "rope scaling 'linear' has alpha=1"),
    "heads": (lambda f: config(f, num_key_value_heads=3), "model.kv_heads is 3, which does not divide"),
    "no json": (lambda f: (f / "config.json").write_text("{"), "config.json: cannot be read as JSON"),
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no model.safetensors and no model.safetensors.index"),
    "cut short": (cut, "model.safetensors: cut short or damaged"),
    "empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "model.safetensors: cut short or damaged"),
    "no tensor": (lambda f: tensors(f, lambda t: t.pop(NORM)), f"tensor {NORM} is missing, .32. by config.json"),
    "another shape": (lambda f: tensors(f, lambda t: t.update({NORM: np.ones(31, np.float32)})), "is .31., but"),
    "another dtype": (lambda f: tensors(f, lambda t: t.update({NORM: np.ones(32, np.int8)})), f"{NORM} is I8; lmtrain"),
    "float64": (lambda f: tensors(f, lambda t: t.update({NORM: np.ones(32)})), f"{NORM} is F64; lmtrain reads F32"),
    "one more": (lambda f: tensors(f, lambda t: t.update(extra=np.ones(3, np.float32))), "tensor extra has no place"),
    "layers": (lambda f: config(f, num_hidden_layers=2), r"tensor model.layers.2.\S+ has no place in the model"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer.json"),
    "tokenizer": (another_tokenizer, "tokenizer.json has 264 tokens, but config.json's vocab_size is 200"),
}  # fmt: skip


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound") / "m"
    write(folder)
    return folder


@pytest.mark.parametrize("what", WRONG)
def test_a_folder_that_cannot_be_is_refused_by_name(what, sound, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(sound, folder)
    spoil, message = WRONG[what]
    spoil(folder)
    with pytest.raises(LmtrainError, match=message) as error:
        huggingface.open_folder(str(folder)).tokenizer()
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_a_missing_shard_is_named(tmp_path):
    write(tmp_path / "m", shard_bytes=30_000)
    lost = sorted((tmp_path / "m").glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(LmtrainError, match=f"{lost.name} is missing, of"):
        huggingface.open_folder(str(tmp_path / "m"))


def test_the_command_names_it_and_trains_nothing(sound, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(sound, folder)
    cut(folder)
    (tmp_path / "t.txt").write_text("some text\n" * 500)
    done = subprocess.run(
        [sys.executable, "-m", "lmtrain.cli", "run", "--config", "experiments/pretrain.py", "--workdir",
         str(tmp_path / "run"), f"--config.stages.pretrain.init_from=hf:{folder}",
         "--config.stages.pretrain.data.source=text", f"--config.stages.pretrain.data.path={tmp_path / 't.txt'}"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and "cut short or damaged" in done.stderr
    assert done.stderr.count("\n") == 1 and not (tmp_path / "run").exists()


def test_16_bits_stay_16_bits_where_nothing_is_trained(tmp_path):
    _, params = write(tmp_path / "m", dtype="bfloat16")
    folder = huggingface.open_folder(str(tmp_path / "m"))
    stored = folder.params(dtype="stored")
    assert {x.dtype for x in jax.tree.leaves(stored)} == {np.dtype(ml_dtypes.bfloat16)}
    same(stored, jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), params))
    assert {x.dtype for x in jax.tree.leaves(folder.params())} == {np.dtype(np.float32)}


def test_the_fields_of_a_model_all_count_when_two_are_compared():
    """A field added to schema.Model is either compared, or says that it changes nothing."""
    known = {f.name for f in dataclasses.fields(schema.Model)}
    assert known >= export.IGNORED
    a = model("llama")
    assert export.differences(a, dataclasses.replace(a, norm_eps=1e-4)) == ["norm_eps"]
    assert export.differences(a, dataclasses.replace(a, remat="full", window=0)) == []


def test_a_copy_is_the_same_model_and_a_changed_weight_is_another(sound, tmp_path):
    shutil.copytree(sound, tmp_path / "m", copy_function=shutil.copyfile)  # with dates of its own
    first = huggingface.open_folder(str(sound)).identity
    assert huggingface.open_folder(str(tmp_path / "m")).identity == first
    file = tmp_path / "m/model.safetensors"
    data = bytearray(file.read_bytes())
    data[-20_000] ^= 1  # one bit, and the size as it was
    file.write_bytes(data)
    assert huggingface.open_folder(str(tmp_path / "m")).identity != first


def test_a_whole_number_may_be_written_for_a_real_one_but_not_for_a_bool(sound, tmp_path):
    shutil.copytree(sound, tmp_path / "m")
    config(tmp_path / "m", pretraining_tp=1.0)
    huggingface.open_folder(str(tmp_path / "m"))
    config(tmp_path / "m", pretraining_tp=True)
    with pytest.raises(LmtrainError, match="pretraining_tp is True"):
        huggingface.open_folder(str(tmp_path / "m"))


def test_an_imported_model_begins_a_text_with_its_own_token_in_training_sampling_and_scoring(tmp_path, monkeypatch):
    """Llama's and Gemma's: <s> begins a document, </s> (here <|endoftext|>) ends it."""
    from tokenizers import processors

    from lmtrain import config, engine, experiment, publish, runs
    from lmtrain.eval import likelihood

    tok = tokenizer.bytes_tokenizer().with_specials(["<s>"])
    tok.backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", V)])
    cfg = transformer.resolve(
        schema.Model(layers=1, width=32, heads=4, kv_heads=2, mlp=48, zero_init=False, **LLAMA), V + 1
    )
    export.write(tmp_path / "m", cfg, parameters(cfg), tok, settings={}, texts={})
    (tmp_path / "t.txt").write_text("\n\n".join(f"line {i} of it" for i in range(200)))
    c = config.experiment()
    c.stages.more = config.stage(
        init_from=f"hf:{tmp_path / 'm'}", steps=1, batch_size=8, samples=1, sample_tokens=4,
        data=config.data("text", path=str(tmp_path / "t.txt"), document="paragraph", row_length=32),
    )  # fmt: skip
    asked = []
    kept = engine.generate
    monkeypatch.setattr(engine, "generate", lambda *a, **k: asked.append(a[2]) or kept(*a, **k))
    experiment.run(c, tmp_path / "run")
    assert {p[0] for prompts in asked for p in prompts} == {V}, "the stage's samples"
    run = runs.load(tmp_path / "run")
    assert (run.tokenizer.begin, run.tokenizer.end) == (V, 0) and likelihood.begin(run.tokenizer) == [V]
    seen = []
    monkeypatch.setattr(engine, "stream", lambda model, params, ids, how, decode: seen.append((ids, how.stop)) or [])
    run.generate("line")
    assert seen == [([V, *tok.encode("line")], (0,))]
    publish.export(str(tmp_path / "run"), str(tmp_path / "out"))
    ids = json.loads((tmp_path / "out/config.json").read_text())
    assert ids["bos_token_id"] == V and ids["eos_token_id"] == [7, 0]
    assert tokenizer.load(tmp_path / "out").begin == V
