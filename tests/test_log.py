"""metrics.jsonl stays one valid object a line whatever happens; the bar, the rates, the table of peaks."""

import io
import json
import resource
import subprocess
import sys
import time
import types

import jax.numpy as jnp
import numpy as np
import pytest

from lmtrain import log, storage
from lmtrain.types import LmtrainError, StorageError


def lines(folder):
    """Every line, parsed strictly: NaN and Infinity are no JSON."""

    def refuse(constant):
        raise AssertionError(constant)

    return [json.loads(x, parse_constant=refuse) for x in (folder / "metrics.jsonl").read_text().splitlines()]


# -------------------------------------------------------------------------------------------------------------- writer
def test_one_object_a_line_with_plain_numbers(tmp_path):
    writer = log.Writer(tmp_path / "a" / "b", tensorboard=False)
    writer.write(1, {"loss": np.float32(2.5), "tokens": 64, "mfu": None})
    writer.write(2, {"loss": jnp.float32("nan"), "worst": float("inf"), "note": "new\nline"})
    rows = lines(tmp_path / "a" / "b")
    assert rows == [
        {"step": 1, "loss": 2.5, "tokens": 64, "mfu": None},
        {"step": 2, "loss": None, "worst": None, "note": "new\nline"},
    ]
    assert log.read_metrics(tmp_path / "a" / "b") == rows


def test_a_resumed_run_writes_no_step_twice(tmp_path):
    for last in (7, 9):
        writer = log.Writer(tmp_path, tensorboard=False)
        writer.truncate(4)
        for step in range(5 if last == 9 else 0, last + 1):
            writer.write(step, {"loss": float(step)})
    assert [r["step"] for r in lines(tmp_path)] == list(range(10))


def test_a_line_cut_by_a_kill_is_dropped(tmp_path):
    writer = log.Writer(tmp_path, tensorboard=False)
    writer.write(1, {"loss": 1.0})
    with writer.file.open("a") as f:
        f.write('{"step": 2, "lo')
    assert [r["step"] for r in log.read_metrics(tmp_path)] == [1]
    log.Writer(tmp_path, tensorboard=False).write(2, {"loss": 2.0})
    assert [r["step"] for r in lines(tmp_path)] == [1, 2]
    with writer.file.open("a") as f:
        f.write('{"step": 3')
    log.Writer(tmp_path, tensorboard=False).truncate(1)
    assert [r["step"] for r in lines(tmp_path)] == [1]


@pytest.mark.parametrize("text", ["a\u2028b", "a\u2029b", "a\x85b", "a\x0bb\x0cc\x1cd", "a\r\nb", '{"x": 1}\n{'])
def test_no_character_of_a_text_ends_a_line(tmp_path, text):
    file = tmp_path / "samples.jsonl"
    log.append_jsonl(file, [{"step": 1, "text": text}, {"step": 2, "text": text}])
    with file.open("a", newline="") as f:
        f.write(json.dumps({"step": 3, "text": text}, ensure_ascii=False) + "\n")  # as other programs write it
    assert log.read_jsonl(file) == [{"step": n, "text": text} for n in (1, 2, 3)]
    log.truncate_jsonl(file, 2)
    log.append_jsonl(file, [])
    assert log.read_jsonl(file) == [{"step": n, "text": text} for n in (1, 2)]
    assert [p.name for p in tmp_path.iterdir()] == ["samples.jsonl"]


@pytest.mark.parametrize("broken", [b"{", b"", b"[1]", b"\xff", b'{"step": 1}{"step": 2}'])
def test_a_broken_line_is_named_wherever_it_stands(tmp_path, broken):
    file = tmp_path / "metrics.jsonl"
    for content in (b'{"step": 1}\n%b\n{"step": 3}\n', b'{"step": 1}\n%b\n'):
        file.write_bytes(content % broken)
        with pytest.raises(LmtrainError, match="metrics.jsonl:2: "):
            log.read_metrics(tmp_path)


def test_a_line_that_a_full_disk_refused_is_written_once_there_is_room(tmp_path, monkeypatch):
    pauses, left = [], [2]

    def drop(file):
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(log, "_drop_cut_line", drop)
    monkeypatch.setattr(storage.time, "sleep", pauses.append)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    log.append_jsonl(tmp_path / "metrics.jsonl", [{"step": 2}])
    assert [r["step"] for r in lines(tmp_path)] == [1, 2] and pauses == [0.5, 1.0]
    left[0] = 99
    with pytest.raises(StorageError, match="No space left"):
        log.append_jsonl(tmp_path / "metrics.jsonl", [{"step": 3}])
    assert len(pauses) == 6


