"""Every field of an experiment: its default, its meaning, and what it refuses.

An experiment is `mesh`, `seed` and an ordered set of `stages`. These dataclasses are what the rooms receive; what a
person writes is the ml_collections.ConfigDict of the same shape that `config.py` makes of them (see experiments/).
Where 0 or "" or "auto" stands for "worked out from the rest", the comment says from what.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from lmtrain.types import LmtrainError


@dataclasses.dataclass(frozen=True)
class Mesh:
    """How many ways each axis splits the devices. One of them may be -1: whatever the others leave."""

    data: int = -1  # rows of the batch; parameters are copied
    fsdp: int = 1  # rows of the batch; parameters are split and gathered layer by layer
    tensor: int = 1  # heads, MLP and vocabulary
    context: int = 1  # positions of a row
    expert: int = 1  # experts of a mixture; rows of the batch elsewhere
    stage: int = 1  # layers, which microbatches pass one after the other; rows of the batch elsewhere
    dcn_data: int = 1  # slices (or slow networks) that the data axis spans
    auto: bool = False  # --config.mesh=auto: the axes above are worked out from the model and the devices


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Stretches rotary positions past the length the model was trained on. kind "none" uses none of the numbers."""

    kind: str = "none"  # none | linear | dynamic | llama3 | yarn | longrope
    factor: float = 1.0
    original_length: int = 8192  # rows the unscaled model was trained on (all but linear)
    low_freq: float = 1.0  # llama3: low_freq_factor
    high_freq: float = 4.0  # llama3: high_freq_factor
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn: the ends of its ramp are whole dimensions
    attention_factor: float = 0.0  # 0: 0.1 ln(factor) + 1 (yarn), sqrt(1 + ln(factor) / ln(original_length)) (longrope)
    short: tuple[float, ...] = ()  # longrope: what divides each frequency in rows of up to original_length,
    long: tuple[float, ...] = ()  # and in longer ones


@dataclasses.dataclass(frozen=True)
class Lora:
    """Low-rank adapters beside a model's matrices; then these alone are trained (see Stage.train)."""

    rank: int = 0  # 0: none
    alpha: float = 16.0  # what an adapter adds is multiplied by alpha / rank
    matrices: tuple[str, ...] = (
        "attn/*",
        "mlp/*",
    )  # patterns, as 'attn/[qv]', 'head/kernel'
    rslora: bool = False  # by alpha / sqrt(rank) instead
    dora: bool = False  # lengths of columns are learned apart from their directions


