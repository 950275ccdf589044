"""The named models have the sizes that their makers publish."""

import pytest

from lmtrain.models import presets, transformer
from lmtrain.schema import ConfigError

# Parameters as published in the model cards or papers (Gemma 3 4B: the text model; Mixtral and Qwen: total, active).
PUBLISHED = {
    "llama3-1b": 1.236e9,
    "llama3-8b": 8.030e9,
    "llama3-70b": 70.55e9,
    "qwen3-0.6b": 0.596e9,
    "qwen3-8b": 8.19e9,
    "gemma3-1b": 1.00e9,
    "gemma3-4b": 3.88e9,
    "mistral-7b": 7.242e9,
    "mixtral-8x7b": 46.70e9,
    "qwen3-30b-a3b": 30.5e9,
}
ACTIVE = {"mixtral-8x7b": 12.9e9, "qwen3-30b-a3b": 3.3e9}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name):
    cfg = transformer.resolve(presets.get(name))
    assert transformer.count(cfg)["total"] == pytest.approx(PUBLISHED[name], rel=3e-3)
    assert transformer.count(cfg)["active"] == pytest.approx(ACTIVE.get(name, PUBLISHED[name]), rel=2e-2)


@pytest.mark.parametrize("name, flops, row_length", [("S", 80.2e6, 256), ("M", 6 * 91.2e6 + 12 * 12 * 768 * 512, 512)])
def test_the_benchmark_shapes_cost_what_their_readme_says(name, flops, row_length):
    cfg = transformer.resolve(presets.get(name))
    assert transformer.flops_per_token(cfg, row_length) == pytest.approx(flops, rel=2e-3)


def test_every_preset_resolves_with_a_tokenizer_s_vocabulary():
    for name, model in presets.presets().items():
        assert transformer.resolve(model, model.vocab_size or 32768).vocab_size >= 4096, name


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(ConfigError, match=r"'llama3_8b' is not a named model. Did you mean llama3-8b\?"):
        presets.get("llama3_8b")
