"""Against Hugging Face's own code: random models of every family, in and out. Needs torch: `make test-peers`."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmtrain import engine, experiment, publish, runs
from lmtrain.engine import Sampling
from lmtrain.interop import huggingface
from lmtrain.models import transformer

os.environ["HF_HUB_OFFLINE"] = "1"
torch = pytest.importorskip("torch", reason="PyTorch is not installed; `make test-peers` has it")
hf = pytest.importorskip("transformers")

V, T = 97, 256
SIZES = dict(vocab_size=V, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, head_dim=16, pad_token_id=0, bos_token_id=None, eos_token_id=None)  # fmt: skip
HEADS = {k: v for k, v in SIZES.items() if k != "head_dim"} | {"hidden_size": 64}  # of width / heads
GPT2 = dict(n_embd=48, n_layer=3, n_head=4, vocab_size=V, n_positions=300, bos_token_id=None, eos_token_id=None)


def scaled(kind, **more):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **more}}


YARN = dict(factor=4.0, original_max_position_embeddings=64)
LONG = dict(short_factor=[1.0 + 0.1 * i for i in range(8)], long_factor=[2.0 + 0.3 * i for i in range(8)])
EXPERTS = dict(num_experts=6, moe_intermediate_size=24)
CASES = {
    "llama": ("Llama", SIZES),
    "llama, odd sizes": ("Llama", SIZES | dict(hidden_size=36, num_attention_heads=6, num_key_value_heads=3,
                                               head_dim=10)),
    "llama, tied and biased": ("Llama", SIZES | dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True)),
    "llama 3": ("Llama", SIZES | scaled("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                                        original_max_position_embeddings=64)),
    "linear": ("Llama", SIZES | scaled("linear", factor=4.0)),
    "dynamic": ("Llama", SIZES | scaled("dynamic", factor=4.0) | dict(max_position_embeddings=128)),
    "yarn": ("Llama", SIZES | scaled("yarn", **YARN)),
    "yarn, its ends": ("Qwen3", SIZES | scaled("yarn", **YARN, beta_fast=16, beta_slow=2, attention_factor=1.3,
                                               truncate=False)),
    "yarn, mscale": ("Mistral", SIZES | scaled("yarn", **YARN, mscale=1.2, mscale_all_dim=0.8)),
    "mistral": ("Mistral", SIZES | dict(sliding_window=20)),
    "mistral, no window": ("Mistral", SIZES | dict(sliding_window=None)),
    "qwen 2": ("Qwen2", HEADS | dict(use_sliding_window=True, sliding_window=24, max_window_layers=1)),
    "qwen 2, no window": ("Qwen2", HEADS | dict(tie_word_embeddings=True)),
    "qwen 3": ("Qwen3", SIZES | dict(attention_bias=True)),
    "qwen 3 moe": ("Qwen3Moe", SIZES | EXPERTS | dict(num_experts_per_tok=2, norm_topk_prob=True)),
    "qwen 3 moe, windows": ("Qwen3Moe", SIZES | EXPERTS | dict(num_experts_per_tok=3, norm_topk_prob=False,
                                                               use_sliding_window=True, sliding_window=16)),
    "mixtral": ("Mixtral", SIZES | dict(num_local_experts=4, sliding_window=30)),
    "gemma 2": ("Gemma2", SIZES | dict(sliding_window=24, query_pre_attn_scalar=10, attn_logit_softcapping=3.0,
                                       final_logit_softcapping=5.0)),
    "gemma 3": ("Gemma3Text", SIZES | dict(num_hidden_layers=8, sliding_window=24, query_pre_attn_scalar=10)),
    "gemma 3, linear": ("Gemma3Text", SIZES | dict(num_hidden_layers=7, sliding_window=24, rope_parameters={
        "full_attention": dict(rope_type="linear", factor=8.0, rope_theta=1e6),
        "sliding_attention": dict(rope_type="default", rope_theta=1e4)})),
    "gpt-2": ("GPT2", GPT2),
    "gpt-2, untied": ("GPT2", GPT2 | dict(n_inner=70, tie_word_embeddings=False)),
    "phi 3": ("Phi3", HEADS | dict(sliding_window=50)),
    "phi 3, partial rotary": ("Phi3", HEADS | scaled("default", partial_rotary_factor=0.75)),
    "phi 3, longrope": ("Phi3", HEADS | scaled("longrope", **LONG) | dict(
        max_position_embeddings=512, original_max_position_embeddings=128)),
    "olmo 2": ("Olmo2", HEADS),
    "olmo 2, biased": ("Olmo2", HEADS | dict(attention_bias=True, tie_word_embeddings=True)),
    "apertus": ("Apertus", SIZES | dict(hidden_act="relu2")),
    "arcee": ("Arcee", SIZES | dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True)),
}  # fmt: skip


def made(case, folder, **more):
    """A random model of transformers, saved; every parameter away from what a fresh one has."""
    name, fields = CASES[case]
    config = getattr(hf, f"{name}Config")(**fields)
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            spread, middle = (0.2, 0.0) if p.ndim > 1 else (0.3, 0.0 if "bias" in key else 0.5)
            p.copy_(torch.randn_like(p) * spread + middle)
    model.save_pretrained(folder, **more)
    return model


def ours(model, params, tokens_BT, real_BT=None):
    forward = transformer.Forward(model)
    batch = {"tokens_BT": tokens_BT}
    if real_BT is not None:
        batch["segments_BT"] = real_BT.astype(np.int32)
    return np.asarray(jax.jit(lambda p: forward.logits(p, forward.hidden(p, batch)[0]))(params))


def theirs(model, tokens_BT, real_BT=None):
    with torch.no_grad():
        mask = None if real_BT is None else torch.tensor(real_BT).long()
        return model(torch.tensor(np.asarray(tokens_BT)).long(), attention_mask=mask).logits.float().numpy()


@pytest.mark.parametrize("case", CASES)
def test_logits_and_greedy_tokens_are_those_of_transformers(case, tmp_path):
    """Logits of 256 positions with rows that end before, and 32 greedy tokens."""
    theirs_model = made(case, tmp_path)
    folder = huggingface.open_folder(str(tmp_path))
    params = folder.params()
    by_length = folder.model.rope_scaling.kind in ("dynamic", "longrope")  # there transformers goes by the longest row
    lengths = np.array([T] if by_length else [T, 200, 131])
    real_BT = np.arange(T)[None] < lengths[:, None]
    tokens_BT = np.random.default_rng(0).integers(1, V, real_BT.shape).astype(np.int32) * real_BT
    got, expected = ours(folder.model, params, tokens_BT, real_BT), theirs(theirs_model, tokens_BT, real_BT)
    assert np.abs(got - expected)[real_BT].max() < 1e-4
    assert expected[real_BT].std() > 0.2

    prompt = tokens_BT[:1, :20]
    with torch.no_grad():
        drawn = theirs_model.generate(torch.tensor(prompt).long(), max_new_tokens=32, do_sample=False, pad_token_id=0)
    reply = engine.generate(folder.model, params, prompt.tolist(), Sampling(32, 0.0))[0]
    assert reply.tokens == drawn[0, 20:].tolist()


@pytest.mark.parametrize("case", ["llama", "qwen 3 moe", "gpt-2"])
def test_files_in_shards_and_in_16_bits_are_read(case, tmp_path):
    theirs_model = made(case, tmp_path / "whole").to(torch.bfloat16)
    theirs_model.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    folder = huggingface.open_folder(str(tmp_path / "shards"))
    tokens_BT = np.random.default_rng(0).integers(1, V, (2, 64))
    assert folder.dtype == "bfloat16"
    assert {x.dtype.name for x in jax.tree.leaves(folder.params(dtype="stored"))} == {"bfloat16"}
    got = ours(folder.model, folder.params(), tokens_BT)
    np.testing.assert_allclose(got, theirs(loads(tmp_path / "shards"), tokens_BT), atol=1e-4)


def test_gpt_2s_older_files_are_read(tmp_path):
    """Without "transformer." in the names, with masks as buffers, as the hub's gpt2 is."""
    from safetensors.torch import load_file, save_file

    theirs_model = made("gpt-2", tmp_path)
    tensors = {k.removeprefix("transformer."): v for k, v in load_file(tmp_path / "model.safetensors").items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 300, 300).tril()
    save_file(tensors, tmp_path / "model.safetensors")
    folder = huggingface.open_folder(str(tmp_path))
    tokens_BT = np.random.default_rng(0).integers(1, V, (2, 64))
    np.testing.assert_allclose(
        ours(folder.model, folder.params(), tokens_BT), theirs(theirs_model, tokens_BT), atol=1e-4
    )


