"""Train adapters (LoRA, rsLoRA, DoRA) beside the frozen matrices of a run or of a Hugging Face model.

    lmtrain run --config experiments/lora.py:init=hf:FOLDER,path=dialogues.jsonl --workdir runs/lora
    lmtrain export runs/lora --to merged           # one model, the adapters added to its matrices
    lmtrain export runs/lora --to adapter --adapter   # what PEFT loads beside FOLDER

`rank=8,alpha=16`, `dora=True`, `rslora=True`; `matrices=attn` or `mlp` or `all`. `quantize=nf4` (or int8) keeps the
frozen matrices in few bits, as QLoRA does, and what is exported is what was trained: the rounded matrices. A checkpoint
holds the adapters alone; its folder says which model they belong to, and a changed one is refused.
"""

from lmtrain import config, flags, schema

MATRICES = {"attn": ("attn/*",), "mlp": ("mlp/*",), "all": ("attn/*", "mlp/*")}


def get_config(arg=""):
    a = config.parse_arg(
        arg, init="", path="", source="jsonl", steps=200, batch=8, row_length=512, lr=1e-3, rank=8, alpha=16.0,
        matrices="all", dora=False, rslora=False, quantize="",
    )  # fmt: skip
    if a.matrices not in MATRICES:
        raise flags.ConfigError(flags.unknown(a.matrices, MATRICES, "a set of matrices"))
    lora = schema.Lora(a.rank, a.alpha, MATRICES[a.matrices], a.rslora, a.dora)
    c = config.experiment()
    c.stages.lora = config.stage(
        objective="pretrain" if a.source in ("text", "stdlib") else "sft",
        init_from=a.init,
        quantize=a.quantize,
        steps=a.steps,
        batch_size=a.batch,
        eval_every=50,
        checkpoint_every=50,
        model=config.model(lora=lora),
        data=config.data(a.source, path=a.path, row_length=a.row_length),
        optim=config.optim("adamw", lr=a.lr, schedule="cosine", warmup=0.05),
    )
    return c
