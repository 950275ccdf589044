import json
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import processors

from lmtrain.data import cuts, tokenizer
from lmtrain.schema import ConfigError
from lmtrain.types import LmtrainError

TEXT = ["def f(x):\n    return x + 12\n\n\nclass A:\n    def g(self):\n        pass\n"] * 3 + [
    "It's the same, isn't it? The cat, the hat; 1234 and 1235.\n" * 4,
    "\u00e9t\u00e9 \u4e2d\u6587 \U0001f600 the end",
]
BPE = tokenizer.train(TEXT, 400)
BYTES = tokenizer.bytes_tokenizer()
FILE = """
import sys
from lmtrain.data import tokenizer
text = sys.stdin.read()
print(tokenizer.train([text] * 3, 300).fingerprint)
"""


@pytest.mark.parametrize("tok", [BPE, BYTES], ids=["bpe", "bytes"])
@given(data=st.one_of(st.binary(max_size=200), st.text(max_size=200).map(str.encode)))
@example(data=b"\xed\xa0\x80 a surrogate, \xff\xfe and a cut character \xf0\x9f\x98")
@example(data="<|endoftext|><|end|>\r\n\t  \u00a0x".encode())
def test_every_byte_string_comes_back(tok, data):
    assert tok.decode_bytes(tok.encode(data)) == data


@given(st.text(st.characters(exclude_categories=()), max_size=100))
def test_every_str_comes_back_lone_surrogates_as_bytes(text):
    ids = BPE.encode(text)
    assert BPE.decode_bytes(ids) == text.encode("utf-8", "surrogatepass")
    if not any(0xD800 <= ord(c) < 0xE000 for c in text):
        assert BPE.decode(ids) == text


@given(st.lists(st.sampled_from([*tokenizer.SPECIALS, "<|", "|>", "end", " "]), max_size=8).map("".join))
def test_text_never_gives_a_special_id(text):
    for tok in (BPE, BYTES):
        assert min(tok.encode(text), default=tokenizer.FIRST_BYTE) >= tokenizer.FIRST_BYTE


def test_ids_of_specials_and_bytes_are_fixed():
    for tok in (BPE, BYTES):
        assert [tok.special(name) for name in tokenizer.SPECIALS] == list(range(8))
        assert [tok.decode_bytes([8 + b]) for b in range(256)] == [bytes([b]) for b in range(256)]
        assert tok.byte_lengths[:8].sum() == 0 and (tok.byte_lengths[8:264] == 1).all()
    assert BYTES.vocab_size == tokenizer.SMALLEST == 264
    assert BYTES.encode("ab") == [8 + 97, 8 + 98]


def test_byte_lengths_are_those_of_the_text():
    ids = BPE.encode(TEXT[-1])
    assert BPE.byte_lengths[ids].sum() == len(TEXT[-1].encode())
    assert len(ids) < len(TEXT[-1].encode()), "the merges are used"


def test_digits_go_in_groups_of_at_most_two_and_words_keep_their_space():
    digits = tokenizer.train(["1234 5678 " * 50], 600)
    assert max(len(p) for p in map(digits.decode, ([i] for i in range(264, digits.vocab_size))) if p.isdigit()) == 2
    assert " the" in {BPE.decode([i]) for i in range(264, BPE.vocab_size)}
    words = tokenizer.train(["        return self\n" * 50], 600)  # indentation leaves its last blank to the word
    assert words.decode([words.encode("        return")[-1]]) == " return"


PARTS = ["\n", " ", "  ", "a", "the ", "x\n", "!\n", "\r\n", "12", "\t", "'s", "\r", "\x0b", "\x1c"]


@given(st.lists(st.sampled_from(PARTS), max_size=60))
def test_cutting_where_a_line_starts_gives_the_ids_of_the_whole(parts):
    text = "".join(parts)
    pieces = cuts._LINE_START.split(text)
    assert [i for piece in pieces for i in BPE.encode(piece)] == BPE.encode(text)