@pytest.mark.parametrize("name", ["Llama", "Qwen2", "Qwen3", "Qwen3Moe", "Mistral", "Mixtral", "Gemma2", "Gemma3Text",
                                  "GPT2", "Phi3", "Olmo2"])  # fmt: skip
def test_a_configuration_written_out_in_full_is_understood(name, tmp_path):
    config = getattr(hf, f"{name}Config")()
    config.architectures = None
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    family, model = huggingface.read_config(tmp_path / "config.json")
    assert model.layers == config.num_hidden_layers and model.width == config.hidden_size


# ------------------------------------------------------------------------------------------------------------- out
def loads(folder):
    how = dict(output_loading_info=True, attn_implementation="eager", dtype=torch.float32)
    model, info = hf.AutoModelForCausalLM.from_pretrained(folder, **how)
    assert not any(info.values()), info
    return model.eval()


@pytest.mark.parametrize("case", CASES)
def test_what_was_read_is_written_so_that_transformers_loads_the_same(case, tmp_path):
    from lmtrain.data import tokenizer
    from lmtrain.interop import export

    theirs_model = made(case, tmp_path / "in")
    folder = huggingface.open_folder(str(tmp_path / "in"))
    kind = json.loads((tmp_path / "in/config.json").read_text())["model_type"]
    export.write(tmp_path / "out", folder.model, folder.params(), tokenizer.bytes_tokenizer(), settings={}, texts={},
                 kind=kind, shard_bytes=60_000)  # fmt: skip
    back = loads(tmp_path / "out")
    tokens_BT = np.random.default_rng(0).integers(1, V, (1, T))
    np.testing.assert_allclose(theirs(back, tokens_BT), theirs(theirs_model, tokens_BT), atol=1e-5)


