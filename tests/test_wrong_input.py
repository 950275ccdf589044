"""Bad settings and files: each ends the command non-zero, with one message that names the thing, and leaves nothing."""

import gzip
import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from lmtrain import checkpoint, cli
from lmtrain.types import StorageError

ROOT = pathlib.Path(__file__).parent.parent
TINY = """
from lmtrain import config
def get_config(arg=""):
    a = config.parse_arg(arg, steps=2)
    c = config.experiment(tensorboard=False)
    c.stages.tokenizer = config.tokenizer("bytes")
    c.stages.pretrain = config.stage(
        steps=a.steps, batch_size=8, samples=0, model=config.model(layers=1, width=32, heads=2),
        data=config.data("text", path=PATH, row_length=16, heldout_fraction=0.2))
    return c
"""
S = "--config.stages.pretrain."
STAGES = ["--config.mesh.stage=2", "--config.mesh.data=1", "--config.mesh.fsdp=4"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 60)
    (tmp_path / "tiny.py").write_text(TINY.replace("PATH", repr(str(tmp_path / "text.txt"))))
    return tmp_path


def assert_refused(capsys, argv, *words):
    """Runs the command; it must fail with one message on stderr that has every word."""
    try:
        code = cli.main(argv)
    except SystemExit as end:  # argparse's own
        code = end.code
    said = capsys.readouterr().err
    assert code not in (0, None), f"accepted: {argv}"
    assert "Traceback" not in said
    for word in words:
        assert word in said, said
    return said


def run(*flags, config="tiny.py"):
    return ["run", "--config", config, "--workdir", "out", *flags]


SETTINGS = [
    ([S + "optim.lrate=1"], ["stages.pretrain.optim", "lrate", "Did you mean lr"]),
    ([S + "model.layers=two"], ["model.layers", "'two'", "whole number"]),
    ([S + "model.layers=0"], ["layers", "0"]),
    ([S + "model.heads=3"], ["heads", "3"]),
    ([S + "model.kv_heads=3", S + "model.heads=4"], ["kv_heads", "3", "4"]),
    ([S + "model.activation=swigloo"], ["activation", "swigloo", "swiglu"]),
    ([S + "model.norm=batchnorm"], ["norm", "layernorm", "rmsnorm"]),
    ([S + "model.pattern=GW"], ["window"]),
    ([S + "model.pattern=GX", S + "model.window=4"], ["pattern", "X"]),
    ([S + "model.rope_scaling.kind=yarrn"], ["rope_scaling", "yarrn", "yarn"]),
    ([S + "model.experts=2", S + "model.experts_per_token=3"], ["experts_per_token", "3", "2"]),
    ([S + "model.attention=flash"], ["attention", "flash"]),
    ([S + "model.attention=cudnn"], ["cudnn"]),
    ([S + "model.attention=splash"], ["splash"]),
    ([S + "model.remat=some"], ["remat", "some"]),
    ([S + "model.dtype=float12"], ["dtype", "float12"]),
    ([S + "model.vocab_size=100"], ["vocab_size", "100", "264"]),
    ([S + "optim.name=admw"], ["optim", "admw", "adamw"]),
    ([S + "optim.schedule=cosin"], ["schedule", "cosin", "cosine"]),
    ([S + "optim.lr=-1"], ["lr", "-1"]),
    ([S + "objective=pretrian"], ["objective", "pretrian", "pretrain"]),
    ([S + "steps=0"], ["steps", "0", "at least 1"]),
    ([S + "batch_size=9", S + "accumulate=2"], ["batch_size", "9", "accumulate"]),
    ([S + "init_from=nowhere"], ["nowhere"]),
    (["--config.mesh.tensor=3"], ["mesh", "3"]),
    (["--config.mesh.data=1", "--config.mesh.tensor=8"], ["tensor", "8", "heads"]),
    ([*STAGES, S + "model.layers=3"], ["mesh.stage=2", "model.rounds=1", "3 groups", "layers=3", "one of 1, 3"]),
    ([*STAGES, S + "model.layers=3", S + "model.vocab_size=264"], ["mesh.stage=2", "model.layers=3", "one of 1, 3"]),
    ([*STAGES, S + "model.rounds=2", S + "model.layers=2"], ["mesh.stage=2", "rounds=2", "2 groups", "one of 1, 2"]),
    ([*STAGES, S + "model.rounds=0", S + "model.layers=2"], ["rounds", "0", "at least 1"]),
    ([*STAGES, S + "model.layers=5", S + "model.pattern=GWW", S + "model.window=4"], ["1 groups", "pattern GWW"]),
    ([*STAGES, S + "model.layers=2", S + "model.microbatches=3"], ["microbatches is 3", "multiple of mesh.stage=2"]),
    ([*STAGES, S + "model.layers=2", S + "batch_size=12"], ["batch_size is 12", "multiple of 8", "stage"]),
    ([*STAGES, S + "model.layers=2", S + "model.microbatches=4"], ["batch_size is 8", "of 16", "microbatches=4"]),
    ([*STAGES, S + "model.layers=2", S + "accumulate=2"], ["batch_size is 8", "16", "accumulate=2", "stage"]),
    (["--config.mesh.context=8", S + "data.row_length=12"], ["row_length", "12", "context"]),
    (["--config.mesh.data=-1", "--config.mesh.fsdp=-1"], ["-1"]),
    (["--config.stages.tokenizer.kind=bytez"], ["bytez", "bytes"]),
    (["--config.stages.tokenizer.kind=file", "--config.stages.tokenizer.path=none.json"], ["none.json"]),
    (["--config.stages.tokenizer.kind=bpe", "--config.stages.tokenizer.vocab_size=12"], ["vocab_size", "12", "264"]),
    ([S + "data.source=txt"], ["source", "txt", "text"]),
    ([S + "data.path=text.tx"], ["text.tx", "text.txt"]),
    ([S + "data.document=chapter"], ["document", "chapter"]),
    ([S + "data.heldout=some"], ["heldout", "some"]),
    ([S + "data.row_length=100000"], ["row_length", "100000"]),
    ([S + "prompts=()", S + "samples=1"], ["prompts", "empty"]),
    ([S + "prompts=(1,2)"], ["prompts", "text"]),
    ([S + "spike=-1"], ["spike", "-1"]),
    ([S + "objective=os:path"], ["objective", "os:path", "function"]),
    ([S + "objective=os:getcwd"], ["objective", "os:getcwd"]),
    ([S + "objective=:x"], ["objective", ":x"]),
    ([S + "optim.args.speed=3"], ["speed"]),
    (["--config.seed=-1"], ["seed", "-1"]),
    (["--nothing=1"], ["--nothing"]),
]


