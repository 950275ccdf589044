"""What a run tells of its own time: a trace of some steps, and seconds in metrics.jsonl."""

import json
import os
import signal
import subprocess
import sys

import pytest

from lmtrain import compilation, config, experiment, log, profiling
from lmtrain.schema import ConfigError
from lmtrain.types import Stopped


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
    assert "a trace of the steps from 3 on, 3 at most" in capsys.readouterr().out
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


@pytest.mark.slow
def test_compiling_counts_from_the_start_of_the_process(tmp_path):
    tiny(tmp_path)
    (tmp_path / "tiny.py").write_text(
        "import pathlib, tests.test_profiling as t\ndef get_config(arg=''):\n"
        f"    c = t.tiny(pathlib.Path({str(tmp_path)!r}))\n    c.stages.pretrain.steps = int(arg)\n    return c\n"
    )
    for steps in (2, 4):
        argv = ["-m", "lmtrain.cli", "run", "--config", f"tiny.py:{steps}", "--workdir", "run"]
        paths = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])
        where = os.environ | {"PYTHONPATH": paths}
        subprocess.run([sys.executable, *argv], cwd=tmp_path, env=where, check=True, capture_output=True)
    rows = [json.loads(line) for line in (tmp_path / "run/pretrain/metrics.jsonl").read_text().splitlines()]
    for row in (rows[0], rows[3]):  # the first of each start
        assert row["compile_seconds"] + row["cache_hits"] > 0


def test_a_signal_at_the_last_step_of_a_stage_stops_the_next_one(tmp_path, monkeypatch):
    c = tiny(tmp_path)
    c.stages.second = config.stage(**{k: v for k, v in c.stages.pretrain.items() if k != "model"})
    kept = log.Progress.show

    def show(self, step, metrics):
        if self.name == "pretrain" and step == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        kept(self, step, metrics)

    monkeypatch.setattr(log.Progress, "show", show)
    with pytest.raises(Stopped, match="second: stopped by SIGTERM at step 1"):
        experiment.run(c, tmp_path / "run")
