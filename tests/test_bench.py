"""The benchmarks measure what they say and print one line of JSON last."""

import json

import pytest

from lmtrain import bench, schema
from lmtrain.models import presets
from lmtrain.types import LmtrainError


def test_generation_is_timed_at_every_batch_beside_a_ceiling(monkeypatch, capsys):
    monkeypatch.setattr(presets, "get", lambda name: schema.Model(layers=1, width=16, heads=2, mlp=16, vocab_size=32))
    result = bench.generate("S", batches="1,3", new=5, prompt=4, reps=2, cache=False)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    assert list(result["by_batch"]) == ["1", "3"] and result["new"] == 5
    for row in result["by_batch"].values():
        assert 0 < row["min"] <= row["tokens_per_second"] <= row["max"] and row["bound"] in ("memory", "matmul")
        assert 0 <= row["share"] < 1 and row["first_call_s"] > 0


def test_a_benchmark_refuses_what_it_cannot_time():
    with pytest.raises(LmtrainError, match="--batches is 'one'"):
        bench.generate(batches="one")
    with pytest.raises(LmtrainError, match="--new is 0"):
        bench.generate(new=0)