TALKS = {
    "one turn": [("user", "Hi")],
    "system": [("system", "Be brief."), ("user", "2+2?\n"), ("assistant", " 4 "), ("user", "ok é\U0001f600")],
    "ended": [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")],
}
CALLS = [
    {"role": "user", "content": "x"},
    {"role": "assistant", "content": "", "tool_calls": [{"name": "calc", "arguments": '{"a": 1}'}]},
    {"role": "tool", "content": "5"},
    {"role": "assistant", "content": "five"},
]
TOOLS = [{"type": "function", "function": {"name": "calc", "description": "é", "parameters": {"type": "object"}}}]
SCRATCH = {
    "default": {},
    "llama": dict(activation="swiglu", qk_norm=False, tied=False),
    "qwen 3, windows": dict(activation="swiglu", pattern="GW", window=20),
    "no scales": dict(norm_scale=False, qk_norm_scale=False),
    "mixture": dict(activation="swiglu", experts=4, experts_per_token=2, expert_mlp=24),
    "gelu": dict(activation="gelu", qk_norm=False, mlp_bias=True),
}


@pytest.fixture(scope="module", params=SCRATCH)
def scratch(request, tmp_path_factory):
    """A run that lmtrain trained from nothing, and its folder for transformers."""
    from lmtrain import config

    here = tmp_path_factory.mktemp("scratch")
    (here / "text.txt").write_text("\n\n".join(f"This is line {i}, and {i * 7 % 13} follows." for i in range(300)))
    c = config.experiment()
    c.stages.tokenizer = config.tokenizer("bpe", vocab_size=300)
    c.stages.pretrain = config.stage(
        steps=12, batch_size=8, samples=0,
        model=config.model(layers=2, width=32, heads=4, mlp=48, **SCRATCH[request.param]),
        data=config.data("text", path=str(here / "text.txt"), document="paragraph", row_length=32),
        optim=config.optim("adamw", lr=0.02),
    )  # fmt: skip
    experiment.run(c, here / "run")
    publish.export(str(here / "run"), str(here / "out"))
    return runs.load(here / "run"), here / "out"


def test_a_model_from_scratch_is_loaded_by_transformers_with_the_same_logits(scratch):
    run, folder = scratch
    model = loads(folder)
    tokens_BT = np.random.default_rng(0).integers(0, run.model.vocab_size, (2, T))
    np.testing.assert_allclose(theirs(model, tokens_BT), ours(run.model, run.params, tokens_BT), atol=1e-4)
    assert f"{transformer.count(run.model)['total']:,} parameters" in (folder / "README.md").read_text()


def test_an_exported_tokenizer_and_template_give_the_same_ids(scratch):
    run, folder = scratch
    tok = hf.AutoTokenizer.from_pretrained(folder)
    for text in ("Hello wörld\n    def f(x):\n\treturn 1  \r\n", "a  b   c 1234 \U0001f600", "", " lead", "line 12"):
        assert tok(text)["input_ids"] == run.tokenizer.encode(text)
    talks = [[{"role": r, "content": c} for r, c in talk] for talk in TALKS.values()] + [CALLS]
    for talk in talks:
        for tools in ([], TOOLS):
            ask = talk[-1]["role"] != "assistant"
            how = dict(tools=tools or None, tokenize=True, return_dict=True, add_generation_prompt=ask)
            got = tok.apply_chat_template(talk, **how, return_assistant_tokens_mask=not ask)
            if ask:
                assert got["input_ids"] == run.template.prompt(talk, tools)
            else:
                ids, weights = run.template.encode(talk, tools)
                assert got["input_ids"] == ids.tolist() and got["assistant_masks"] == weights.tolist()


def test_a_reply_of_the_exported_model_ends_where_lmtrains_does(scratch):
    run, folder = scratch
    settings = json.loads((folder / "generation_config.json").read_text())
    assert settings["eos_token_id"] == list(run.template.stop)
    assert jnp.isfinite(jnp.asarray(run.params["embed"]["table"])).all()


@pytest.mark.parametrize("add", [None, True, False])
@pytest.mark.parametrize("written", [True, False])
def test_a_text_begins_as_transformers_begins_it(written, add, tmp_path):
    from tokenizers import processors

    from lmtrain.data import tokenizer

    tok = tokenizer.bytes_tokenizer().with_specials(["<s>"])
    if written:
        start = [("<s>", tok.vocab_size - 1)]
        tok.backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=start)
    tok.save(tmp_path)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(config | ({} if add is None else {"add_bos_token": add}))
    )
    ours = tokenizer.load(tmp_path)
    begin = [ours.begin] if ours.begin != ours.end else []
    theirs = hf.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs("abc")["input_ids"] == begin + ours.encode("abc")


