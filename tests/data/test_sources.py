import gzip
import json
import sys

import pytest

from lmtrain.data import sources, split, stdlib
from lmtrain.data.sources import Document
from lmtrain.schema import ConfigError, Data
from lmtrain.types import LmtrainError


def texts(source, **fields):
    return [document.text for document in sources.read(Data(source=source, **fields))]


def test_text_reads_files_folders_globs_and_gz_sorted_and_as_bytes(tmp_path):
    (tmp_path / "b.txt").write_bytes(b"second \xff\xfe not UTF-8\n")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"first\n"))
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/c.md").write_bytes(b"third")
    (tmp_path / ".hidden").write_bytes(b"no")
    every = [b"first\n", b"second \xff\xfe not UTF-8\n", b"third"]
    assert texts("text", path=str(tmp_path)) == every
    assert texts("text", path=str(tmp_path / "b.txt")) == every[1:2]
    assert texts("text", path=str(tmp_path / "**/*.md")) == every[2:]
    assert texts("text", path=str(tmp_path), limit=2) == every[:2]


def test_text_makes_documents_of_paragraphs_and_lines(tmp_path):
    path = tmp_path / "t.txt"
    path.write_bytes(b"\n\none\ntwo\n \n\nthree\r\n\r\nfour")
    assert texts("text", path=str(path), document="paragraph") == [b"one\ntwo", b"three", b"four"]
    assert texts("text", path=str(path), document="line") == [b"one", b"two", b"three", b"four"]
    names = [d.name for d in sources.read(Data(source="text", path=str(path), document="paragraph"))]
    assert names == [f"{path}:{line}" for line in (3, 7, 9)]


def test_jsonl_reads_a_field_and_names_a_bad_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"story": "one"}\n\n{"story": "tw\\u00f6"}\n')
    assert texts("jsonl", path=str(path), field="story") == ["one", "tw\u00f6"]
    packed = tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert texts("jsonl", path=str(packed), field="story") == ["one", "tw\u00f6"]
    with pytest.raises(LmtrainError, match=r"rows\.jsonl:1: no field 'stor' .*Did you mean story\?"):
        texts("jsonl", path=str(path), field="stor")
    for line, message in (('{"story": ', "not a JSON line"), ('{"story": 3}', "holds int"), ("[1]", "got list")):
        path.write_text('{"story": "one"}\n' + line + "\n")
        with pytest.raises(LmtrainError, match=rf"rows\.jsonl:2: .*{message}"):
            texts("jsonl", path=str(path), field="story")


def test_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": ["one", "two"], "raw": [b"\xff", b"\x00"], "n": [1, 2]}), path)
    assert texts("parquet", path=str(path)) == ["one", "two"]
    assert texts("parquet", path=str(tmp_path), field="raw") == [b"\xff", b"\x00"]
    with pytest.raises(LmtrainError, match=r"no field 'txt' .*Did you mean text\?"):
        texts("parquet", path=str(path), field="txt")
    with pytest.raises(LmtrainError, match="row 1: field 'n' holds int"):
        texts("parquet", path=str(path), field="n")
    path.write_bytes(b"not parquet")
    with pytest.raises(LmtrainError, match="not a Parquet file"):
        texts("parquet", path=str(path))


def test_arrayrecord_holds_json_or_text(tmp_path):
    pytest.importorskip("array_record")
    from array_record.python.array_record_module import ArrayRecordWriter

    path = tmp_path / "rows.arrayrecord"
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in (b'{"text": "one"}', b"two, as it is", b"{three} \xff"):
        writer.write(record)
    writer.close()
    assert texts("arrayrecord", path=str(path)) == ["one", b"two, as it is", b"{three} \xff"]
    assert texts("arrayrecord", path=str(path), field="")[0] == b'{"text": "one"}'
    with pytest.raises(LmtrainError, match=r"record 1: no field 'tex' .*Did you mean text\?"):
        texts("arrayrecord", path=str(path), field="tex")
    path.write_bytes(b"not an array record")
    with pytest.raises(LmtrainError, match="not an ArrayRecord file"):
        texts("arrayrecord", path=str(path))


def test_hf_reads_local_folders_both_ways(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "files").mkdir()
    (tmp_path / "files/train.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    assert texts("hf", path=str(tmp_path / "files")) == ["one", "two"]
    saved = datasets.Dataset.from_dict({"body": ["three", "four"]})
    saved.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"train": saved}).save_to_disk(str(tmp_path / "dict"))
    for name in ("saved", "dict"):
        assert texts("hf", path=str(tmp_path / name), field="body") == ["three", "four"]
        with pytest.raises(LmtrainError, match=r"row 0: no field 'bod' .*Did you mean body\?"):
            texts("hf", path=str(tmp_path / name), field="bod")
    with pytest.raises(LmtrainError, match=r"no split 'trian'.*Did you mean train\?"):
        texts("hf", path=str(tmp_path / "dict"), hf_split="trian")
    with pytest.raises(LmtrainError, match="datasets cannot open"):
        texts("hf", path=str(tmp_path / "files"), subset="no-such")


