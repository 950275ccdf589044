"""The pages: no link to nowhere, and the code on them runs."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert "://" in target or (page.parent / target).exists(), f"{page.name}: {target}"


def test_settings_on_the_pages_exist():
    """Every --config.x.y=value on a page is a field of schema.py."""
    from lmtrain import config, flags

    c = config.experiment()
    c.stages.pretrain = config.stage()
    c.stages.tokenizer = config.tokenizer()
    for stage, objective in (("sft", "sft"), ("reward", "reward"), ("preference", "dpo"), ("rl", "dapo")):
        c.stages[stage] = config.stage(objective=objective)
    for page in PAGES:
        for flag in re.findall(r"--config\.[\w.]+=[^\s`#]*", page.read_text()):
            if "a.b" not in flag and "loss.gamma" not in flag and "ideas:exploring" not in flag:
                flags.check_path(c, flag)  # raises where it is none


def ideas(folder):
    blocks = re.findall(r"```python\n(# ideas\.py.*?)```", (ROOT / "docs/extend.md").read_text(), re.S)
    assert len(blocks) == 3
    (folder / "ideas.py").write_text("\n".join(blocks))


@pytest.mark.slow
def test_the_policy_loss_on_the_page_trains_a_model(tmp_path):
    ideas(tmp_path)
    argv = [sys.executable, "-m", "lmtrain.cli", "run", "--config", str(ROOT / "experiments/grpo.py:sft=2,steps=2")]
    argv += ["--workdir", "out", "--config.stages.rl.objective=ideas:exploring", "--config.stages.rl.loss.bonus=0.1"]
    done = subprocess.run(argv, cwd=tmp_path, env={**os.environ, "PYTHONPATH": "."}, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def test_the_objective_and_the_source_on_the_page_train_a_model(tmp_path):
    ideas(tmp_path)
    (tmp_path / "letters").mkdir()
    for i in range(120):
        (tmp_path / f"letters/{i}.letter").write_text(f"Dear number {i}, " + "how are you? " * (i % 7 + 30))
    flags = ["objective=ideas:focal", "loss.gamma=1", "data.source=ideas:letters", "data.path=letters", "samples=0"]
    argv = [sys.executable, "-m", "lmtrain.cli", "run", "--config", str(ROOT / "experiments/pretrain.py:1m,steps=2")]
    argv += ["--workdir", "out", *[f"--config.stages.pretrain.{f}" for f in flags]]
    done = subprocess.run(argv, cwd=tmp_path, env={**os.environ, "PYTHONPATH": "."}, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
