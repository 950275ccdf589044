"""What `lmtrain prepare` is told, and what of it cannot be."""

from __future__ import annotations

import dataclasses

from lmtrain.types import LmtrainError, nearest

QUALITY = ("gopher", "c4", "fineweb")
DEDUP = ("exact", "minhash")
EXECUTORS = ("local", "slurm", "ray")
MALFORMED = ("refuse", "skip")
# What decides the documents that a model writes.
WRITING = ("synthetic", "prompts", "count", "tokens", "temperature")
# What may change between two calls that go on with one another.
FREE = ("to", "workers", "executor", "options")


@dataclasses.dataclass(frozen=True)
class Settings:
    """The command's arguments.

    Attributes:
      input: paths, folders and globs; to: the folder to write.
      field: what holds the text of a row.
      language: a code of the model that tells languages apart, or "all".
      language_model: a fastText file; "": py3langid.
      quality, dedup: of QUALITY and DEDUP, in the order that they are applied.
      pii: e-mail and public IP addresses are replaced.
      decontaminate, ngram: files and tasks whose rows are looked for, and by how many words in a row.
      synthetic, prompts, count, tokens, temperature: a run that writes `count` more documents, and how.
      tokenizer: "bpe" (learned, `vocab_size` ids), "bytes", or a tokenizer.json, its folder, or a run's folder.
      heldout_fraction: the share of documents that is held out.
      malformed: what becomes of rows that cannot be read.
      task_mb: MB of files that one task reads.
      workers: tasks at once. executor, options: where they run, and further arguments of datatrove's executor.
    """

    input: tuple[str, ...]
    to: str
    field: str = "text"
    language: str = "en"
    language_model: str = ""
    quality: tuple[str, ...] = QUALITY
    pii: bool = False
    dedup: tuple[str, ...] = DEDUP
    decontaminate: tuple[str, ...] = ()
    ngram: int = 13
    synthetic: str = ""
    prompts: str = ""
    count: int = 0
    tokens: int = 512
    temperature: float = 0.8
    tokenizer: str = "bpe"
    vocab_size: int = 32768
    heldout_fraction: float = 0.05
    malformed: str = "refuse"
    task_mb: int = 64
    workers: int = 1
    executor: str = "local"
    options: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        from lmtrain.data.tokenizer import LARGEST, SMALLEST  # for the command alone, not for each start of lmtrain

        for option, given, known in (
            ("quality", self.quality, QUALITY), ("dedup", self.dedup, DEDUP), ("executor", (self.executor,), EXECUTORS),
            ("malformed", (self.malformed,), MALFORMED),
        ):  # fmt: skip
            for name in given:
                if name not in known:
                    none = " or none" if option in ("quality", "dedup") else ""
                    raise LmtrainError(
                        f"--{option}: got {name!r}, takes {', '.join(known)}{none}.{nearest(name, known)}"
                    )
            if len(set(given)) < len(given):
                raise LmtrainError(f"--{option}: {', '.join(given)} has one twice")
        for option, least in (("ngram", 1), ("tokens", 1), ("count", 0), ("task_mb", 1), ("workers", 1)):
            if getattr(self, option) < least:
                raise LmtrainError(f"--{option.replace('_', '-')}: got {getattr(self, option)}, takes {least} or more")
        if not 0 < self.heldout_fraction < 1:
            raise LmtrainError(f"--heldout-fraction: got {self.heldout_fraction}, takes a share between 0 and 1")
        if not 0 <= self.temperature < float("inf"):
            raise LmtrainError(f"--temperature: got {self.temperature}, takes 0 (the likeliest token) or more")
        if self.tokenizer == "bpe" and not SMALLEST <= self.vocab_size <= LARGEST:
            raise LmtrainError(f"--vocab-size: got {self.vocab_size}, takes {SMALLEST} (the 256 bytes and the special"
                               f" tokens) to {LARGEST:,}")  # fmt: skip
        for option in ("field", "tokenizer", "language"):
            if not getattr(self, option):
                raise LmtrainError(f"--{option}: is empty")
        if not self.input and not self.synthetic:
            raise LmtrainError("--input: takes files, folders or globs; without any, --synthetic takes a run")
        if len({bool(self.synthetic), bool(self.prompts), self.count > 0}) > 1:
            raise LmtrainError("--synthetic RUN, --prompts FILE and --count N go together")
        if self.options and self.executor == "local":
            raise LmtrainError("--option: arguments of the executors slurm and ray, not of local")

    def decisive(self) -> dict[str, object]:
        """What decides the result."""
        return {key: value for key, value in dataclasses.asdict(self).items() if key not in FREE}

    def writing(self) -> dict[str, object]:
        """What decides the documents that a model writes."""
        return {key: getattr(self, key) for key in WRITING}
