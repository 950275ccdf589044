"""The `lmtrain` command: parses, then hands over."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
import typing

from lmtrain import __version__, bench_arguments, helps, storage
from lmtrain.prepare import arguments
from lmtrain.types import LmtrainError, StorageError


def main(argv: list[str] | None = None) -> int:
    """Runs one command. Returns 0, 2 for a mistake of the user's, 74 where storage fails, 75 when stopped and saved.

    One of several processes ends here at once where it fails (hosts.leave).
    """
    try:
        status = _main(argv)
    except Exception:
        if "jax" not in sys.modules:
            raise
        from lmtrain import hosts

        traceback.print_exc()
        return hosts.leave(1)
    if "jax" not in sys.modules:
        return status
    from lmtrain import hosts

    return hosts.leave(status)


def _main(argv: list[str] | None) -> int:
    parser = make_parser()
    args, rest = parser.parse_known_args(argv)
    if not hasattr(args, "command"):
        parser.print_help()
        return 0
    if rest and not args.takes_overrides:
        parser.error(f"unknown argument {rest[0]!r}")
    sys.unraisablehook = _unraisable
    try:
        args.command(args, rest)
    except LmtrainError as error:
        print(f"lmtrain: {error}", file=sys.stderr)
        return error.status
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        print(f"lmtrain: {error.filename or 'input or output'}: {error.strerror}. Once that is mended, the same "
              "command goes on.", file=sys.stderr)  # fmt: skip
        return StorageError.status if error.errno in storage.PASSING else 2
    except KeyboardInterrupt:
        print("lmtrain: interrupted; the same command goes on", file=sys.stderr)
        return 130
    except Exception as error:
        if "RESOURCE_EXHAUSTED" not in str(error) or "memory" not in str(error):
            raise
        print(f"lmtrain: out of memory: {str(error).splitlines()[0]} What helps: a larger accumulate, remat=full, a "
              "smaller batch_size or row_length, mesh.fsdp over more devices.", file=sys.stderr)  # fmt: skip
        return 2
    return 0


def _unraisable(what: typing.Any) -> None:
    # When a disk is full, the writes still under way fail after the checkpoint has: one message is enough.
    if "Event loop is closed" not in str(what.exc_value):
        sys.__unraisablehook__(what)


def make_parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="lmtrain",
        description="Train your own ChatGPT in JAX: raw text to a chat model, on a laptop, a TPU or many hosts.",
    )
    parser.add_argument("--version", action="version", version=f"lmtrain {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    run = commands.add_parser(
        "run", formatter_class=raw, allow_abbrev=False, help="run an experiment, or go on with it",
        description=helps.RUN, epilog=helps.fields_help(),
    )  # fmt: skip
    run.add_argument("--config", required=True, metavar="FILE[:ARG]", help="Python file with get_config(arg)")
    run.add_argument("--workdir", required=True, metavar="DIR", help="the run's folder, e.g. runs/quickstart")
    run.set_defaults(command=_run, takes_overrides=True)

    plan = commands.add_parser(
        "plan", formatter_class=raw, allow_abbrev=False, help="memory, step time and cost on devices you do not have",
        description=helps.PLAN,
    )  # fmt: skip
    plan.add_argument("--config", required=True, metavar="FILE[:ARG]", help="Python file with get_config(arg)")
    plan.add_argument("--topology", required=True, metavar="CHIP:SHAPE", help="v5p:8x8x8, h200:8x4, cpu:8 ...")
    plan.add_argument("--slices", type=int, default=1, help="of that topology, over a slow network (default 1)")
    plan.add_argument("--stage", default="", metavar="NAME", help="which stage (default: the first that trains)")
    plan.add_argument("--compile", action="store_true", help="compile the update, too")
    plan.add_argument("--search", action="store_true", help="rank meshes, microbatches and rematerialisations")
    plan.add_argument("--price", type=float, default=0.0, help="what a chip costs an hour (default: no cost is told)")
    plan.add_argument("--tokens", type=float, default=0.0, help="of the whole stage (default: its steps')")
    plan.add_argument("--json", default="", metavar="FILE", help="write the plan here too, for programs")
    plan.set_defaults(command=_plan, takes_overrides=True)

    generate = commands.add_parser("generate", help="continue a text with a trained model")
    generate.add_argument("dir", help="a run's folder, or that of one of its stages")
    generate.add_argument("--prompt", default="", help="text to continue (default: the start of a document)")
    generate.add_argument("--tokens", type=int, default=256, help="longest continuation (default 256)")
    generate.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default 0.8)")
    generate.add_argument("--top-k", type=int, default=0, help="only the k likeliest tokens (default 0: all)")
    generate.add_argument(
        "--top-p", type=float, default=1.0, help="only the likeliest tokens of this total probability"
    )
    generate.add_argument(
        "--min-p", type=float, default=0.0, help="only tokens at least so many times as likely as the likeliest"
    )
    generate.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given again"
    )
    generate.add_argument("--seed", type=int, default=0, help="another seed, another text")
    generate.add_argument("--samples", type=int, default=1, help="how many continuations")
    generate.set_defaults(command=_generate, takes_overrides=False)

    chat = commands.add_parser("chat", help="talk to a trained model in the terminal")
    chat.add_argument("dir", help="a run's folder, or that of one of its stages")
    chat.add_argument("--system", default="", help="what the model is told first")
    chat.add_argument("--tools", default="", metavar="TASK", help="the task whose tools it may call (calculator)")
    chat.add_argument("--tokens", type=int, default=256, help="longest reply (default 256)")
    chat.add_argument("--temperature", type=float, default=0.0, help="above 0 draws (default 0: the likeliest token)")
    chat.add_argument("--top-p", type=float, default=1.0, help="only the likeliest tokens of this total probability")
    chat.add_argument("--seed", type=int, default=0, help="another seed, other draws")
    chat.set_defaults(command=_chat, takes_overrides=False)

    score = commands.add_parser(
        "eval", formatter_class=raw, allow_abbrev=False, help="score a trained model: accuracy, fluency, coherence ...",
        description=helps.EVAL,
    )  # fmt: skip
    score.add_argument("dir", metavar="RUN", help="a run's folder (its last stage), or that of one of its stages")
    score.add_argument("--suite", default="all", help="which, with commas between (default all)")
    score.add_argument(
        "--tasks", action="append", default=[], metavar="NAME", help="what accuracy asks, contamination looks for: a "
        "task's name or \"multiple_choice(path='FILE.jsonl')\", several with commas between, or given again (default: "
        "the run's own); with --suite harness, lm-evaluation-harness's names",
    )  # fmt: skip
    score.add_argument(
        "--text", action="append", default=[], metavar="FILE", help="held-out text of your own for fluency, coherence, "
        "contamination; given again, texts are compared (default: what the run holds out)",
    )  # fmt: skip
    score.add_argument(
        "--heldout", default="", metavar="STAGE", help="a stage of the same run whose held-out rows and text fluency "
        "and coherence read, so that stages are compared on the same (default: the run's own)",
    )  # fmt: skip
    score.add_argument("--rows", type=int, default=256, help="of each task, text and test; 0: all (default 256)")
    score.add_argument("--seed", type=int, default=0, help="another seed draws other rows, orders and resamples")
    score.add_argument(
        "--format", default="auto", help="chat: ask through the chat template; plain: by text alone; auto: chat for "
        "stages that are trained on conversations (default auto)",
    )  # fmt: skip
    score.add_argument(
        "--row-length", type=int, default=0, help="positions that the model sees at once (default: those it trained on)"
    )
    score.add_argument(
        "--temperature", type=float, default=1.0, help="of the text that fluency looks at; tasks are answered by the "
        "likeliest tokens (default 1)",
    )  # fmt: skip
    score.add_argument("--ngram", type=int, default=13, help="words in a row that contamination looks for (default 13)")
    score.add_argument(
        "--include_path", default="", metavar="FOLDER", help="harness: a folder of task files (YAML) of your own"
    )
    score.add_argument(
        "--shots", type=int, default=-1, help="harness: solved rows shown before each (default: as the task says)"
    )
    score.add_argument(
        "--bias", action="append", default=[], metavar="WHAT", help="bias: swaps, swaps=FILE, canary=blims/daxes, "
        "crows_pairs=FILE, stereoset=FILE, winogender=FILE, winobias=FILE, bbq=FILE; several with commas between, or "
        "given again (default swaps)",
    )  # fmt: skip
    score.add_argument("--reward", default="", metavar="RUN", help="bias: a reward model whose scores are compared too")
    score.add_argument(
        "--json", default="", metavar="FILE", help="where the results go (default: eval.json in the run's folder)"
    )
    score.set_defaults(command=_eval, takes_overrides=False)

    prepare = commands.add_parser(
        "prepare", formatter_class=raw, allow_abbrev=False, help="filter, deduplicate and tokenise text at scale",
        description=helps.PREPARE,
    )  # fmt: skip
    arguments.add(prepare)
    prepare.set_defaults(command=_prepare, takes_overrides=False)

    look = commands.add_parser("inspect", help="stages, steps, parameters and configuration of a run")
    look.add_argument("dir", help="a run's folder, or that of one of its stages")
    look.set_defaults(command=_inspect, takes_overrides=False)

    export = commands.add_parser(
        "export", help="write a run as a folder that transformers loads",
        description="Writes config.json, safetensors, the tokenizer with its chat template, and a model card with the "
        "run's data, settings and scores. --to must not exist yet.",
    )  # fmt: skip
    export.add_argument("dir", help="a run's folder, that of one of its stages, or hf:FOLDER")
    export.add_argument("--to", required=True, metavar="FOLDER", help="the folder to write")
    export.add_argument(
        "--dtype", default="float32", help="of the tensors: float32, bfloat16, float16 (default float32)"
    )
    export.add_argument("--family", default="", help="a family of transformers (default: the first that computes this)")
    export.add_argument("--shard-gb", type=float, default=5.0, help="largest file of tensors, in GB (default 5)")
    export.add_argument("--adapter", action="store_true", help="the adapters alone (model.lora), as PEFT loads them")
    export.set_defaults(command=_export, takes_overrides=False)

    check = commands.add_parser(
        "check", formatter_class=raw, help="check a fine-tuning file of OpenAI's, line by line", description=helps.CHECK
    )
    check.add_argument("file", metavar="FILE", help="JSON Lines (.gz too); a folder or a glob stands for its files")
    check.add_argument(
        "--kind", default="auto", help="supervised, preference or reinforcement (default auto: by most lines' fields)"
    )
    check.add_argument(
        "--grader", default="", metavar="FILE", help="a grader's JSON, whose fields each reinforcement line must have"
    )
    check.add_argument("--json", default="", metavar="FILE", help="write the report here too, for programs")
    check.set_defaults(command=_check, takes_overrides=False)

    bench_arguments.add(commands)
    return parser


def _run(args: argparse.Namespace, rest: list[str]) -> None:
    from lmtrain import experiment, log

    done = experiment.run(args.config, args.workdir, rest)
    log.say(f"lmtrain run: {done.stage} is at step {done.step}, in {args.workdir}")


def _plan(args: argparse.Namespace, rest: list[str]) -> None:
    if not args.topology.startswith(("cpu", *("a100", "h100", "h200", "b200"))):
        import jax

        jax.config.update("jax_platforms", "cpu")  # TPUs are only described; what is here is left alone
    from lmtrain.plan import plan

    plan(args.config, args.topology, args.stage, args.slices, compile=args.compile, price=args.price,
         searches=args.search, tokens=args.tokens, overrides=rest, to_json=args.json)  # fmt: skip


def _generate(args: argparse.Namespace, rest: list[str]) -> None:
    from lmtrain import compilation, runs

    if args.samples < 1:
        raise LmtrainError(f"--samples is {args.samples}, but takes at least 1.")
    compilation.use_cache()
    run = runs.load(args.dir)
    for i in range(args.samples):
        pieces = run.stream(
            args.prompt,
            args.tokens,
            args.temperature,
            args.stop,
            top_k=args.top_k,
            top_p=args.top_p,
            min_p=args.min_p,
            seed=args.seed + i,
        )
        print(args.prompt + next(pieces, ""), end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
        print("\n")
    print(f"lmtrain generate: {args.samples} from {run.folder / run.stage}, step {run.step}", file=sys.stderr)


def _chat(args: argparse.Namespace, rest: list[str]) -> None:
    from lmtrain import compilation, runs, tasks, terminal

    compilation.use_cache()
    tools = tasks.get(args.tools) if args.tools else None
    run = runs.load(args.dir)
    replies = terminal.chat(
        run, args.system, tools, max_tokens=args.tokens, temperature=args.temperature, top_p=args.top_p, seed=args.seed
    )
    print(f"lmtrain chat: {replies} replies from {run.folder / run.stage}, step {run.step}", file=sys.stderr)


def _eval(args: argparse.Namespace, rest: list[str]) -> None:
    from lmtrain import evaluate
    from lmtrain.eval import suites
    from lmtrain.eval.subject import Settings
    from lmtrain.tasks import spec

    settings = Settings(
        tasks=tuple(name for text in args.tasks for name in spec.several(text)), text=tuple(args.text),
        heldout=args.heldout, rows=args.rows, seed=args.seed, format=args.format, row_length=args.row_length,
        temperature=args.temperature, ngram=args.ngram, include_path=args.include_path, shots=args.shots,
        bias=tuple(args.bias), reward=args.reward,
    )  # fmt: skip
    if args.heldout and (args.text or not {"fluency", "coherence"} & set(suites.names(args.suite))):
        raise LmtrainError(
            f"--heldout {args.heldout} says whose held-out text --suite fluency and coherence read; "
            + ("--text gives them another." if args.text else f"--suite is {args.suite}.")
        )
    evaluate.evaluate(args.dir, args.suite, settings, args.json)


def _prepare(args: argparse.Namespace, rest: list[str]) -> None:
    from lmtrain.prepare import run

    manifest = run.prepare(arguments.settings(args))
    if manifest is None:
        print(
            "lmtrain prepare: the jobs are queued; the same command says how far they are, and queues again what failed"
        )
    else:
        print(f"lmtrain prepare: {manifest}; trained on with data.source=prepared data.path={args.to}")


def _inspect(args: argparse.Namespace, rest: list[str]) -> None:
    from lmtrain import report

    print(report.inspect(args.dir))


def _export(args: argparse.Namespace, rest: list[str]) -> None:
    from lmtrain import publish

    if not args.shard_gb > 0:
        raise LmtrainError(f"--shard-gb is {args.shard_gb}, but takes a number above 0.")
    if args.adapter:
        to = publish.export_adapter(args.dir, args.to, args.family)
    else:
        to = publish.export(args.dir, args.to, args.dtype, args.family, int(args.shard_gb * 1e9))
    print(f"lmtrain export: {args.dir}, written to {to}")


def _check(args: argparse.Namespace, rest: list[str]) -> None:
    from lmtrain.interop import openai_data

    report = openai_data.check(args.file, args.kind, args.grader)
    print(report.text(), flush=True)
    if args.json:
        report.write(args.json)
    if report.bad:
        raise LmtrainError(f"{args.file}: {len(report.bad):,} of {report.lines:,} lines are bad")


if __name__ == "__main__":
    sys.exit(main())