@pytest.mark.parametrize(("flags", "words"), SETTINGS, ids=lambda x: x[0] if isinstance(x, list) and x else str(x))
def test_an_impossible_setting(place, capsys, flags, words):
    assert_refused(capsys, run(*flags), *words)
    assert not (place / "out").exists(), "a half-written run is left behind"


def write(name, content):
    pathlib.Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return name


FILES = {
    "empty file": (lambda: write("e.txt", ""), "text", ["e.txt", "empty"]),
    "empty folder": (lambda: os.makedirs("folder") or "folder", "text", ["folder"]),
    "glob of nothing": (lambda: "*.nothing", "text", ["*.nothing"]),
    "broken gzip": (lambda: write("b.txt.gz", gzip.compress(b"text " * 999)[:-20]), "text", ["b.txt.gz"]),
    "broken JSONL line": (
        lambda: write("b.jsonl", '{"text": "fine"}\n' * 3 + '{"text": "cut'),
        "jsonl",
        ["b.jsonl:4"],
    ),
    "row without the field": (
        lambda: write("f.jsonl", '{"text": "fine"}\n{"txt": "misspelt"}\n'),
        "jsonl",
        ["f.jsonl:2", "text", "txt"],
    ),
    "field that is no text": (lambda: write("n.jsonl", '{"text": 5}\n'), "jsonl", ["n.jsonl:1", "text"]),
    "not a Parquet file": (lambda: write("p.parquet", "no"), "parquet", ["p.parquet"]),
    "not an ArrayRecord": (lambda: write("a.arrayrecord", "no"), "arrayrecord", ["a.arrayrecord"]),
    "too little text": (lambda: write("s.txt", "tiny"), "text", ["heldout"]),
}


@pytest.mark.parametrize("name", FILES)
def test_a_bad_file(place, capsys, name):
    make, source, words = FILES[name]
    assert_refused(capsys, run(f"{S}data.source={source}", f"{S}data.path={make()}"), *words)
    assert not (place / "out").exists(), "a half-written run is left behind"


