"""What the command's longer --help pages say, and every field of an experiment, read off schema.py."""

from __future__ import annotations

import dataclasses
import inspect
import typing

from lmtrain import schema

RUN = """Runs the stages of an experiment in order. Run again, it goes on where it stopped, to the bit.
SIGTERM and Ctrl-C save first (exit status 75). Under Slurm, in a JobSet and on TPU pods it finds the other hosts;
elsewhere LMTRAIN_COORDINATOR=HOST:PORT, LMTRAIN_PROCESSES and LMTRAIN_PROCESS name them (docs/hosts.md).
Any setting is changed by --config.PATH=VALUE:

  lmtrain run --config experiments/quickstart.py --workdir runs/quickstart
  lmtrain run --config experiments/pretrain.py:30m --workdir runs/a --config.stages.pretrain.data.path=books/
  lmtrain run ... --config.mesh.fsdp=2 --config.mesh.tensor=2"""


CHECK = """Says which lines of a fine-tuning file lmtrain can train on, and what is wrong with each other one: its
file and line, the reason, what was expected. Exit status 0: all lines are good; 2: one is bad.

  lmtrain check train.jsonl
  lmtrain check prompts.jsonl --kind reinforcement --grader grader.json --json report.json

supervised      {"messages": [..., an assistant's], "tools": [...], "parallel_tool_calls": true}
preference      {"input": {"messages": [...]}, "preferred_output": [message], "non_preferred_output": [message]}
reinforcement   {"messages": [..., a user's], and fields that the grader reads}

The good lines are trained on with data.source=openai (supervised, preference) and the task openai (reinforcement)."""


PLAN = """Says what an update of a stage takes on a topology, before any of it is there: memory by part, bytes that each
axis of the mesh moves, step time and MFU by the roofline, days and money. docs/plan.md says how, and how true it is.

  lmtrain plan --config experiments/pretrain.py:8b --topology v5p:4x4x4 --config.mesh.data=1 --config.mesh.fsdp=64
  lmtrain plan --config experiments/pretrain.py:8b --topology v5e:16x16 --slices 4 --search --price 1.2
  lmtrain plan ... --compile        the real update compiled for those devices, by libtpu: pip install -e ".[tpu]"

Topologies: v4, v5e, v5p, v6e:AxB[xC] (a slice of TPUs); a100, h100, h200, b200:8xHOSTS; cpu:N."""


EVAL = """Scores a model. Every score stands with its 95 % interval (percentile bootstrap over rows) and its number of
rows; docs/evaluation.md says what each means. Suites:

  accuracy       tasks answered and scored; multiple choice by log-likelihood
  fluency        bits per byte of held-out text, and how generated text repeats itself
  coherence      the true continuation against shuffled and foreign ones; consistency in a chat
  overfitting    loss on rows learned from against held-out rows, with an alarm
  contamination  evaluation rows that stand in the training data
  bias           how differently groups are treated, by --bias; with intervals; not part of all
  harness        lm-evaluation-harness's tasks (--tasks), where it is installed; not part of all

  lmtrain eval runs/quickstart
  lmtrain eval runs/quickstart/pretrain --suite fluency,coherence --text book.txt
  lmtrain eval runs/mine --suite accuracy,contamination --tasks "multiple_choice(path='exam.jsonl')"
  lmtrain eval runs/mine --suite harness --tasks exam --include_path my_tasks/"""


PREPARE = """Makes raw text a corpus that pretraining reads: filters it, drops what stands twice and what stands in
evaluation sets, tokenises it, and says in FOLDER/manifest.json what was dropped and why. Killed, the same command goes
on. docs/prepare.md says what each step does.

  lmtrain prepare --input crawl/*.warc.gz books/ --to corpus/ --pii --decontaminate exam.jsonl \\
      --decontaminate "gsm8k(path='gsm8k-train.jsonl', heldout_path='gsm8k-test.jsonl')"
  lmtrain prepare --input s3://bucket/*.jsonl.zst --to corpus/ --executor slurm --option partition=cpu \\
      --option time=8:00:00 --workers 500
  lmtrain run --config experiments/pretrain.py:30m --workdir runs/a --config.stages.pretrain.data.source=prepared \\
      --config.stages.pretrain.data.path=corpus/ --config.stages.tokenizer.kind=file \\
      --config.stages.tokenizer.path=corpus/tokenizer

Files: .jsonl .ndjson .parquet .warc .wet .txt .md .rst .html, each also .gz .zst .bz2 .xz. Applied in this order:

  language        py3langid, or a fastText model; dropped where another language is likelier, or none is sure
  gopher          repetition, length, symbols, stop words (arXiv 2112.11446)
  c4              lines and sentences (arXiv 1910.10683); drops lines of a document too
  fineweb         punctuation, short and repeated lines (arXiv 2406.17557)
  exact, minhash  one of every set of equal, and of nearly equal, texts stays
  decontaminate   13 words in a row of an evaluation row, or a shorter question whole
  pii             e-mail and public IP addresses are replaced"""


def fields_help() -> str:
    """Every field with its default and meaning, read off schema.py."""
    lines = ["settings (--config.PATH=VALUE):"]

    def show(cls: type, path: str) -> None:
        notes = {}
        for line in inspect.getsource(cls).splitlines():
            name, _, rest = line.strip().partition(":")
            if "#" in rest:
                notes[name] = rest.split("#", 1)[1].strip()
        hints = typing.get_type_hints(cls)
        for f in dataclasses.fields(cls):
            if dataclasses.is_dataclass(hints[f.name]) and isinstance(hints[f.name], type):
                show(hints[f.name], f"{path}{f.name}.")
            elif f.name != "stages":
                default = f.default if f.default is not dataclasses.MISSING else "{}"
                lines.append(f"  {f'{path}{f.name}={default!r}':<52}  {notes.get(f.name, '')}".rstrip())

    show(schema.Experiment, "")
    lines.append("  a training stage:")
    show(schema.Stage, "stages.NAME.")
    lines.append("  a tokenizer stage:")
    show(schema.Tokenizer, "stages.tokenizer.")
    return "\n".join(lines).replace("%", "%%")
