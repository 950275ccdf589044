"""The arguments of `lmtrain bench`, and what each kind of it calls."""

from __future__ import annotations

import argparse
from typing import Any


def add(commands: Any) -> None:
    """Adds the command to those of a parser (what its `add_subparsers` returned)."""
    bench = commands.add_parser("bench", help="measure speed against a ceiling taken in the same run")
    kinds = bench.add_subparsers(title="what to measure", metavar="WHAT", required=True)
    training = kinds.add_parser("train", help="tokens/s, FLOP/s and memory of a training step")
    training.add_argument("--preset", default="S", help="a shape of models/presets.py (default S: 12M parameters)")
    training.add_argument("--rows", type=int, default=0, help="rows of a batch (default: the preset's)")
    training.add_argument("--row-length", type=int, default=0, help="positions of a row (default: the preset's)")
    training.add_argument("--accumulate", type=int, default=0, help="microbatches of a step (default: the preset's)")
    training.add_argument("--steps", type=int, default=6, help="timed steps, after two that are not (default 6)")
    training.add_argument("--attention", default="auto", help="auto, reference, xla, cudnn or splash")
    training.add_argument("--remat", default="", help="none, dots or full (default: the preset's)")
    training.add_argument("--optim", default="adamw", help="optimizer (default adamw)")
    training.add_argument("--no-cache", action="store_true", help="compile anew")
    training.set_defaults(command=_train, takes_overrides=False)

    tuning = kinds.add_parser("sft", help="tokens/s of supervised fine-tuning on packed conversations")
    tuning.add_argument("--preset", default="S", help="a shape of models/presets.py (default S: 12M parameters)")
    tuning.add_argument("--rows", type=int, default=16, help="rows of a batch (default 16)")
    tuning.add_argument("--row-length", type=int, default=256, help="positions of a row (default 256)")
    tuning.add_argument("--accumulate", type=int, default=8, help="microbatches of a step (default 8)")
    tuning.add_argument("--steps", type=int, default=8, help="timed steps, after two that are not (default 8)")
    tuning.set_defaults(command=_sft, takes_overrides=False)

    policy = kinds.add_parser("rl", help="seconds of a GRPO step: generation, rewards, update")
    policy.add_argument("--preset", default="S", help="a shape of models/presets.py (default S: 12M parameters)")
    policy.add_argument("--prompts", type=int, default=4, help="prompts of a rollout (default 4)")
    policy.add_argument("--group", type=int, default=8, help="replies to each (default 8)")
    policy.add_argument("--new", type=int, default=64, help="tokens of a reply (default 64)")
    policy.add_argument("--accumulate", type=int, default=4, help="microbatches of an update (default 4)")
    policy.add_argument("--steps", type=int, default=5, help="timed steps, after one that is not (default 5)")
    policy.set_defaults(command=_rl, takes_overrides=False)

    writing = kinds.add_parser("generate", help="tokens/s of generation, at several numbers of prompts at once")
    writing.add_argument("--preset", default="S", help="a shape of models/presets.py (default S: 12M parameters)")
    writing.add_argument("--batches", default="1,32", help="prompts at once, with commas between (default 1,32)")
    writing.add_argument("--new", type=int, default=128, help="tokens of a reply (default 128)")
    writing.add_argument("--prompt", type=int, default=16, help="tokens of a prompt (default 16)")
    writing.add_argument("--reps", type=int, default=3, help="timed runs, after one that is not (default 3)")
    writing.add_argument(
        "--temperature", type=float, default=0.0, help="above 0 draws (default 0: the likeliest token)"
    )
    writing.add_argument("--no-cache", action="store_true", help="compile anew")
    writing.set_defaults(command=_generate, takes_overrides=False)


def _train(args: argparse.Namespace, rest: list[str]) -> None:
    from lmtrain import bench

    bench.train(
        args.preset, rows=args.rows, row_length=args.row_length, accumulate=args.accumulate, steps=args.steps,
        attention=args.attention, remat=args.remat, optimizer=args.optim, cache=not args.no_cache,
    )  # fmt: skip


def _generate(args: argparse.Namespace, rest: list[str]) -> None:
    from lmtrain import bench

    bench.generate(
        args.preset, batches=args.batches, new=args.new, prompt=args.prompt, reps=args.reps,
        temperature=args.temperature, cache=not args.no_cache,
    )  # fmt: skip


def _sft(args: argparse.Namespace, rest: list[str]) -> None:
    from lmtrain import bench_post

    bench_post.sft(args.preset, args.rows, args.row_length, args.accumulate, args.steps)


def _rl(args: argparse.Namespace, rest: list[str]) -> None:
    from lmtrain import bench_post

    bench_post.rl(args.preset, args.prompts, args.group, args.new, args.accumulate, args.steps)
