"""The grammar of `lmtrain prepare`."""

from __future__ import annotations

import argparse
import dataclasses
import os

from lmtrain.prepare.settings import Settings


def add(parser: argparse.ArgumentParser) -> None:
    """Its arguments."""
    parser.add_argument("--input", nargs="*", default=[], metavar="PATH", help="files, folders, globs; s3:// and gs://")
    parser.add_argument("--to", required=True, metavar="FOLDER", help="the folder to write, e.g. corpus/")
    parser.add_argument("--field", default="text", help="what holds the text of a row (default text)")
    parser.add_argument(
        "--malformed", default="refuse", help="rows that cannot be read: refuse or skip (default refuse)"
    )
    parser.add_argument("--language", default="en", help="the one that is kept, or all (default en)")
    parser.add_argument("--language-model", default="", metavar="FILE", help="a fastText model (default: py3langid's)")
    parser.add_argument(
        "--quality", default="gopher,c4,fineweb", help="rules, with commas between, or none (default all)"
    )
    parser.add_argument("--dedup", default="exact,minhash", help="exact, minhash or none (default both)")
    parser.add_argument("--pii", action="store_true", help="replace e-mail and public IP addresses")
    parser.add_argument(
        "--decontaminate", action="append", default=[], metavar="WHAT", help="a file of evaluation rows, or a task "
        "(\"gsm8k(path='gsm8k-train.jsonl', heldout_path='gsm8k-test.jsonl')\": its held-out rows), that no document "
        "may hold; several with commas between, or given again",
    )  # fmt: skip
    parser.add_argument("--ngram", type=int, default=13, help="words of a row that make a hit (default 13)")
    parser.add_argument("--synthetic", default="", metavar="RUN", help="a run that writes documents of its own to add")
    parser.add_argument(
        "--prompts", default="", metavar="FILE", help="what it is asked: a line each, or JSONL's prompt"
    )
    parser.add_argument("--count", type=int, default=0, help="how many it writes")
    parser.add_argument("--tokens", type=int, default=512, help="their longest length (default 512)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default 0.8)")
    parser.add_argument(
        "--tokenizer",
        default="bpe",
        help="bpe (learned here), bytes, a tokenizer.json, or a run's folder (default bpe)",
    )
    parser.add_argument("--vocab-size", type=int, default=32768, help="of a bpe that is learned (default 32768)")
    parser.add_argument("--heldout-fraction", type=float, default=0.05, help="share that is held out (default 0.05)")
    parser.add_argument("--task-mb", type=int, default=64, help="MB of files that one task reads (default 64)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="tasks at once (default: the cores)")
    parser.add_argument("--executor", default="local", help="local, slurm or ray (default local)")
    parser.add_argument(
        "--option", dest="options", action="append", default=[], metavar="NAME=VALUE", help="an argument of "
        "datatrove's executor for slurm or ray (partition=cpu time=4:00:00 mem_per_cpu_gb=8); given again for each",
    )  # fmt: skip


def settings(args: argparse.Namespace) -> Settings:
    """What they say. Raises LmtrainError for what cannot be."""
    from lmtrain.tasks import spec

    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(Settings)}
    for name in ("quality", "dedup"):
        text = given[name]
        given[name] = () if text == "none" else tuple(part.strip() for part in text.split(",") if part.strip())
    given["decontaminate"] = tuple(name for text in args.decontaminate for name in spec.several(text))
    return Settings(**given | {"input": tuple(args.input), "options": tuple(args.options)})
