"""Does it pay to start from a pretrained model? The same data for the same steps, from scratch and from a run.

    lmtrain run --config experiments/transfer.py:init=runs/quickstart/pretrain --workdir runs/transfer
    lmtrain run --config experiments/transfer.py:init=hf:FOLDER,source=text,path=book.txt --workdir runs/book

By default the text is the source code of Python's own modules, of which the quickstart has read the documentation
alone: 1.445 nats a token after 150 steps from it, 2.095 from scratch (80 seconds on two cores).
Ends with a table of both held-out losses, which `lmtrain inspect` prints again.
"""

from lmtrain import config


def get_config(arg=""):
    a = config.parse_arg(
        arg, init="runs/quickstart/pretrain", source="stdlib", path="source", steps=150, row_length=128
    )
    c = config.experiment()
    c.stages.tokenizer, shape = config.of(a.init)
    like = dict(
        steps=a.steps,
        batch_size=8,
        eval_every=50,
        data=config.data(a.source, path=a.path, row_length=a.row_length, limit=400 if a.source == "stdlib" else 0),
        optim=config.optim("muon", muon_lr=0.01, lr=0.002),
    )
    c.stages.scratch = config.stage(**like, model=shape)
    c.stages.pretrained = config.stage(**like, init_from=a.init)
    return c
