"""Mixed text with known plants, of any size, always the same: what `lmtrain prepare` should find, and how often.

    python tests/prepare/corpus.py FOLDER 200        # 200 MB into FOLDER/, the truth into FOLDER.json, rows beside it

Documents are sentences of common words in random order: no two are alike, and they pass all rules of quality. Among
them stand, in known numbers, exact and near duplicates, other languages, poor text, e-mail and IP addresses, and rows
of an evaluation set; in JSON Lines (plain, .gz, .zst), Parquet, WARC pages and plain text.
"""

import gzip
import io
import json
import pathlib
import sys

import numpy as np

FUNCTION = """the of and to in that it was for on with as his they be at one have this from had by but some what
there we out other were all your when up use how said an each she which their if will way about many
then them would these""".split()
CONTENT = """time year people day man thing woman life child world school state family student group country
problem hand part place case week company system program question work government number night point
home water room mother area money story fact month lot right study book eye job word business issue
side kind head house service friend father power hour game line end member law car city community
name president team minute idea body information back parent face others level office door health
person art war history party result change morning reason research girl guy moment air teacher force
education foot boy age policy music market sense nation plan college interest death experience
effect class control field development role effort rate heart drug show leader light voice wife
police mind price report decision son view relationship town road arm difference value building
action season society tax director position player record paper space ground form event official
matter center couple site project activity star table need court oil situation cost industry figure
street image phone data picture practice piece land product doctor wall patient worker news test
movie north love support technology step baby computer type attention film tree source river garden
window bridge mountain island winter summer forest letter kitchen horse stone engine metal paint
silver iron village castle soldier captain ocean storm cloud harvest farmer market wheel candle
mirror pocket basket bottle hammer ladder needle blanket""".split()
OTHERS = {
    "de": """der die und in den von zu das mit sich des auf ist im dem nicht ein eine als auch es an werden aus
er hat dass sie nach wird bei einer um am sind noch wie einem so zum war haben nur oder aber vor zur
bis mehr durch man dann Straße Mädchen Häuser Bücher schließlich natürlich während zwischen
gegenüber Arbeiter Geschichte Gesellschaft""",
    "fr": """de la le et les des en un du une que est pour qui dans a par plus pas au sur ne se ce il sont avec
cette mais nous ont aussi leur être fait comme ces était sans sous entre peut deux années même très
après première jeune fille maison travail français république toujours pendant l'histoire d'abord
c'est aujourd'hui également plusieurs""",
}
BASE = 700  # words of a long document