@pytest.mark.parametrize("line", ["def f(x):\n    return 1\n", "    indented throughout  \n\n  \n", "!\n\n   x\r\n"])
def test_a_long_text_is_encoded_in_pieces_as_the_whole(line):
    text = line * (3 * cuts.PIECE // len(line))
    assert len(list(cuts.cut(text))) > 2
    assert BPE.encode(text) == BPE.backend.encode(text, add_special_tokens=False).ids


def test_the_same_texts_train_the_same_tokenizer_in_another_process():
    text = "the same texts, the same merges; the ties fall the same way\n" * 3
    runs = [
        subprocess.run([sys.executable, "-c", FILE], input=text, capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    ]
    assert runs[0] == runs[1] == tokenizer.train([text] * 3, 300).fingerprint + "\n"


def test_training_reads_no_more_than_its_limit():
    assert tokenizer.train(["aaaa" * 10, "bcbc" * 100], 600, limit=40).fingerprint == (
        tokenizer.train(["aaaa" * 10], 600).fingerprint
    )


def test_save_and_load_give_the_same_tokenizer(tmp_path):
    path = BPE.save(tmp_path)
    for where in (path, tmp_path):
        loaded = tokenizer.load(where)
        assert loaded.fingerprint == BPE.fingerprint and loaded.vocab_size == BPE.vocab_size
        assert loaded.encode(TEXT[0] + "<|end|>") == BPE.encode(TEXT[0] + "<|end|>")
    assert BPE.fingerprint != BYTES.fingerprint


def test_hugging_face_reads_the_saved_file_and_knows_the_specials(tmp_path):
    plain = tokenizers.Tokenizer.from_file(str(BPE.save(tmp_path)))
    assert plain.encode("hello<|end|>").ids[-1] == 7
    assert plain.decode(BPE.encode(TEXT[0])) == TEXT[0]


def test_loads_a_byte_fallback_vocabulary(tmp_path):
    vocab = {"<eos>": 0, **{f"<0x{b:02X}>": b + 1 for b in range(256)}, "\u2581": 257, "a": 258, "\u2581a": 259}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [("\u2581", "a")], byte_fallback=True))
    backend.normalizer = tokenizers.normalizers.Replace(" ", "\u2581")
    backend.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.Replace("\u2581", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
    )
    backend.add_special_tokens(["<eos>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    tok = tokenizer.load(tmp_path)
    assert tok.decode(tok.encode("b a <eos> \u00e9")) == "b a <eos> \u00e9"
    assert tok.end == tok.pad == 0 and 0 not in tok.encode("<eos>") and 259 in tok.encode("b a")
    assert tok.decode_bytes(tok.encode(b"\xff a")) == b"\xff a"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{broken", "is not a tokenizer.json"),
        (json.dumps({"model": 1}), "is not a tokenizer.json"),
        (tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, [])).to_str(), "not a byte-level vocabulary"),
        (tokenizers.Tokenizer(tokenizers.models.Unigram([("a", 0.0)], 0)).to_str(), "not a byte-level vocabulary"),
    ],
)
def test_a_bad_file_is_named(tmp_path, content, message):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(LmtrainError, match=message) as error:
        tokenizer.load(tmp_path)
    assert str(tmp_path / "tokenizer.json") in str(error.value)


def test_a_tokenizer_that_changes_the_text_is_refused(tmp_path):
    lower = tokenizers.Tokenizer.from_str(BPE.backend.to_str())
    lower.normalizer = tokenizers.normalizers.Lowercase()
    lower.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(LmtrainError, match="does not give a text back"):
        tokenizer.load(tmp_path)


def test_a_missing_file_gives_the_nearest_name(tmp_path):
    BPE.save(tmp_path)
    with pytest.raises(LmtrainError, match=r"Did you mean tokenizer\.json\?"):
        tokenizer.load(tmp_path / "tokeniser.json")
    for path in ("~nosuchuser/x", "x" * 5000):
        with pytest.raises(LmtrainError, match="tokenizer: no file"):
            tokenizer.load(path)


def test_wrong_sizes_and_names_are_refused():
    with pytest.raises(ConfigError, match="vocab_size: got 263, takes at least 264"):
        tokenizer.train(TEXT, 263)
    with pytest.raises(ConfigError, match=r"tokenizer\.vocab_size: got 1000+, takes .* at most 10,000,000"):
        tokenizer.train(TEXT, 10**23)
    with pytest.raises(ConfigError, match=r"tokenizer\.train_bytes: got -1, takes a whole number from 0 up"):
        tokenizer.train(TEXT, 300, limit=-1)
    with pytest.raises(LmtrainError, match="no text to learn from"):
        tokenizer.train([], 300)
    with pytest.raises(LmtrainError, match=r"Did you mean <\|end\|>\?"):
        BPE.special("<|ende|>")


def test_noise_is_encoded_in_linear_time():
    noise = np.random.default_rng(0).integers(0, 256, 1 << 17, dtype=np.uint8).tobytes()
    assert BPE.decode_bytes(BPE.encode(noise)) == noise


