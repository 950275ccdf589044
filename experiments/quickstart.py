"""The quickstart: a small language model of Python's own documentation, learned while you watch.

make quickstart         or: lmtrain run --config experiments/quickstart.py --workdir runs/quickstart
"""

from lmtrain import config


def get_config(arg=""):
    a = config.parse_arg(arg, steps=2400)
    c = config.experiment()
    c.stages.tokenizer = config.tokenizer("bpe", vocab_size=384)
    c.stages.pretrain = config.stage(
        steps=a.steps,
        batch_size=16,
        eval_every=400,
        checkpoint_every=400,
        prompts=("", "Return ", "class "),
        samples=3,
        model=config.model(layers=4, width=128, heads=4),
        data=config.data("stdlib", path="docs", row_length=128),
    )
    return c