@dataclasses.dataclass(frozen=True)
class Model:
    """A decoder. The defaults are a small, fast-learning one; models/presets.py names the well-known shapes."""

    layers: int = 4
    width: int = 128
    heads: int = 4
    kv_heads: int = 0  # 0: as many as heads
    head_dim: int = 0  # 0: width / heads
    mlp: int = 0  # hidden width; 0: 4 * width; where gated, 8/3 of it rounded up to a multiple of 64
    vocab_size: int = 0  # 0: the tokenizer's
    activation: str = "relu2"  # swiglu | geglu | relu2 | gelu
    norm: str = "rmsnorm"  # rmsnorm | gemma (scale stored as scale - 1) | layernorm (mean taken off, with a bias)
    norm_eps: float = 1e-6
    norm_scale: bool = True  # a learned scale in the norms of the residual stream
    pre_norm: bool = True  # a norm before attention and before the MLP
    post_norm: bool = False  # another after each (both: sandwich)
    embed_norm: bool = False  # a norm on the embedding, before the first layer
    qk_norm: bool = True  # norm of queries and keys
    qk_norm_over: str = "head"  # head: of each head by itself | all: of all heads together (OLMo 2)
    qk_norm_scale: bool = True  # with a learned scale
    positions: str = "rope"  # rope | learned (a table of max_positions, added to the embedding: GPT-2)
    max_positions: int = 0  # learned: the longest row
    rotary: float = 1.0  # share of a head's dimensions that turn, the first ones
    rope_theta: float = 10000.0
    rope_local_theta: float = 0.0  # for windowed layers; 0: rope_theta
    rope_scaling: RopeScaling = RopeScaling()  # windowed layers stay unscaled where rope_local_theta is set
    pattern: str = "G"  # kinds of layer, repeated: G global, W windowed ("WWWWWG" is Gemma 3)
    window: int = 0  # how many positions a W layer sees, its own included
    attn_scale: float = 0.0  # 0: head_dim ** -0.5
    attn_softcap: float = 0.0  # 0: none
    logit_softcap: float = 0.0  # 0: none
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    tied: bool = True  # the output matrix is the embedding
    embed_scale: bool = False  # embeddings times sqrt(width) (Gemma)
    experts: int = 0  # 0: a dense MLP
    experts_per_token: int = 2
    shared_experts: int = 0  # run for every token, beside the routed ones
    expert_mlp: int = 0  # hidden width of one expert; 0: mlp
    router_norm: bool = True  # the chosen experts' weights sum to 1
    router_balance: float = 0.01  # weight of the load-balancing loss
    router_z: float = 0.001  # weight of the router's z-loss
    lora: Lora = Lora()
    scalar_head: bool = False  # one number for each position beside the logits: rewards, values
    zero_init: bool = True  # matrices that write to the residual stream, and an untied output, start at zero
    init_scale: float = 0.0  # std of the embedding; 0: 1 for an untied embedding, else 0.02
    attention: str = "auto"  # auto | reference | xla | cudnn | splash
    remat: str = "none"  # none | dots (keep products) | full (keep nothing but each layer's input)
    unroll: int = 0  # layer groups that the scan unrolls; 0: all of up to 12 on CPU (without remat), 32 on GPU, else 1
    microbatches: int = 0  # that pass the stages of mesh.stage; 0: one for each stage
    rounds: int = 1  # how often each passes them: the circular schedule, with less of the time unused
    loss_chunk: int = 0  # positions whose logits exist at once; 0: as many as models/head.py's CHUNK_BYTES hold
    dtype: str = "auto"  # of activations and products; auto: float32 on CPU, bfloat16 elsewhere. Weights are float32

    @property
    def rotary_dim(self) -> int:
        """How many of a head's dimensions turn with its position (head_dim resolved)."""
        return int(self.rotary * self.head_dim)


@dataclasses.dataclass(frozen=True)
class Data:
    """Where documents (or conversations, or pairs of them) come from and how they become rows."""

    # For chat also "task": a task's own demonstrations (path: its name), and "openai": fine-tuning files of OpenAI's.
    source: str = "stdlib"  # stdlib text jsonl json parquet arrayrecord hf canary prepared "package.module:function"
    path: str = ""  # file, folder or glob (source hf: a name or a folder). stdlib: "docs", "source" or "" for both
    field: str = "text"  # of a row, where the source has rows
    document: str = "auto"  # text: file | paragraph (blank lines between) | line; auto: file
    subset: str = ""  # hf: configuration name
    hf_split: str = "train"  # hf: split to read
    weight: float = 1.0  # share within a mixture
    mixture: dict[str, Data] = dataclasses.field(default_factory=dict)  # name -> Data; source and path stay unset
    row_length: int = 256
    heldout: str = "auto"  # hash (whole documents, by their text) | tail (end of the corpus); auto: hash from 100 up
    heldout_fraction: float = 0.05
    heldout_rows: int = 256  # rows of the fixed held-out set that are scored; 0: all
    limit: int = 0  # read at most so many documents; 0: all
    augment: tuple[str, ...] = ()  # pairs of words ("he/she", "gender"): every text again with them exchanged
    groups: tuple[str, ...] = ()  # documents: words of each group ("he/his"): group-DRO's, and what reweigh balances
    outcomes: tuple[str, ...] = ()  # words of each outcome, likewise
    reweigh: bool = False  # documents weigh so that group and outcome are independent (Kamiran & Calders 2012)
    workers: int = 0  # threads that read ahead; 0: two
    cache: str = ""  # folder for tokenised shards; "": data/ of the run
    template: str = ""  # chat: a Hugging Face Jinja template (a file); "": lmtrain's own
    columns: dict[str, str] = dataclasses.field(
        default_factory=dict
    )  # chat: what a row's fields are called: {"prompt": "question"}
    truncate: str = "right"  # chat rows longer than row_length: right | left (cut there) | drop | refuse
    malformed: str = "skip"  # chat rows that cannot be used: skip (named and counted) | refuse
    pack: bool = True  # chat: several conversations in a row, without attention between them