def test_a_configuration_that_is_none(place, capsys):
    assert_refused(capsys, run(config="tin.py"), "tin.py", "tiny.py")
    write("broken.py", "def get_config(:\n")
    assert_refused(capsys, run(config="broken.py"), "broken.py:1")
    write("empty.py", "")
    assert_refused(capsys, run(config="empty.py"), "get_config")
    assert_refused(capsys, run(config="tiny.py:stpes=3"), "stpes", "steps")
    assert_refused(capsys, ["run", "--workdir", "out"], "--config")


def test_a_workdir_that_cannot_be(place, capsys):
    write("file", "")
    assert_refused(capsys, ["run", "--config", "tiny.py", "--workdir", "file"], "file", "folder")
    assert_refused(capsys, ["run", "--config", "tiny.py", "--workdir", "/proc/here"], "/proc/here")


def test_a_run_is_not_continued_as_something_else(place, capsys):
    assert cli.main(run()) == 0
    capsys.readouterr()
    assert_refused(capsys, run(S + "model.layers=2"), "layers=1", "2", "--workdir")
    assert_refused(capsys, run("--config.stages.tokenizer.kind=bpe"), "tokenizer", "bytes", "--workdir")
    tokenizer = pathlib.Path("out/tokenizer/tokenizer.json")
    whole = tokenizer.read_text()
    tokenizer.write_text(whole[:100])
    assert_refused(capsys, run(), "tokenizer.json")
    changed = json.loads(whole)
    changed["normalizer"] = {"type": "Lowercase"}
    tokenizer.write_text(json.dumps(changed))
    assert_refused(capsys, run(), "tokenizer", "--workdir")
    tokenizer.write_text(whole)
    assert cli.main(run()) == 0  # nothing was lost
    capsys.readouterr()
    pathlib.Path("text.txt").write_text("Other text altogether. " * 200)
    assert_refused(capsys, run(S + "steps=9"), "corpus", "--workdir")


def test_commands_on_folders_that_are_no_runs(place, capsys):
    assert_refused(capsys, ["generate", "nowhere"], "nowhere")
    os.makedirs("bare")
    assert_refused(capsys, ["inspect", "bare"], "bare", "checkpoints")
    assert_refused(capsys, ["bench", "train", "--preset", "1bb"], "1bb", "1b")
    assert cli.main(run()) == 0
    capsys.readouterr()
    assert_refused(capsys, ["generate", "ou"], "ou", "out")
    assert_refused(capsys, ["generate", "out", "--tokens", "0"], "max_tokens")
    assert_refused(capsys, ["generate", "out", "--temperature", "-1"], "temperature")
    assert_refused(capsys, ["generate", "out", "--temperature", "nan"], "temperature")
    assert_refused(capsys, ["generate", "out", "--samples", "0"], "samples")
    pathlib.Path("out/pretrain/config.json").write_text("{")
    assert_refused(capsys, ["generate", "out"], "config.json")
    assert_refused(capsys, ["run", "--config", "tiny.py", "--workdir", ""], "--workdir")


def test_two_processes_do_not_share_a_run(place, capsys):
    import fcntl

    os.makedirs("out")
    with open("out/.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert_refused(capsys, run(), "another process")


def test_a_full_disk_ends_in_one_message_and_keeps_what_there_is(place):
    small = place / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no right to mount a small disk here")
    try:
        quick = "import sys; from lmtrain import checkpoint, cli, storage; sys.exit(cli.main())"
        quick = quick.replace("sys.exit", "checkpoint.PAUSES = storage.PAUSES = (0.1, 0.1); sys.exit")
        argv = [sys.executable, "-c", quick, "run", "--config", "tiny.py:400", "--workdir", "small/out"]
        flags = [S + "checkpoint_every=20", S + "keep_last=50", S + "model.width=64"]
        done = subprocess.run([*argv, *flags], capture_output=True, text=True, timeout=300)
        assert done.returncode == StorageError.status == 74, done.stderr
        assert "Traceback" not in done.stderr and "space" in done.stderr.lower(), done.stderr
        kept = checkpoint.steps("small/out/pretrain/checkpoints")
        assert kept and not checkpoint.verify("small/out/pretrain/checkpoints", kept[-1])
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)
        shutil.rmtree(small, ignore_errors=True)


def test_help_explains_itself(capsys):
    for argv in (
        ["--help"],
        ["run", "--help"],
        ["generate", "--help"],
        ["bench", "train", "--help"],
        ["inspect", "--help"],
    ):
        with pytest.raises(SystemExit) as end:
            cli.main(argv)
        assert end.value.code == 0
        assert len(capsys.readouterr().out) > 100
    cli.main([])
    assert "COMMAND" in capsys.readouterr().out
