"""The quickstart: raw text to a small chat model, learned while you watch.

    make quickstart         or: lmtrain run --config experiments/quickstart.py --workdir runs/quickstart

Pretraining on Python's own documentation, supervised fine-tuning on demonstrations of small tasks, and both models
scored on the same held-out problems. 0.8M parameters. (experiments/grpo.py goes on with reinforcement learning.)
"""

from lmtrain import config

#: task -> its share of the demonstrations
TASKS = {"addition(reversed=True)": 4.0, "spelling": 1.0, "sorting(least=3, most=4)": 2.0}


def get_config(arg=""):
    a = config.parse_arg(arg, steps=1000, sft=500)
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
            {t.partition("(")[0]: config.data("task", path=t, limit=20_000, weight=w) for t, w in TASKS.items()},
            row_length=256,
        ),
    )
    c.stages.evaluation = config.evaluation(*TASKS, rows=128, samples=8)
    return c
