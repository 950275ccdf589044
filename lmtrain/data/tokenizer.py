"""Text to token ids and back: byte-level BPE (Sennrich et al. 2016; on bytes: Radford et al. 2019), by `tokenizers`.

Ids 0..7 are the special tokens, 8..263 the bytes 0..255 in order, then comes one id for each merge. Plain text never
yields a special id, even where it spells one, and every byte string comes back exactly: what is not UTF-8 goes byte by
byte.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from lmtrain.data import cuts
from lmtrain.data.cuts import as_bytes
from lmtrain.schema import ConfigError
from lmtrain.types import LmtrainError, nearest

SPECIALS = (
    "<|endoftext|>",
    "<|pad|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|tool_call|>",
    "<|tool_result|>",
    "<|end|>",
)
FIRST_BYTE = len(SPECIALS)
SMALLEST = FIRST_BYTE + 256  # vocabulary without a merge
LARGEST = 10_000_000  # forty times the largest in use; the trainer asks for memory by this number

#: Where words end before BPE sees them, after GPT-4's pattern: contractions; a word with the one character before it
#: (mostly a space); numbers in groups of at most two digits (three would spend too much of a small vocabulary on them);
#: punctuation; line ends; and runs of blanks that leave the last one to the word after (the indentation of code).
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

#: Files beside a tokenizer.json that say how its model chats, and stops.
BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "generation_config.json")
# What other vocabularies call the token that ends a document.
_END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "<eos>", "</s>", "<|im_end|>")


class Tokenizer:
    """Encodes and decodes. `backend` is the `tokenizers.Tokenizer` underneath; `source` names it in errors."""

    def __init__(self, backend: tokenizers.Tokenizer, source: str = "tokenizer") -> None:
        self.backend = backend
        self.source = source
        backend.encode_special_tokens = True  # a special token spelt out in the text is text
        backend.no_padding()
        backend.no_truncation()
        self._spec = json.loads(backend.to_str())
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self._special_ids = {t["content"]: t["id"] for t in self._spec["added_tokens"] if t["special"]}
        #: special tokens that swallow the blanks beside them: name -> (before it, after it)
        self.strips = {t["content"]: (t["lstrip"], t["rstrip"]) for t in self._spec["added_tokens"] if t["special"]}
        #: "", or when a blank is put before a text (Llama 2's and other SentencePiece's): "each" text between special
        #: tokens, or the "first" of a conversation
        self.blank, inner = _blank(self._spec)
        self._inner = tokenizers.Tokenizer.from_str(json.dumps(inner)) if self.blank else backend
        self._inner.encode_special_tokens = True
        words = (self._spec["pre_tokenizer"] or {}).get("pretokenizers") or [{}]
        own = words[0].get("pattern") == {"Regex": SPLIT}
        self._piece = cuts.PIECE if own else cuts.FOREIGN_PIECE
        self._pieces = _piece_bytes(self._spec, self.vocab_size, set(self._special_ids.values()))
        single = {piece: i for i, piece in reversed(list(enumerate(self._pieces))) if len(piece) == 1}
        missing = [b for b in range(256) if bytes([b]) not in single]
        if missing:
            raise LmtrainError(
                f"{source}: not a byte-level vocabulary: it has no token for byte {missing[0]:#04x}"
                f" (and {len(missing) - 1} more), so that not every text could be encoded"
            )
        self._byte_ids = np.array([single[bytes([b])] for b in range(256)], np.int32)
        self._only_bytes = self.vocab_size == 256 + len(self._special_ids)
        #: int32[V]: bytes that each token stands for; 0 for special tokens. A blank put before a text is among them.
        self.byte_lengths = np.array([len(piece) for piece in self._pieces], np.int32)

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of all that decides the ids: vocabulary, merges, splitting, added tokens."""
        model = {key: self._spec["model"].get(key) for key in ("vocab", "merges")}
        added = [[token["id"], token["content"], token["special"]] for token in self._spec["added_tokens"]]
        spec = [model, added, self._spec["normalizer"], self._spec["pre_tokenizer"]]
        if self.begin != self.end:
            spec.append(self.begin)
        return hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()

    @property
    def specials(self) -> dict[str, int]:
        """Names of the special tokens, and their ids."""
        return self._special_ids

    def special(self, name: str) -> int:
        """The id of a special token, "<|end|>". "<|endoftext|>" also finds what other vocabularies call theirs.

        Raises:
          LmtrainError: the vocabulary has none of that name.
        """
        names = _END_OF_TEXT if name == "<|endoftext|>" else (name,)
        for candidate in names:
            if candidate in self._special_ids:
                return self._special_ids[candidate]
        has = ", ".join(self._special_ids) or "none"
        raise LmtrainError(f"{self.source}: no special token {name}.{nearest(name, self._special_ids)} (has: {has})")

    @property
    def end(self) -> int:
        """The id that ends every document, <|endoftext|>."""
        return self.special("<|endoftext|>")

    @functools.cached_property
    def begin(self) -> int:
        """The id that begins every document: what the vocabulary puts before a text (<s>, <bos>), else `end`.

        tokenizer.json alone says so; `add_bos_token` of a tokenizer_config.json beside one is not read by transformers
        5 either.

        Raises:
          LmtrainError: it puts more than one token there.
        """
        probe = "a"
        bare, dressed = (self.backend.encode(probe, add_special_tokens=flag).ids for flag in (False, True))
        before = dressed[: next(i for i in range(len(dressed)) if dressed[i : i + len(bare)] == bare)]
        if len(before) > 1:
            names = " ".join(str(self.backend.id_to_token(i)) for i in before)
            raise LmtrainError(f"{self.source}: puts {names} before a text; documents begin with one token")
        return before[0] if before else self.end

    @property
    def pad(self) -> int:
        """The id that fills up a last row; of no meaning to the model, since its segment is 0."""
        return self._special_ids.get("<|pad|>", self.end)

    def extends(self, other: Tokenizer) -> bool:
        """Whether it has all of another's tokens under their ids, splits text alike, and may have more special ones."""
        mine, theirs = self._spec, other._spec
        more = [t for t in mine["added_tokens"] if t["id"] >= other.vocab_size]
        fewer = {**mine, "added_tokens": [t for t in mine["added_tokens"] if t["id"] < other.vocab_size]}
        alike = all(fewer[key] == theirs[key] for key in ("added_tokens", "normalizer", "pre_tokenizer", "model"))
        return alike and all(t["special"] for t in more)

    def with_specials(self, names: Sequence[str]) -> Tokenizer:
        """The same with further special tokens, their ids behind all others.

        Raises:
          ConfigError: one is a token already, or empty.
        """
        for i, name in enumerate(names):
            if not name.strip() or self.backend.token_to_id(name) is not None or name in names[:i]:
                raise ConfigError(
                    f"tokenizer.add has {name!r}, which is {'empty' if not name.strip() else 'a token already'}."
                )
        backend = tokenizers.Tokenizer.from_str(self.backend.to_str())
        backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
        return Tokenizer(backend, self.source)

    def encode(self, text: str | bytes) -> list[int]:
        """Ids of a text. Never a special one; bytes that are not UTF-8 (and lone surrogates) become one token each."""
        return self.encode_batch([text])[0].tolist()

    def encode_batch(
        self, texts: Sequence[str | bytes], done: Callable[[int], None] | None = None, inside: Sequence[bool] = ()
    ) -> list[np.ndarray]:
        """Ids of every text, int32[n] each, encoded by as many threads as `tokenizers` takes (RAYON_NUM_THREADS).

        Args:
          done: called now and then with the number of bytes encoded since.
          inside: for each text, whether it goes on with one before, so that no blank is put before it; (): none does.
        """
        if self._only_bytes:
            ids = [self._byte_ids[np.frombuffer(as_bytes(text), np.uint8)] for text in texts]
            if done:
                done(sum(map(len, ids)))
            return ids
        out: list[list[np.ndarray]] = [[np.empty(0, np.int32)] for _ in texts]
        parts = ((i, part) for i, text in enumerate(texts) for part in cuts.parts(text, self._piece))
        begun = {i for i, flag in enumerate(inside) if flag}  # texts of which something stands before
        for call in cuts.calls(parts):
            kinds: dict[bool, list[str]] = {False: [], True: []}
            order = []  # of each part that is valid: whether something stands before it
            for i, part in call:
                if isinstance(part, str):
                    order.append(i in begun)
                    kinds[i in begun].append(part)
                begun.add(i)
            encoded = {
                inner: iter((self._inner if inner else self.backend).encode_batch_fast(found, add_special_tokens=False))
                for inner, found in kinds.items()
            }
            which = iter(order)
            for i, part in call:
                if isinstance(part, str):
                    out[i].append(np.array(next(encoded[next(which)]).ids, np.int32))
                else:
                    out[i].append(self._byte_ids[np.frombuffer(part, np.uint8)])
            if done:
                done(sum(len(as_bytes(part)) for _, part in call))
        return [np.concatenate(ids) for ids in out]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The exact bytes behind ids; special tokens stand for none."""
        return b"".join([self._pieces[i] for i in ids])

    def decode(self, ids: Iterable[int]) -> str:
        """The text behind ids; what is no UTF-8 (a sample may stop within a character) becomes U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def pieces(self, ids: Iterable[int]) -> Iterator[str]:
        """The text of ids that come one by one, piece by piece: bytes of an unfinished character wait for the rest."""
        waiting: list[int] = []
        for i in ids:
            waiting.append(i)
            text = self.decode(waiting)
            if not text.endswith("\ufffd") or len(waiting) > 4:
                waiting.clear()
                yield text
        if waiting:
            yield self.decode(waiting)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Writes folder/tokenizer.json, which Hugging Face's libraries read too. Returns its path."""
        path = Path(folder) / "tokenizer.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".json.tmp")
        partial.write_text(self.backend.to_str(), encoding="utf-8")
        os.replace(partial, path)
        return path