@dataclasses.dataclass(frozen=True)
class Optim:
    """The optax chain: clip, optimizer, weight decay, schedule."""

    name: str = "muon"  # any optimizer of optax or optax.contrib; muon: matrices by Muon, the rest by AdamW
    lr: float = 0.003  # AdamW's, and any other optimizer's
    muon_lr: float = 0.02  # Muon's, for matrices
    schedule: str = "wsd"  # wsd | cosine | linear | constant
    warmup: float = 0.02  # share of the steps if below 1, else steps
    decay: float = 0.4  # wsd: share of the steps (or steps) over which it falls
    final: float = 0.0  # the share of lr that the schedule ends at, just past the last step
    weight_decay: float = 0.0  # matrices only, times the learning rate
    clip: float = 1.0  # largest global norm of the gradient; 0: none
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    momentum: float = 0.95  # Muon's
    layer_decay: float = (
        1.0  # each layer's learning rate is so much of that of the one above; the embedding's is lowest
    )
    args: dict[str, Any] = dataclasses.field(default_factory=dict)  # further keyword arguments of the optax optimizer


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A byte-level BPE, trained as the experiment's first stage or read from a file."""

    kind: str = "bpe"  # bpe | bytes (no merges: a token is a byte) | file
    path: str = ""  # kind file: a tokenizer.json or the folder that holds one
    vocab_size: int = 4096  # special tokens and the 256 bytes included
    train_bytes: int = 100_000_000  # text that training reads
    add: tuple[str, ...] = ()  # kind file: special tokens to add ("<|user|>"); the model's tables grow by their rows
    data: Data | None = None  # None: that of the first training stage


@dataclasses.dataclass(frozen=True)
class Rollout:
    """Reinforcement learning's source: prompts of tasks, answered by the current parameters, scored, made into rows.

    A rollout is stage.batch_size * minibatches replies; it is learned from `epochs` times, in `minibatches` updates.
    """

    tasks: tuple[str, ...] = ()  # names in tasks/, "addition(digits=2)", or "package.module:Class(...)"
    group: int = 8  # replies to each prompt
    minibatches: int = 1  # updates that one pass over a rollout makes
    epochs: int = 1  # passes over a rollout
    max_tokens: int = 0  # of one reply; 0: the task's own limit
    turns: int = 8  # replies of the policy in one conversation, at most
    temperature: float = 1.0
    rewards: tuple[str, ...] = ("score",)  # a mean of "WEIGHT*NAME": tasks/rewards.py, model(RUN)
    user: str = ""  # a stage or run: that frozen model plays the user of a chat; "": the task's script
    demonstrations: float = 0.0  # share of conversations taken from the task's solutions (distillation's 1 - lambda)
    advantage: str = "auto"  # group | group_mean | leave_one_out | gae; auto: what the objective takes
    dynamic: int = 0  # rounds of new prompts in place of groups whose replies all score alike (DAPO)
    overlong: int = 0  # the last so many tokens below the limit cost up to 1 (DAPO's soft punishment)
    truncated: str = "mask"  # a reply cut by the limit: mask (not learned from) | penalise (reward 0) | keep
    kl_reward: float = 0.0  # weight of the k1 estimate of the divergence from the reference, taken off the reward
    reference: str = "start"  # the frozen reference: start (what the stage starts from) | none | a stage or run
    gamma: float = 1.0  # gae
    lam: float = 0.95  # gae
    slots: int = 64  # conversations generated at once
    control: str = "none"  # none | shuffle | zero | flip: rewards that must not help, to test a claim of learning