def test_a_full_disk_is_one_message_and_leaves_no_cut_line(tmp_path):
    writer = log.Writer(tmp_path, tensorboard=False)
    writer.write(1, {"loss": 1.0})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (40, limits[1]))  # no file beyond 40 bytes
        with pytest.raises(LmtrainError, match=r"metrics.jsonl: could not be written: File too large.*goes on"):
            writer.write(2, {"loss": 2.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "metrics.jsonl").read_bytes()[-1:] != b"\n"  # the disk took a part
    assert [r["step"] for r in log.read_metrics(tmp_path)] == [1]
    writer.write(2, {"loss": 3.0})
    assert [r["loss"] for r in lines(tmp_path)] == [1.0, 3.0]


def test_no_metrics_yet(tmp_path):
    assert log.read_metrics(tmp_path) == []
    log.Writer(tmp_path, tensorboard=False).truncate(0)


def test_tensorboard_has_the_same_numbers_and_hides_what_was_forgotten(tmp_path):
    pytest.importorskip("tensorboardX")
    writer = log.Writer(tmp_path)
    writer.write(1, {"loss": 2.0, "note": "text"})
    writer.truncate(1)
    writer.write(2, {"loss": 1.0})
    writer.close()
    content = b"".join(p.read_bytes() for p in (tmp_path / "tensorboard").iterdir())
    assert b"loss" in content and len(list((tmp_path / "tensorboard").iterdir())) == 2


def test_without_tensorboardx_the_run_goes_on_and_says_so_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    writer = log.Writer(tmp_path)
    writer.write(1, {"loss": 2.0})
    writer.write(2, {"loss": 2.0})
    assert capsys.readouterr().out.count("pip install -e '.[tensorboard]'") == 1 and len(lines(tmp_path)) == 2


def test_importing_log_imports_nothing_heavy():
    heavy = "('tensorboardX', 'rich.progress', 'orbax', 'torch')"
    code = f"import sys, lmtrain.log; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


# ------------------------------------------------------------------------------------------------------------ progress
def test_plain_lines_at_intervals_at_evaluations_and_at_the_end(capsys):
    with log.Progress(100, name="pretrain", every=40) as progress:
        for step in range(1, 101):
            row = {"loss": 2.0, "tokens_per_second": 12345.6, "mfu": 0.347}
            progress.show(step, {**row, "heldout_loss": 1.5} if step == 55 else row)
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in out] == ["40/100", "55/100", "80/100", "100/100"]
    assert out[0].startswith("pretrain 40/100  loss 2.000  12,346 tokens/s  MFU 34.7%  ") and out[0].endswith("left")
    assert "held out 1.500" in out[1] and "held out" not in out[2] and "left" not in out[3]


def test_numbers_that_are_not_known_are_left_out(capsys):
    with log.Progress(10, name="x", every=1) as progress:
        progress.show(0, {})
        progress.show(1, {"loss": 1.0, "tokens_per_second": None, "mfu": None})
    assert capsys.readouterr().out.splitlines()[1].startswith("x 1/10  loss 1.000  0:00 left")


def test_a_terminal_gets_a_live_bar(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with log.Progress(10, 3, name="pretrain") as progress:
        progress.show(5, {"loss": 2.125, "tokens_per_second": 1000.0, "mfu": 0.5})
        log.say("a message above the bar")
    text = terminal.getvalue()
    assert "pretrain" in text and "5/10" in text and "loss 2.125" in text and "a message above the bar" in text


def test_time_left_reads_as_a_clock():
    assert [log._clock(s) for s in (0.4, 59.6, 61, 3661)] == ["0:00", "1:00", "1:01", "1:01:01"]


# --------------------------------------------------------------------------------------------------------------- speed
def test_rates_count_steps_but_neither_compilation_nor_pauses(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    meter = log.Meter(flops_per_token=6.0, peak=10.0, devices=2)
    meter.restart()
    assert meter.rates() == (None, None)
    now[0] = 50.0  # compilation, with the first step
    meter.step(100)
    assert meter.rates() == (None, None)
    for _ in range(3):
        now[0] += 2.0
        meter.step(100)
    assert meter.rates() == (pytest.approx(50.0), pytest.approx(50.0 * 6 / 20))
    with meter.paused():
        now[0] += 1000.0
    now[0] += 2.0
    meter.step(100)
    assert meter.rates()[0] == pytest.approx(50.0)


def test_rates_are_of_the_last_steps(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    meter = log.Meter(6.0, None, devices=1, window=4)
    for seconds in [10.0] * 10 + [1.0] * 4:
        now[0] += seconds
        meter.step(100)
    assert meter.rates() == (pytest.approx(100.0), None)


def test_rates_count_the_tokens_that_each_step_had(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    meter = log.Meter(6.0, None, devices=1)
    for tokens in (1000, 30, 10, 20):  # the first step's are not in the time that is measured
        now[0] += 2.0
        meter.step(tokens)
    assert meter.rates() == (pytest.approx(10.0), None)


@pytest.mark.parametrize(
    "kind, peak",
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA H20", 148e12),
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("TPU v3", 61.5e12),
        ("cpu", None),
        ("Radeon", None),
    ],
)
def test_peaks(kind, peak):
    assert log.peak_flops(types.SimpleNamespace(device_kind=kind)) == peak


def test_the_ceiling_of_this_machine_is_a_plausible_number():
    assert 1e8 < log.matmul_ceiling(seconds=0.05) < 1e15
