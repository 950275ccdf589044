"""What `lmtrain prepare` does, as datatrove pipelines that run one after the other.

clean                read -> language -> quality -> FOLDER/scratch/clean
exact, exact-find    digests of all texts; those that stand twice
minhash, minhash-buckets, minhash-clusters   signatures of what is left; pairs; clusters, of which one text stays
tokenizer            a BPE learned from what is kept, where none is given
tokenise             clean without duplicates -> decontaminate -> PII -> FOLDER/shards
manifest             FOLDER/manifest.json
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.dedup import (
    ExactDedupFilter,
    ExactDedupSignature,
    ExactFindDedups,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.pipeline.dedup.exact_dedup import ExactDedupConfig
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.pipeline.filters import (
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
)
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter
from datatrove.utils.hashing import HashConfig

from lmtrain.prepare import blocks
from lmtrain.prepare.dropped import Dropped
from lmtrain.prepare.read import Read
from lmtrain.prepare.settings import Settings
from lmtrain.prepare.write import Learn, Manifest, Tokenise

LEARN_BYTES = 100_000_000  # text that a tokenizer learns from
# Not xxhash: its version 4 takes no str, which is what datatrove gives it.
_HASH = HashConfig(precision=64, hash_fc="sha1")


@dataclasses.dataclass
class Stage:
    """One pipeline: its blocks, and the number of tasks that share its work."""

    name: str
    pipeline: list[Any]
    tasks: int


class Kept(JsonlReader):
    """What the same task of `clean` has kept: perhaps nothing, for which there is no file."""

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Contract of datatrove's blocks."""
        file = f"{rank:05d}.jsonl.zst"
        if self.data_folder.isfile(file):
            yield from self.read_files_shard([file])


def plan(s: Settings, tasks: int, head: dict[str, Any]) -> list[Stage]:
    """The stages of a preparation, in order.

    Args:
      tasks: of the stages that go through all documents.
      head: what the manifest begins with.
    """
    scratch = f"{s.to}/scratch"
    filters: list[str] = []

    def dropped(name: str, default: str = "") -> Dropped:
        filters.append(name)
        return Dropped(f"{scratch}/dropped/{name}", default or name)

    tokenizer = blocks.words("" if s.language == "all" else s.language)
    read = Read(f"{scratch}/units.jsonl", s.field, s.malformed == "skip", Dropped(f"{scratch}/dropped/read"))
    clean: list[Any] = [read]
    if s.language != "all":
        clean.append(blocks.Language(s.language, s.language_model, dropped("language")))
    for rule in s.quality:
        clean += _QUALITY[rule](s, tokenizer, dropped)
    clean.append(JsonlWriter(f"{scratch}/clean", "${rank}.jsonl.zst", compression="zstd"))
    out = [Stage("clean", clean, tasks)]

    kept: list[Any] = [Kept(f"{scratch}/clean")]
    counted = list(kept)  # the same with filters that say what they drop; each document is dropped in two stages
    if "exact" in s.dedup:
        config = ExactDedupConfig(content_getter=_text, hash_config=_HASH)
        out.append(Stage("exact", [*kept, ExactDedupSignature(f"{scratch}/exact", config, finder_workers=1)], tasks))
        out.append(Stage("exact-find", [ExactFindDedups(f"{scratch}/exact", f"{scratch}/exact-found", config)], 1))
        kept.append(ExactDedupFilter(f"{scratch}/exact-found", config))
        counted.append(ExactDedupFilter(f"{scratch}/exact-found", config, dropped("exact", "the same text")))
    if "minhash" in s.dedup:
        near = MinhashConfig(hash_config=_HASH)
        sign = MinhashDedupSignature(f"{scratch}/minhash", near, language=tokenizer)
        find = MinhashDedupBuckets(f"{scratch}/minhash", f"{scratch}/minhash-pairs", config=near)
        cluster = MinhashDedupCluster(f"{scratch}/minhash-pairs", f"{scratch}/minhash-found", config=near)
        out.append(Stage("minhash", [*kept, sign], tasks))
        out.append(Stage("minhash-buckets", [find], near.num_buckets))
        out.append(Stage("minhash-clusters", [cluster], 1))
        kept.append(MinhashDedupFilter(f"{scratch}/minhash-found"))
        counted.append(MinhashDedupFilter(f"{scratch}/minhash-found", dropped("minhash", "nearly the same text")))
    if s.decontaminate:
        arguments = (f"{scratch}/evaluation.jsonl", s.ngram)
        kept.append(blocks.Decontaminate(*arguments, f"{scratch}/unused", Dropped(f"{scratch}/unused")))
        counted.append(blocks.Decontaminate(*arguments, f"{scratch}/contaminated", dropped("decontaminate")))
    if s.pii:
        kept.append(blocks.Anonymise())
        counted.append(blocks.Anonymise())
    if s.tokenizer == "bpe":
        learn = Learn(kept, tasks, s.vocab_size, LEARN_BYTES, s.heldout_fraction, f"{s.to}/tokenizer")
        out.append(Stage("tokenizer", [learn], 1))
    out.append(Stage("tokenise", [*counted, Tokenise(s.to, s.heldout_fraction)], tasks))
    out.append(Stage("manifest", [Manifest(s.to, head, filters)], 1))
    return out


def _text(document: Document) -> str:
    return document.text


def _gopher(s: Settings, words: Any, dropped: Callable[[str], Dropped]) -> list[Any]:
    """Rae et al. 2021, arXiv 2112.11446, appendix A.1. Its stop words are English ones."""
    least = 2 if s.language in ("en", "all") else 0
    return [
        GopherRepetitionFilter(language=words, exclusion_writer=dropped("gopher-repetition")),
        GopherQualityFilter(language=words, exclusion_writer=dropped("gopher"), min_stop_words=least),
    ]


def _c4(s: Settings, words: Any, dropped: Callable[[str], Dropped]) -> list[Any]:
    """Raffel et al. 2020, arXiv 1910.10683, section 2.2; beside fineweb's rules without the one on how a line ends."""
    ends = "fineweb" not in s.quality
    return [C4QualityFilter(language=words, filter_no_terminal_punct=ends, exclusion_writer=dropped("c4"))]


def _fineweb(s: Settings, words: Any, dropped: Callable[[str], Dropped]) -> list[Any]:
    """Penedo et al. 2024, arXiv 2406.17557, section 3.5: FineWeb's own three rules."""
    return [FineWebQualityFilter(language=words, exclusion_writer=dropped("fineweb"))]


_QUALITY = {"gopher": _gopher, "c4": _c4, "fineweb": _fineweb}