def test_a_dotted_path_is_a_source(tmp_path, monkeypatch):
    (tmp_path / "mysource.py").write_text(
        "def tales(data):\n    yield 'one'\n    yield b'\\xff'\n    yield data.field\n\ndef bad(data):\n    yield 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert texts("mysource:tales", field="three") == ["one", b"\xff", "three"]
    assert texts("mysource:tales", limit=1) == ["one"]
    assert [path for path, _, _ in sources.inputs(Data(source="mysource:tales"))] == [str(tmp_path / "mysource.py")]
    with pytest.raises(LmtrainError, match="document 1 is int"):
        texts("mysource:bad")
    with pytest.raises(ConfigError, match=r"data\.source 'mysource:tale': .*Did you mean tales\?"):
        texts("mysource:tale")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raises", r"ValueError: no luck \(\S*broken_source\.py:4\)"),
        ("arity", "TypeError: .*positional argument"),
        ("none", "returned NoneType; a source returns or yields many str"),
        ("text", "returned str; a source returns or yields many str"),
        ("yields_none", "document 1 is NoneType; a source yields str"),
        ("number", "takes a function"),
    ],
)
def test_a_source_function_that_fails_is_one_message(tmp_path, monkeypatch, name, message):
    (tmp_path / "broken_source.py").write_text(
        "number = 3\ndef raises(data):\n    yield 'one'\n    raise ValueError('no luck')\ndef arity(): pass\n"
        "def none(data): pass\ndef text(data): return 'text'\ndef yields_none(data): yield None\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(LmtrainError, match=r"data\.mixture\.mine\.source.*broken_source:.*" + message):
        list(sources.read(Data(source=f"broken_source:{name}"), "data.mixture.mine"))


@pytest.mark.parametrize("source", [":x", "..x:y", "x:", "nowhere:tales", "bad_syntax:tales"])
def test_a_dotted_path_that_does_not_import_is_one_message(tmp_path, monkeypatch, source):
    (tmp_path / "bad_syntax.py").write_text("def tales(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    for reads in (sources.read, sources.inputs):
        with pytest.raises(ConfigError, match=rf"data\.source.*{source}"):
            list(reads(Data(source=source)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"source": "jsnol", "path": "x"}, r"data\.source: got 'jsnol'.* Did you mean jsonl\?"),
        ({"source": "text"}, r"data\.path: not set"),
        ({"source": "stdlib", "path": "doc"}, r"data\.path: .*'docs'.* Did you mean docs\?"),
        ({"source": "text", "path": __file__, "document": "lines"}, r"data\.document: .*Did you mean line\?"),
        ({"source": "text", "path": __file__.replace("sources", "souces")}, r"Did you mean \S*/test_sources\.py\?"),
        ({"source": "text", "path": "/no/such/place/*.txt"}, r"no such file, folder or glob: /no/such/place/\*\.txt"),
    ],
)
def test_wrong_settings_name_the_field_and_the_nearest(fields, message):
    with pytest.raises(LmtrainError, match=message):
        list(sources.read(Data(**fields)))


def test_a_cut_gz_is_named(tmp_path):
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"some text\n" * 1000)[:-20])
    for document in ("file", "line", "paragraph"):
        with pytest.raises(LmtrainError, match=r"a\.gz(:\d+)?: cannot be read: .*Replace the file"):
            texts("text", path=str(tmp_path / "a.gz"), document=document)


def test_damaged_bytes_in_a_gz_are_named(tmp_path):
    sound = gzip.compress(b'{"text": "one"}\n' * 20_000)
    damaged = bytearray(sound)
    damaged[10] = 0xFF  # a block of a kind that there is not
    (tmp_path / "a.gz").write_bytes(sound + damaged)
    for source, document in (("text", "file"), ("text", "line"), ("text", "paragraph"), ("jsonl", "auto")):
        with pytest.raises(LmtrainError, match=r"a\.gz(:\d+)?: cannot be read: Error -3 .*Replace the file"):
            texts(source, path=str(tmp_path / "a.gz"), document=document)