# ----------------------------------------------------------------------------------------------- SentencePiece's kinds
def sentencepiece(kind):
    """As Llama 2's ("each": the older ones, a normaliser), Mistral's newer ("first") and Gemma's ("") are written."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{b:02X}>": 3 + b for b in range(256)}
    for c in "\u2581abcdefghijklmnopqrstuvwxyz.[]/INST\n":
        vocab.setdefault(c, len(vocab))
    merges = []
    for a, b in [("t", "h"), ("th", "e"), ("\u2581", "the"), ("\u2581", "a"), ("\u2581", "\u2581"), ("i", "n")]:
        merges.append((a, b))
        vocab.setdefault(a + b, len(vocab))
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    undo = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    if kind == "each":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    elif kind == "first":
        backend.pre_tokenizer = pre_tokenizers.Metaspace("\u2581", prepend_scheme="first", split=False)
    else:
        backend.normalizer = normalizers.Replace(" ", "\u2581")
    backend.decoder = decoders.Sequence(undo + ([decoders.Strip(" ", 1, 0)] if kind else []))
    backend.add_special_tokens([tokenizers.AddedToken(n, special=True, normalized=False) for n in ("<s>", "</s>")])
    return backend


@pytest.mark.parametrize("kind", ["each", "first", ""])
def test_a_blank_is_put_where_sentencepiece_puts_it(kind, tmp_path):
    """Ids of texts, and of a conversation with special tokens in it, are those of the whole text encoded at once."""
    from lmtrain.data import chat

    sentencepiece(kind).save(str(tmp_path / "tokenizer.json"))
    tok = tokenizer.load(tmp_path)
    reference = sentencepiece(kind)
    assert tok.blank == kind
    for text in ("the end", "  the\n  a thing \u00e9\U0001f600", "", "in\n\nthe"):
        assert tok.encode(text) == reference.encode(text, add_special_tokens=False).ids
        blank = kind == "each" or kind == "first" and not text.startswith(" ")  # where one stands, Metaspace adds none
        assert tok.decode(tok.encode(text)) == (" " if blank and text else "") + text
    assert tok.encode_batch(["the end"], inside=[True])[0].tolist() == sentencepiece("").encode("the end").ids
    template = (
        "{{ '<s>' }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content + '</s>' }}{% endif %}{% endfor %}"
    )
    messages = [{"role": "user", "content": "the a"}, {"role": "assistant", "content": "in the"},
                {"role": "user", "content": "a"}, {"role": "assistant", "content": "the end"}]  # fmt: skip
    whole = "<s>[INST] the a [/INST] in the</s>[INST] a [/INST] the end</s>"
    ids, weights = chat.Template(tok, template).encode(messages)
    assert ids.tolist() == reference.encode(whole, add_special_tokens=False).ids
    assert tok.decode(ids[weights > 0]) == " in the the end"


def test_a_long_text_of_another_tokenizer_is_not_cut_where_its_words_may_go_on(tmp_path):
    sentencepiece("").save(str(tmp_path / "tokenizer.json"))
    text = "the a\n   the in\n" * 3000
    assert tokenizer.load(tmp_path).encode(text) == sentencepiece("").encode(text).ids


def with_start(folder, processor):
    """A folder with a tokenizer that has <s>, put before a text or not."""
    made = BPE.with_specials(["<s>"])
    made.backend.post_processor = processor
    made.save(folder)
    return folder


START = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BPE.vocab_size)])


@pytest.mark.parametrize(
    ("processor", "own"),
    [(None, False), (processors.ByteLevel(), False), (START, True),
     (processors.Sequence([processors.ByteLevel(), START]), True)],
)  # fmt: skip
def test_documents_begin_with_what_the_vocabulary_puts_before_a_text(processor, own, tmp_path):
    tok = tokenizer.load(with_start(tmp_path, processor))
    assert tok.begin == (BPE.vocab_size if own else tok.end) and tok.end == 0
    assert tok.encode("abc") == BPE.encode("abc"), "a text alone has none"
    tok.save(tmp_path / "again")
    again = tokenizer.load(tmp_path / "again")
    assert again.begin == tok.begin and again.fingerprint == tok.fingerprint
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "again" / "tokenizer.json"))
    assert theirs.encode("abc").ids == [tok.begin][:own] + tok.encode("abc")


def test_another_beginning_is_another_vocabulary(tmp_path):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    bare, dressed = tokenizer.load(with_start(tmp_path / "a", None)), tokenizer.load(with_start(tmp_path / "b", START))
    assert bare.fingerprint != dressed.fingerprint, "their corpora differ"


def test_a_beginning_that_cannot_be_is_named(tmp_path):
    two = processors.TemplateProcessing(
        single="<s> <|user|> $A", special_tokens=[("<s>", BPE.vocab_size), ("<|user|>", 3)]
    )
    with pytest.raises(LmtrainError, match=r"puts .* <\|user\|> before a text; documents begin with one token"):
        _ = tokenizer.load(with_start(tmp_path, two)).begin
