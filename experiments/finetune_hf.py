"""Fine-tune a model of the Hugging Face hub on conversations of your own.

    lmtrain run --config experiments/finetune_hf.py:init=hf:FOLDER,path=dialogues.jsonl --workdir runs/tuned
    lmtrain export runs/tuned --to tuned-hf

FOLDER holds config.json, *.safetensors, tokenizer.json and a chat template; with a network, a name of the hub
(hf:owner/model) does too. Families: Llama, Qwen 2 and 3, Qwen 3 MoE, Mistral, Mixtral, Gemma 2 and 3, GPT-2, Phi 3,
OLMo 2. `source=openai` reads OpenAI's fine-tuning files, `source=text` any text (as pretraining goes on). Held-out loss
is printed before and after. experiments/lora.py trains adapters alone.
"""

from lmtrain import config


def get_config(arg=""):
    a = config.parse_arg(
        arg, init="", path="", source="jsonl", steps=200, batch=8, row_length=512, lr=2e-5, warmup=0.05, accumulate=1
    )
    c = config.experiment()
    c.stages.tune = config.stage(
        objective="pretrain" if a.source == "text" else "sft",
        init_from=a.init,
        steps=a.steps,
        batch_size=a.batch,
        accumulate=a.accumulate,
        eval_every=50,
        checkpoint_every=50,
        data=config.data(a.source, path=a.path, row_length=a.row_length),
        optim=config.optim("adamw", lr=a.lr, schedule="cosine", warmup=a.warmup),
    )
    return c