def build(folder, megabytes, seed=0):
    """Writes the corpus. Returns the truth: how many of each plant, and which rows of FOLDER-rows.jsonl stand in it."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    write = Writer(folder)
    truth = dict.fromkeys(("good", "exact", "near", "foreign", "poor", "emails", "addresses", "contaminated"), 0)
    rows = [_sentence(rng, 24) for _ in range(200)]
    planted = rows[::2]
    (folder.parent / f"{folder.name}-rows.jsonl").write_text(
        "".join(json.dumps({"question": row, "answer": "yes"}) + "\n" for row in rows)
    )
    kept = []  # some good ones, to be repeated
    while write.size < megabytes * 1e6:
        text = document(rng)
        kind = rng.random()
        if kind < 0.70 or len(kept) < 20:
            truth["good"] += 1
            write(text, rng.integers(6))
            if len(kept) < 5000:
                kept.append(text)
        elif kind < 0.76:
            truth["exact"] += 1
            write(kept[rng.integers(len(kept))], rng.integers(4))
        elif kind < 0.82:
            truth["near"] += 1
            write(_changed(rng, kept[rng.integers(len(kept))]), rng.integers(4))
        elif kind < 0.86:
            truth["foreign"] += 1
            write(document(rng, OTHERS[("de", "fr")[rng.integers(2)]].split()), rng.integers(6))
        elif kind < 0.91:
            truth["poor"] += 1
            write(_poor(rng), rng.integers(4))
        elif kind < 0.97:
            emails, addresses = int(rng.integers(1, 4)), int(rng.integers(2))
            truth["emails"] += emails
            truth["addresses"] += addresses
            truth["good"] += 1
            signs = [f"write to {_name(rng)}@{_name(rng)}.org" for _ in range(emails)]
            signs += [f"the host was 81.{rng.integers(256)}.{rng.integers(256)}.7"] * addresses
            signs = [f"{sign.capitalize()} for more about the plan." for sign in signs]
            write("\n".join([text, *signs]), rng.integers(4))
        else:
            truth["contaminated"] += 1
            head, tail = text.split("\n", 1)
            write(f"{head}\n{planted[rng.integers(len(planted))]}\n{tail}", rng.integers(4))
    write.close()
    truth |= {"documents": write.count, "bytes": write.size}
    (folder.parent / f"{folder.name}.json").write_text(json.dumps(truth))
    return truth


def document(rng, vocabulary=None):
    """Paragraphs of sentences, 120 to BASE words."""
    out, size = [], int(rng.integers(120, BASE))
    while size > 0:
        sentences = [_sentence(rng, int(rng.integers(8, 18)), vocabulary) for _ in range(int(rng.integers(3, 8)))]
        size -= sum(s.count(" ") + 1 for s in sentences)
        out.append(" ".join(sentences))
    return "\n".join(out) if len(out) > 1 else "\n".join(out + [_sentence(rng, 12, vocabulary)])


def _sentence(rng, count, vocabulary=None):
    if vocabulary:
        words = [vocabulary[i] for i in rng.integers(len(vocabulary), size=count)]
    else:
        picks = rng.integers(1 << 30, size=count)
        words = [FUNCTION[p % len(FUNCTION)] if i % 2 else CONTENT[p % len(CONTENT)] for i, p in enumerate(picks)]
    words[0] = words[0][0].upper() + words[0][1:]
    return " ".join(words) + "."


def _changed(rng, text):
    """Two words in a hundred are others: about .8 of all 5-grams stay."""
    words = text.split(" ")
    for i in rng.choice(len(words), size=max(1, len(words) // 100), replace=False):
        words[i] = "changed"
    return " ".join(words)


def _poor(rng):
    """What the rules of quality are for: too short, the same line again, signs, source code."""
    line = _sentence(rng, 12)
    return [
        _sentence(rng, 20),
        "\n".join([line] * 30),
        " ".join("# $ % & * ="[:: int(rng.integers(1, 3))] for _ in range(120)) + f" {rng.integers(1 << 40)}",
        "\n".join(f"if (x{rng.integers(1000)} > {i}) {{ return {i}; }}" for i in range(40)),
    ][rng.integers(4)]


def _name(rng):
    return "".join(chr(97 + i) for i in rng.integers(26, size=8))


class Writer:
    """Six files: kinds 0..3 take any text, 4 and 5 (pages, plain text) no plants."""

    def __init__(self, folder):
        import zstandard

        self.folder, self.size, self.count = folder, 0, 0
        self.lines = {
            0: (folder / "a.jsonl").open("wb"),
            1: gzip.GzipFile(folder / "b.jsonl.gz", "wb", compresslevel=1, mtime=0),
            2: zstandard.ZstdCompressor().stream_writer((folder / "c.jsonl.zst").open("wb")),
        }
        self.column, self.parquet = [], None
        self.pages = (folder / "e.warc.gz").open("wb")
        (folder / "texts").mkdir()

    def __call__(self, text, kind):
        """One more document."""
        self.size += len(text.encode())
        self.count += 1
        if kind < 3:
            self.lines[int(kind)].write(json.dumps({"text": text, "n": self.count}).encode() + b"\n")
        elif kind == 3:
            self.column.append(text)
            if len(self.column) == 2000:
                self._flush()
        elif kind == 4 or self.count % 50:
            self._page(text)
        else:
            (self.folder / "texts" / f"{self.count:08d}.txt").write_text(text)

    def _flush(self):
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pa.table({"text": self.column})
        self.parquet = self.parquet or pq.ParquetWriter(self.folder / "d.parquet", table.schema)
        self.parquet.write_table(table)
        self.column = []

    def _page(self, text):
        from warcio.statusandheaders import StatusAndHeaders
        from warcio.warcwriter import WARCWriter

        body = "".join(f"<p>{p}</p>" for p in text.split("\n"))
        head = f"<html><head><title>{self.count}</title></head><body><nav>Home</nav>"
        page = f"{head}<article>{body}</article></body></html>"
        http = StatusAndHeaders("200 OK", [("Content-Type", "text/html; charset=utf-8")], protocol="HTTP/1.0")
        writer = WARCWriter(self.pages, gzip=True)
        url = f"http://example.com/{self.count}"
        same = {"WARC-Record-ID": f"<urn:uuid:{self.count:032x}>", "WARC-Date": "2026-01-01T00:00:00Z"}
        payload = io.BytesIO(page.encode())
        record = writer.create_warc_record(url, "response", payload, http_headers=http, warc_headers_dict=same)
        writer.write_record(record)

    def close(self):
        """Ends all files."""
        if self.column:
            self._flush()
        self.parquet and self.parquet.close()
        for file in (*self.lines.values(), self.pages):
            file.close()


if __name__ == "__main__":
    print(json.dumps(build(sys.argv[1], float(sys.argv[2])), indent=1))
