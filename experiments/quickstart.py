"""The quickstart: a small language model of Python's own documentation, learned while you watch.

    make quickstart         or: lmtrain run --config experiments/quickstart.py --workdir runs/quickstart

0.8M parameters, 2M tokens, two to three minutes on 2 CPU cores. Expect held-out bits per byte from 6.13 to about 1.54,
where `xz -9` needs 2.19 for the same bytes, and samples that look like documentation and mean little.
"""

from lmtrain import config


def get_config(arg=""):
    a = config.parse_arg(arg, steps=1000)
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
        model=config.model(layers=4, width=128, heads=4),
        data=config.data("stdlib", path="docs", row_length=256),
    )
    return c