def train(texts: Iterable[str | bytes], vocab_size: int, limit: int = 0) -> Tokenizer:
    """A BPE of `vocab_size` ids from texts (its first `limit` bytes; 0: all). The same texts give the same tokenizer.

    Fewer ids where the texts hold too few pairs to merge.

    Raises:
      ConfigError: vocab_size leaves no room for the special tokens and the 256 bytes, or is absurd; limit below 0.
      LmtrainError: no text at all.
    """
    if not SMALLEST <= vocab_size <= LARGEST:
        raise ConfigError(
            f"tokenizer.vocab_size: got {vocab_size}, takes at least {SMALLEST} ({FIRST_BYTE} special tokens and the"
            f" 256 bytes) and at most {LARGEST:,}"
        )
    if limit < 0:
        raise ConfigError(f"tokenizer.train_bytes: got {limit}, takes a whole number from 0 up (0: all text)")
    seen = 0

    def pieces() -> Iterator[str]:
        nonlocal seen
        for text in texts:
            data = as_bytes(text)
            data = data[: limit - seen] if limit else data
            seen += len(data)
            yield from cuts.cut(data.decode("utf-8", errors="ignore"))
            if limit and seen >= limit:
                return

    backend = _backend(models.BPE(), specials=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - FIRST_BYTE,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(pieces(), trainer)
    if not seen:
        raise LmtrainError("the tokenizer has no text to learn from: the corpus is empty")
    merges = [tuple(m) for m in json.loads(backend.to_str())["model"]["merges"]]
    return Tokenizer(_backend(_bpe(merges)), source="trained tokenizer")


def bytes_tokenizer() -> Tokenizer:
    """No merges: a token is a byte. Vocabulary of 264."""
    return Tokenizer(_backend(_bpe([])), source="bytes tokenizer")


def load(path: str | os.PathLike[str]) -> Tokenizer:
    """A tokenizer from tokenizer.json, or the folder that holds one: lmtrain's own, or another byte-complete BPE.

    One that normalises (Qwen's composes accents) gives back the normalised text.

    Raises:
      LmtrainError: no such file (with the nearest name), not a tokenizer, or one that cannot encode every byte.
    """
    file = Path(os.path.expanduser(path))
    if os.path.isdir(file):
        file = file / "tokenizer.json"
    if not os.path.isfile(file):
        beside = sorted(os.listdir(file.parent)) if os.path.isdir(file.parent) else []
        raise LmtrainError(f"tokenizer: no file {file}.{nearest(file.name, beside)}")
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises bare Exception
        raise LmtrainError(f"tokenizer: {file} is not a tokenizer.json: {error}") from None
    loaded = Tokenizer(backend, source=str(file))
    probe = "Ab 12\n    def f(x):  # \u00e9\u4e2d\U0001f600\r\n\tend  <|endoftext|>"
    if loaded.decode(loaded.encode(probe)) != (" " if loaded.blank else "") + probe:
        raise LmtrainError(f"tokenizer: {file} does not give a text back as it was; a byte-level BPE does")
    return loaded


def _backend(model: models.BPE, specials: bool = True) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    words = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, to_bytes])
    backend.decoder = decoders.ByteLevel()
    if specials:
        backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIALS])
    return backend