@dataclasses.dataclass(frozen=True)
class Stage:
    """One training stage."""

    steps: int = 1000
    batch_size: int = 32  # rows of one update, over all hosts and microbatches
    accumulate: int = 1  # microbatches of one update
    log_every: int = 10
    eval_every: int = 200  # 0: only at the end
    checkpoint_every: int = 200  # 0: only at the end
    local_every: int = 0  # steps between checkpoints on each host's own disk (local of the experiment); 0: none
    keep_last: int = 2
    keep_best: int = 1
    init_from: str = ""  # "": the stage before, or fresh; else an earlier stage's name, a run's folder, or a stage's
    train: tuple[str, ...] = ()  # patterns of the parameters that are trained ("attn/*"); (): all, or the adapters
    freeze: tuple[str, ...] = ()  # patterns of those that are not
    quantize: str = ""  # how frozen matrices are kept: int8 | nf4; "": as floating point
    objective: str = "pretrain"  # a name in objectives/ or "package.module:function"
    loss: Any = None  # the objective's own settings: the dataclass that its fourth argument is annotated with
    source: str = (
        "auto"  # documents | chat | pairs | labels | rollout | "package.module:function"; auto: the objective's
    )
    teacher: str = ""  # an earlier stage, or a run's folder: the frozen model that distillation learns from
    model: Model = Model()
    data: Data = Data()
    optim: Optim = Optim()
    rollout: Rollout = Rollout()
    samples: int = 4  # texts generated at each evaluation
    sample_tokens: int = 128
    sample_temperature: float = 0.7
    prompts: tuple[str, ...] = ("",)
    spike: float = 0.0  # a loss so many nats above the median of the last 64 rolls back; 0: only a non-finite one
    max_rollbacks: int = 5


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A stage that scores the result of every training stage before it on the same held-out rows of tasks; before
    them, as `start`, what the first of them starts from, where that is another run or an imported model."""

    tasks: tuple[str, ...] = ()
    rows: int = 256  # of each task
    samples: int = 16  # replies to each row: pass@1 is their mean, pass@k that one of k is right
    temperature: float = 1.0
    max_tokens: int = 0  # of one reply; 0: the task's own limit
    suites: tuple[str, ...] = ()  # of `lmtrain eval`, run on every stage, their scores side by side
    heldout: str = ""  # the stage whose held-out rows and text all are measured on; "": each on its own
    bias: tuple[str, ...] = ()  # what the suite bias measures with ("canary=blims/daxes"); (): "swaps"
    stages: tuple[str, ...] = ()  # which stages; (): all that train, and the start
    slots: int = 128


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What `lmtrain run` runs."""

    seed: int = 0
    mesh: Mesh = Mesh()
    tensorboard: bool = True
    local: str = ""  # a folder on each host's own disk, for checkpoints between those of the run's folder
    profile: str = ""  # STEP:COUNT, such as 100:5: a trace of so many steps for xprof, in the stage's folder
    watchdog: float = 20.0  # no step within so many median ones: the stacks of all threads, and the end; 0: never
    watchdog_least: float = 600.0  # seconds that the watchdog waits at least: a compilation is no hang
    stages: dict[str, Any] = dataclasses.field(default_factory=dict)  # name -> Tokenizer | Stage | Evaluation, in order


class ConfigError(LmtrainError):
    """A setting that cannot be: names the field, what it got, what it takes."""
