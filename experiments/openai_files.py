"""Fine-tuning files of OpenAI's, in their usual order: supervised, then preference, then reinforcement with a grader.

    lmtrain check talks.jsonl
    lmtrain run --config experiments/openai_files.py:supervised=talks.jsonl --workdir runs/talks
    lmtrain run --config experiments/openai_files.py:init=runs/talks,preference=pairs.jsonl --workdir runs/pairs
    lmtrain run --config \
        experiments/openai_files.py:init=runs/talks,reinforcement=prompts.jsonl,grader=grader.json --workdir runs/rl

A file that is not named has no stage. `init=RUN` starts from a run; else a tokenizer and 400 steps of pretraining on
Python's documentation come first: enough to see that all works, not to have a good model.
"""

from lmtrain import config
from lmtrain.schema import ConfigError


def get_config(arg=""):
    a = config.parse_arg(
        arg, supervised="", preference="", reinforcement="", grader="", init="", steps=200, rl_steps=60, pretrain=400,
        row_length=1024, max_tokens=128, group=8,
    )  # fmt: skip
    if not (a.supervised or a.preference or a.reinforcement):
        raise ConfigError("name a file: openai_files.py:supervised=talks.jsonl (preference, reinforcement with grader)")
    c = config.experiment()
    if not a.init:
        c.stages.tokenizer = config.tokenizer("bpe", vocab_size=1024, data=config.data("stdlib", path="docs"))
        c.stages.pretrain = config.stage(
            steps=a.pretrain,
            batch_size=8,
            model=config.model(layers=4, width=128, heads=4),
            data=config.data("stdlib", path="docs", row_length=256),
        )
    start = a.init  # of the first stage; the next start from the one before
    for name, objective, path in (("supervised", "sft", a.supervised), ("preference", "dpo", a.preference)):
        if path:
            slow = 10 if objective == "dpo" else 1
            c.stages[name] = config.stage(
                objective=objective,
                init_from=start,
                steps=a.steps,
                batch_size=8,
                eval_every=50,
                checkpoint_every=50,
                optim=config.optim("muon", muon_lr=0.01 / slow, lr=0.002 / slow),
                data=config.data("openai", path=path, row_length=a.row_length),
            )
            start = ""
    if a.reinforcement:
        task = f"openai(path={a.reinforcement!r}, grader={a.grader!r}, max_tokens={a.max_tokens})"
        c.stages.reinforcement = config.stage(
            objective="grpo",
            init_from=start,
            steps=a.rl_steps,
            batch_size=8 * a.group,
            eval_every=20,
            checkpoint_every=20,
            data=config.data(row_length=a.row_length, heldout_rows=64),
            optim=config.optim("muon", muon_lr=0.002, lr=0.001, schedule="constant", warmup=0),
            rollout=config.rollout(task, group=a.group),
        )
    return c