def _bpe(merges: Sequence[tuple[str, str]]) -> models.BPE:
    """The model with this file's order of ids."""
    char = _byte_chars()
    vocab = {name: i for i, name in enumerate(SPECIALS)}
    vocab |= {char[b]: FIRST_BYTE + b for b in range(256)}
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    return models.BPE(vocab=vocab, merges=list(merges))


def _byte_chars() -> list[str]:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2's table)."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(256, 512))
    return [chr(b) if b in kept else chr(next(others)) for b in range(256)]


def _piece_bytes(spec: dict, vocab_size: int, specials: set[int]) -> list[bytes]:
    """The bytes of every id. Byte-level vocabularies spell bytes as characters, SentencePiece's as text and <0xNN>."""
    byte_level = "ByteLevel" in json.dumps(spec["decoder"])
    byte = {c: b for b, c in enumerate(_byte_chars())}
    pieces = [b""] * vocab_size
    vocab = spec["model"].get("vocab", {})
    for piece, i in vocab.items() if isinstance(vocab, dict) else ():
        if byte_level and all(c in byte for c in piece):
            pieces[i] = bytes([byte[c] for c in piece])
        elif not byte_level and (code := re.fullmatch(r"<0x([0-9A-F]{2})>", piece)):
            pieces[i] = bytes([int(code[1], 16)])
        else:
            pieces[i] = piece.replace("\u2581", " ").encode()
    for token in spec["added_tokens"]:
        pieces[token["id"]] = b"" if token["id"] in specials else token["content"].encode()
    return pieces


def _blank(spec: dict) -> tuple[str, dict]:
    """When a tokenizer puts a blank before a text, as Tokenizer.blank says, and the same tokenizer that never does."""
    found, never = set(), json.loads(json.dumps(spec))

    def look(node: Any) -> Any:
        if isinstance(node, list):
            return [kept for item in node if (kept := look(item)) is not None]
        if not isinstance(node, dict):
            return node
        kind = node.get("type")
        if kind == "Prepend":
            found.add("each")
            return None
        if kind == "Metaspace" and node.get("prepend_scheme", "always") != "never":
            found.add("first" if node.get("prepend_scheme") == "first" else "each")
            return {**node, "prepend_scheme": "never"}
        if kind == "ByteLevel" and node.get("add_prefix_space"):
            found.add("each")
            return {**node, "add_prefix_space": False}
        return {key: look(value) for key, value in node.items()}

    for part in ("normalizer", "pre_tokenizer"):
        never[part] = look(never[part])
    return ("first" if found == {"first"} else "each" if found else ""), never