def test_a_damaged_page_of_parquet_is_named(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": [f"row {i * i}" for i in range(20_000)]}), path, use_dictionary=False)
    content = bytearray(path.read_bytes())
    content[2000:6000] = b"\xff" * 4000
    path.write_bytes(content)
    with pytest.raises(LmtrainError, match=r"rows\.parquet, after row \d+: cannot be read: .*Replace the file"):
        texts("parquet", path=str(path))


def test_json_nested_without_end_is_named(tmp_path):
    path = tmp_path / "deep.jsonl"
    path.write_text('{"text": "one"}\n{"text": ' + "[" * 200_000 + "]" * 200_000 + "}\n")
    with pytest.raises(LmtrainError, match=r"deep\.jsonl:2: JSON nested too deeply"):
        texts("jsonl", path=str(path))
    with pytest.raises(LmtrainError, match=r"here: JSON nested too deeply"):
        sources._record(path.read_bytes().splitlines()[1], "text", "here")


def test_hf_names_where_reading_ends(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")

    def rows():
        yield {"text": "one"}
        raise ConnectionError("gone\naway")

    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: {"train": rows()})
    with pytest.raises(LmtrainError, match=r"name \(train\), after 1 rows: .*ConnectionError: gone away.*try again"):
        texts("hf", path="name")


@pytest.mark.parametrize("source", ["text", "jsonl", "hf", "arrayrecord", "parquet"])
@pytest.mark.parametrize("path", ["~nosuchuser/x", "x" * 5000, "a/" * 3000 + "*", "zero\0byte", "zero\0byte*"])
def test_a_path_that_the_system_does_not_take_is_one_message(source, path):
    for reads in (sources.read, sources.inputs):
        if source != "hf":
            with pytest.raises(LmtrainError, match=r"data\.mixture\.a\.path: ") as error:
                list(reads(Data(source=source, path=path), "data.mixture.a"))
            assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"source": "text", "path": "/no/such"}, "path"),
        ({"source": "stdlib", "path": "doc"}, "path"),
        ({"source": "text", "path": __file__, "document": "lines"}, "document"),
        ({"source": "text"}, "path"),
        ({"source": "txt", "path": "x"}, "source"),
    ],
)
def test_a_member_of_a_mixture_is_named(fields, name):
    with pytest.raises(LmtrainError, match=rf"^data\.mixture\.a\.{name}: "):
        list(sources.read(Data(**fields), split.field("a")))


@pytest.mark.parametrize(
    ("source", "module", "message"),
    [
        ("parquet", "pyarrow", r"the extra `data` \(pip install -e '\.\[data\]' in a checkout\)"),
        ("hf", "datasets", r"the extra `data` \(pip install -e '\.\[data\]' in a checkout\)"),
        ("arrayrecord", "array_record.python.array_record_module", "pip install array-record"),
    ],
)
def test_a_package_that_is_not_there_comes_with_the_command_for_it(monkeypatch, source, module, message):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(LmtrainError, match=rf"data\.source={source} needs .*{message}"):
        texts(source, path=__file__)


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(LmtrainError, match="no file in folder"):
        texts("text", path=str(tmp_path))


# ------------------------------------------------------------------------------------------------- the embedded corpus


def test_the_embedded_corpus_is_there_without_tests_or_packages():
    names = [name for name, _ in stdlib.files()]
    assert {"json.decoder", "json", "argparse", "ast"} < set(names)
    parts = {part for name in names for part in name.split(".")}
    assert not parts & {"test", "tests", "site-packages", "__pycache__"}
    assert names[:-1] == sorted(names[:-1]) and len(set(names)) == len(names)


@pytest.fixture
def few(monkeypatch):
    """The embedded corpus cut to two modules and the topics, since rendering all takes seconds."""
    kept = [(n, p) for n, p in stdlib.files() if n in ("json.decoder", "textwrap", "pydoc_data.topics")]
    monkeypatch.setattr(stdlib, "files", lambda: kept)


def test_docs_and_source_of_a_module_share_the_key_that_holds_them_out(few):
    found = {d.name: d for d in sources.read(Data())}
    docs, source = found["help json.decoder"], found["source json.decoder"]
    assert docs.key == source.key == source.text != docs.text
    names = {part: {d.name.split()[0] for d in sources.read(Data(path=part))} for part in ("docs", "source")}
    assert names == {"docs": {"help", "topic"}, "source": {"source"}}


def test_docs_hold_the_topics_of_help(few):
    topics = {d.name: d.text for d in sources.read(Data(path="docs")) if d.name.startswith("topic ")}
    assert "AssertionError" in topics["topic assert"] and len(topics) > 50


MODULE = b'''
"""Adds things.

More about it.
"""
import os
__all__ = ["Adder", "add"]

def add(a, b=2, *, c: int = 3) -> int:
    """Adds."""

def hidden():
    """Not shown."""

class Adder(dict):
    """A class."""
    def put(self, x):
        """Puts.

        Twice."""
    def _private(self): pass
    async def get(self): pass
'''

HELP = """\
Help on module things.adder:

NAME
    things.adder - Adds things.

DESCRIPTION
    More about it.

CLASSES
    class Adder(dict)
     |  A class.
     |
     |  Methods defined here:
     |
     |  async get(self)
     |
     |  put(self, x)
     |      Puts.
     |
     |      Twice.

FUNCTIONS
    add(a, b=2, *, c: int=3) -> int
        Adds.
"""


def test_documentation_is_laid_out_like_help():
    assert stdlib.render("things.adder", MODULE) == HELP


def test_a_module_that_does_not_parse_or_says_nothing_has_no_documentation():
    assert stdlib.render("m", b"def f(:\n") == stdlib.render("m", b"x = 1\ndef f(): pass\n") == ""


def test_documents_of_rows_are_named_by_file_and_line(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps({"text": "one"}) + "\n")
    assert list(sources.read(Data(source="jsonl", path=str(path)))) == [Document("one", f"{path}:1")]