# ------------------------------------------------------------------------------------------------------------ adapters
ADAPTERS = {
    "llama": {},
    "qwen 2": dict(matrices=("attn/[qv]",)),
    "phi 3": dict(rslora=True),
    "gpt-2": {},
    "gemma 2": dict(dora=True),
    "phi 3, dora": dict(dora=True, matrices=("attn/*", "mlp/up")),
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_an_adapter_gives_the_same_logits_in_peft_as_merged(case, tmp_path):
    """A rank-8 fine-tune of an imported folder, exported both ways."""
    from lmtrain import config, schema
    from lmtrain.data import tokenizer

    peft = pytest.importorskip("peft")
    name, fields = CASES[case.removesuffix(", dora")]
    torch.manual_seed(0)
    base = hf.AutoModelForCausalLM.from_config(getattr(hf, f"{name}Config")(**fields | dict(vocab_size=264)))
    base.save_pretrained(tmp_path / "base")
    tokenizer.bytes_tokenizer().save(tmp_path / "base")
    (tmp_path / "text.txt").write_text("\n\n".join(f"Line {i}: {i * 7 % 13} follows." for i in range(200)))
    c = config.experiment()
    c.stages.tune = config.stage(
        steps=8, batch_size=8, samples=0, init_from=f"hf:{tmp_path / 'base'}",
        model=config.model(lora=schema.Lora(8, **ADAPTERS[case])),
        data=config.data("text", path=str(tmp_path / "text.txt"), document="paragraph", row_length=32),
        optim=config.optim("adamw", lr=0.02),
    )  # fmt: skip
    run = experiment.run(c, tmp_path / "run")
    publish.export(str(tmp_path / "run"), str(tmp_path / "merged"))
    publish.export_adapter(str(tmp_path / "run"), str(tmp_path / "adapter"))
    tokens_BT = np.random.default_rng(0).integers(0, 264, (2, 64))
    adapted = peft.PeftModel.from_pretrained(loads(tmp_path / "base"), tmp_path / "adapter").eval()
    got, expected = theirs(adapted, tokens_BT), theirs(loads(tmp_path / "merged"), tokens_BT)
    np.testing.assert_allclose(got, expected, atol=1e-4)
    np.testing.assert_allclose(got, ours(run.model, run.params, tokens_BT), atol=1e-4)
    assert np.abs(got - theirs(loads(tmp_path / "base"), tokens_BT)).max() > 0.01
