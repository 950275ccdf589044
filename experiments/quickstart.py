"""The quickstart: raw text to a small chat model, learned while you watch.

    make quickstart         or: lmtrain run --config experiments/quickstart.py --workdir runs/quickstart

Pretraining on Python's own documentation, supervised fine-tuning on demonstrations of small tasks, reinforcement
learning on the same tasks, and the three models scored on the same held-out problems. 0.8M parameters.
"""

from lmtrain import config

TASKS = ("addition(reversed=True)", "spelling")


def get_config(arg=""):
    a = config.parse_arg(arg, steps=1000, sft=600, rl=120)
    model = config.model(layers=4, width=128, heads=4)
    c = config.experiment()
    # Few tokens beyond the 256 bytes: with so little compute, a large vocabulary would stay mostly unlearned.
    c.stages.tokenizer = config.tokenizer("bpe", vocab_size=288, train_bytes=5_000_000)
    c.stages.pretrain = config.stage(
        steps=a.steps,
        batch_size=8,
        eval_every=100,
        checkpoint_every=100,
        prompts=("", "class ", "Return "),
        samples=3,
        sample_tokens=320,
        model=model,
        data=config.data("stdlib", path="docs", row_length=256),
    )
    c.stages.sft = config.stage(
        objective="sft",
        steps=a.sft,
        batch_size=8,
        eval_every=200,
        checkpoint_every=200,
        data=config.mixture(
            {task.partition("(")[0]: config.data("task", path=task, limit=20_000) for task in TASKS}, row_length=256
        ),
    )
    c.stages.rl = config.stage(
        objective="dapo",
        steps=a.rl,
        batch_size=128,
        eval_every=40,
        checkpoint_every=40,
        data=config.data(row_length=128, pack=False, heldout_rows=128),
        optim=config.optim("muon", muon_lr=0.002, lr=0.0003, schedule="constant", warmup=0),
        rollout=config.rollout(*TASKS, group=16, slots=128),
    )
    c.stages.evaluation = config.evaluation(*TASKS, rows=256, samples=16)
    return c
