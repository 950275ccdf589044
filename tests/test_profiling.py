"""What a run tells of its own time: a trace of some steps, and seconds in metrics.jsonl."""

import json

import pytest

from lmtrain import compilation, config, experiment, profiling
from lmtrain.schema import ConfigError


def tiny(folder, **fields):
    (folder / "text.txt").write_text("\n\n".join(f"This is line {i}, and {i * 7 % 13} follows." for i in range(200)))
    c = config.experiment(tensorboard=False, **fields)
    c.stages.tokenizer = config.tokenizer("bytes")
    c.stages.pretrain = config.stage(
        steps=6, batch_size=8, samples=0, log_every=1, eval_every=0, checkpoint_every=2,
        model=config.model(layers=1, width=32, heads=4, mlp=48),
        data=config.data("text", path=str(folder / "text.txt"), document="paragraph", row_length=32),
    )  # fmt: skip
    return c


def test_a_trace_of_the_asked_steps_is_written_and_time_is_told(tmp_path, capsys):
    before = dict(compilation.spent())
    experiment.run(tiny(tmp_path, profile="2:3"), tmp_path / "run")
    traces = list((tmp_path / "run/pretrain/profile").rglob("*.xplane.pb"))
    assert len(traces) == 1 and b"jit_update" in traces[0].read_bytes()
    assert "a trace of steps 3 to 5" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "run/pretrain/metrics.jsonl").read_text().splitlines()]
    last = rows[-1]
    assert last["data_wait_seconds"] > 0 and last["step_seconds"] > 0
    assert [r.get("checkpoint_wait_seconds", 0) > 0 for r in rows] == [False] * 3 + [True] * 4, "saved after step 2"
    assert last["compile_seconds"] + last["cache_hits"] > before["compile_seconds"] + before["cache_hits"]


def test_a_run_that_ends_within_its_trace_keeps_it(tmp_path):
    experiment.run(tiny(tmp_path, profile="4:100"), tmp_path / "run")
    assert list((tmp_path / "run/pretrain/profile").rglob("*.xplane.pb"))


@pytest.mark.parametrize("ask", ["100", "5:0", "a:b", "-1:2", "1:2:3"])
def test_what_is_no_trace_is_refused(ask, tmp_path):
    with pytest.raises(ConfigError, match=f"profile is '{ask}', but takes STEP:COUNT"):
        experiment.run(tiny(tmp_path, profile=ask), tmp_path / "run")
    assert profiling.parse("3:2") == (3, 2) and profiling.parse("") == (0, 0)
