"""Pretrain a decoder of a chosen size, by default on the text that every Python carries.

    lmtrain run --config experiments/pretrain.py:30m --workdir runs/30m --config.stages.pretrain.data.source=text \
        --config.stages.pretrain.data.path=books/

Sizes: 1m 4m 12m 30m 117m 350m 1b 3b 8b 70b (models/presets.py has the well-known shapes too: llama3-8b, gemma3-1b...).
The number of steps is what 20 tokens for each parameter need (Chinchilla, arXiv 2203.15556); `:30m,steps=500` sets it.
On several devices: --config.mesh.fsdp=8, and so on.

`:1m,steps=300` takes two minutes on 2 CPU cores (15,000 tokens a second) and reaches 1.69 held-out bits per byte on the
embedded corpus, where xz -9 needs 1.96; all of its 4,805 steps would take some 22 minutes. Larger sizes: not run here.
"""

import dataclasses

from lmtrain import config
from lmtrain.models import presets, transformer

#: size -> row length, rows of a batch, microbatches, vocabulary, learning rate of AdamW, rematerialisation
BATCHES = {
    "1m": (256, 16, 1, 1024, 0.003, "none"),
    "4m": (256, 32, 1, 4096, 0.003, "none"),
    "12m": (512, 32, 1, 8192, 0.003, "none"),
    "30m": (1024, 64, 1, 16384, 0.002, "none"),
    "117m": (1024, 256, 1, 32768, 0.002, "none"),
    "350m": (2048, 256, 1, 32768, 0.001, "dots"),
    "1b": (2048, 512, 1, 65536, 0.0007, "dots"),
    "3b": (4096, 512, 1, 65536, 0.0005, "dots"),
    "8b": (8192, 512, 1, 131072, 0.0003, "full"),
    "70b": (8192, 1024, 1, 131072, 0.00015, "full"),
}


def get_config(arg=""):
    a = config.parse_arg(arg, size="1m", steps=0, tokens_per_parameter=20)
    presets.get(a.size)  # names the nearest size where there is none
    row, rows, accumulate, vocab, lr, remat = BATCHES.get(a.size, BATCHES["8b"])
    model = config.preset(a.size, vocab_size=0, remat=remat)
    shape = transformer.resolve(dataclasses.replace(presets.get(a.size), vocab_size=0), vocab)
    steps = a.steps or max(1, a.tokens_per_parameter * transformer.count(shape)["total"] // (row * rows))
    c = config.experiment()
    c.stages.tokenizer = config.tokenizer("bpe", vocab_size=vocab)
    c.stages.pretrain = config.stage(
        steps=steps,
        batch_size=rows,
        accumulate=accumulate,
        eval_every=max(1, steps // 20),
        checkpoint_every=max(1, steps // 20),
        model=model,
        data=config.data("stdlib", row_length=row),
        optim=config.optim("muon", lr=lr),
    )
    return c
