"""Shakespeare, a byte at a time: the smallest useful experiment, and the one to compare with nanoGPT's CPU recipe.

    lmtrain run --config experiments/shakespeare.py:cpu --workdir runs/shakespeare \
        --config.stages.pretrain.data.path=tinyshakespeare.txt

`:cpu` is nanoGPT's own CPU budget: 4 layers, 128 wide, rows of 64, batch 12, 2,000 steps, 1.54M bytes seen, the last
10 % of the file held out whole. Two to three minutes on 2 CPU cores; expect 1.57 nats a byte held out (seeds 0 and 1:
1.574, 1.572), where nanoGPT's recipe reaches 1.92 with the same budget. `:gpu` is its larger one, not measured here.
"""

from lmtrain import config, flags


def get_config(arg=""):
    a = config.parse_arg(arg, size="cpu")
    shapes = {
        "cpu": dict(layers=4, width=128, heads=4, row_length=64, batch_size=12, steps=2000),
        "gpu": dict(layers=6, width=384, heads=6, row_length=256, batch_size=64, steps=5000),
    }
    if a.size not in shapes:
        raise flags.ConfigError(flags.unknown(a.size, shapes, "a size of this experiment"))
    s = shapes[a.size]
    c = config.experiment()
    c.stages.tokenizer = config.tokenizer("bytes")
    c.stages.pretrain = config.stage(
        steps=s["steps"],
        batch_size=s["batch_size"],
        eval_every=500,
        checkpoint_every=500,
        prompts=("ROMEO:",),
        model=config.model(layers=s["layers"], width=s["width"], heads=s["heads"], tied=False),
        optim=config.optim("muon", lr=0.01, b2=0.98),
        data=config.data(
            "text",
            path="tinyshakespeare.txt",
            heldout="tail",
            heldout_fraction=0.1,
            heldout_rows=0,
            row_length=s["row_length"],
        ),
    )
    return c
