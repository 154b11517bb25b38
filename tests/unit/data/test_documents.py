"""Facts about texts: what the demo corpora hold, what one's own files give, and what is refused."""

import codecs
import json
import os
import re
import shutil
from pathlib import Path

import datasets
import pytest

from baklava.data.demo_assets import fetch_wheel
from baklava.data.demo_corpora import MIN_SERVICE_CHARACTERS, html_to_text
from baklava.data.documents import DEMO_CORPORA, Document, documents_digest, load_documents
from baklava.errors import UserError


@pytest.fixture(scope="module")
def corpus() -> dict[str, dict[str, str]]:
    return {name: {document.name: document.text for document in load_documents([name])} for name in DEMO_CORPORA}


def test_botocore_gives_long_services_sorted_by_name(corpus: dict[str, dict[str, str]]) -> None:
    found = corpus["botocore"]
    assert len(found) == 51
    assert list(found) == sorted(found, key=lambda name: name.split("/")[1])
    assert all(len(text) >= MIN_SERVICE_CHARACTERS for text in found.values())
    assert found["botocore/s3"].startswith("Amazon Simple Storage Service\n\n")
    assert "This operation aborts a multipart upload." in found["botocore/s3"]


def test_botocore_reads_the_latest_version_of_a_service(corpus: dict[str, dict[str, str]]) -> None:
    # CloudFront has a dozen dated versions in the wheel; tenants are only in the last ones
    assert "distribution tenant" in corpus["botocore"]["botocore/cloudfront"]


def test_ifcraft_gives_essays_per_folder_without_front_matter(corpus: dict[str, dict[str, str]]) -> None:
    found = corpus["ifcraft"]
    assert len(found) == 11
    assert not any("subagents" in name for name in found)
    assert all(text.startswith("# ") for text in found.values())
    assert not any(re.search(r"^cluster: ", text, re.MULTILINE) for text in found.values())
    assert len(found["ifcraft/narrative-structure"]) > 300_000


def test_factbook_gives_countries_as_lines_of_field_and_text(corpus: dict[str, dict[str, str]]) -> None:
    found = corpus["factbook"]
    assert len(found) == 256
    assert {"factbook/Chad", "factbook/World", "factbook/European Union"} <= found.keys()
    assert "\nArea, total: 1.284 million sq km\n" in found["factbook/Chad"]
    assert "\nCoastline: 0 km (landlocked)\n" in found["factbook/Chad"]


@pytest.mark.parametrize("name", ["botocore", "factbook"])
def test_no_markup_is_left(corpus: dict[str, dict[str, str]], name: str) -> None:
    markup = re.compile(
        r"</?(p|div|br|b|i|li|ul|ol|a|em|strong|code|note|span|fullname|important)\b[^>\n]*>|&nbsp;|&lt;"
    )
    assert [title for title, text in corpus[name].items() if markup.search(text)] == []


def test_the_corpora_are_the_same_every_time_and_everywhere(corpus: dict[str, dict[str, str]]) -> None:
    again = {name: documents_digest(load_documents([name])) for name in DEMO_CORPORA}
    assert {name: value[:12] for name, value in again.items()} == {
        "botocore": "288795c35e86",
        "ifcraft": "6e3caa044573",
        "factbook": "16983e2281c2",
    }


def test_a_corpus_is_parsed_once_and_again_when_its_parsed_copy_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    source = fetch_wheel("ifcraft")
    monkeypatch.setenv("BAKLAVA_CACHE", str(tmp_path))
    (tmp_path / "wheels").mkdir()
    shutil.copy(source, tmp_path / "wheels")
    first = documents_digest(load_documents(["ifcraft"]))
    assert capfd.readouterr().err == "reading the texts of ifcraft, once\n"
    assert documents_digest(load_documents(["ifcraft"])) == first
    assert capfd.readouterr().err == ""
    (cached,) = (tmp_path / "texts").iterdir()
    cached.write_bytes(cached.read_bytes()[:1000])
    assert documents_digest(load_documents(["ifcraft"])) == first
    assert "reading the texts" in capfd.readouterr().err


def test_html_becomes_paragraphs_lists_and_lines() -> None:
    html = "<p>One  <code>a</code>, two\n three.</p> <ul> <li> <p>x</p> </li> <li>y&nbsp;&amp; z</li> </ul>"
    html += "<p>End<br>line</p>"
    assert html_to_text(html) == "One a, two three.\n- x\n- y & z\n\nEnd\nline"


def test_own_files_and_folders_are_documents(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.md").write_text("# first")
    (tmp_path / "sub" / "c.jsonl").write_text(
        '{"text": "third\\u2028line"}\n\n{"text": "", "id": 2}\n{"text": "fourth"}\n'
    )
    (tmp_path / "ignored.bin").write_bytes(b"\xff\xfe")
    found = load_documents([str(tmp_path)])
    assert [document.text for document in found] == ["# first", "second", "third\u2028line", "fourth"]
    assert [document.name.removeprefix(f"{tmp_path}/") for document in found] == [
        "a.md",
        "b.txt",
        "sub/c.jsonl:1",
        "sub/c.jsonl:4",
    ]
    assert load_documents([str(tmp_path / "b.txt")]) == [Document(f"{tmp_path}/b.txt", "second")]


def test_names_are_read_in_the_order_given(tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("mine")
    found = load_documents([str(tmp_path / "own.txt"), "ifcraft"])
    assert found[0].text == "mine"
    assert found[1].name == "ifcraft/agent-design"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.jsonl", b'{"text": "ok"}\n{"text": ', r"bad\.jsonl:2 is not JSON"),
        ("none.jsonl", b'{"body": "ok"}\n', r"none\.jsonl:1 has no string in a field 'text'"),
        ("list.jsonl", b"[1]\n", r"list\.jsonl:1 has no string"),
        ("latin.txt", "café".encode("latin-1"), r"latin\.txt' is not UTF-8 \(byte 3\)"),
        ("empty.txt", b" \n", r"empty\.txt' is empty"),
        ("data.csv", b"a,b", r"ends in '\.csv'; it must be one of \.txt, \.md, \.jsonl"),
        ("data.jsonl.gz", b"\x1f\x8b", r"ends in '\.gz'; .*decompress it first"),
        ("binary.txt", b"MZ\0\0\1", r"binary\.txt' holds a NUL character \(at 2\)"),
        ("wide.txt", "abc".encode("utf-16-le"), r"wide\.txt' holds a NUL character \(at 1\).*save it as UTF-8"),
        ("odd.txt", codecs.BOM_UTF16_LE + b"a", r"odd\.txt' is not UTF-16-LE \(byte 2\)"),
        ("lfs.txt", b"version https://git-lfs.github.com/spec/v1\n", r"lfs\.txt' is a Git LFS pointer"),
        ("half.jsonl", b'{"text": "ab\\ud83d"}\n', r"half\.jsonl:1 has half a character, \\ud83d, at 2 of its text"),
        ("deep.jsonl", b"[" * 100_000, r"deep\.jsonl:1 is not JSON"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as refused:
        load_documents([str(tmp_path / name)])
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["nope", "./missing.txt", "a/b/c/d", "texts/missing.md", ""])
def test_an_unknown_name_lists_the_known_ones(name: str) -> None:
    with pytest.raises(UserError, match=r"known corpus \(botocore, ifcraft, factbook, wikitext, pg19\)"):
        load_documents([name])


@pytest.mark.parametrize("name", ["owner/set", "owner/set:test", "owner/set/config:test:body"])
def test_a_hub_that_cannot_be_reached_is_one_sentence(name: str) -> None:
    with pytest.raises(
        UserError, match=r"as a hub data set it could not be read .*botocore, ifcraft, factbook"
    ) as refused:
        load_documents([name])
    assert "\n" not in str(refused.value)


def test_no_name_and_a_repeated_name_are_refused() -> None:
    with pytest.raises(UserError, match="no text was named"):
        load_documents([])
    with pytest.raises(UserError, match="'ifcraft' is named twice"):
        load_documents(["ifcraft", "ifcraft"])


def test_the_digest_tells_documents_apart() -> None:
    base = [Document("a", "x"), Document("b", "y")]
    others = [
        [Document("a", "x")],
        [Document("b", "y"), Document("a", "x")],
        [Document("a", "xb"), Document("", "y")],
        [Document("a", "X"), Document("b", "y")],
        [Document("c", "x"), Document("b", "y")],
    ]
    assert documents_digest(base) == documents_digest(list(base))
    assert len({documents_digest(documents) for documents in [base, *others]}) == len(others) + 1


def parquet(path: Path, rows: list[dict[str, object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(rows).to_parquet(str(path))
    return path


def test_wikitext_is_articles_of_lines(tmp_path: Path) -> None:
    lines = ["", " = Robert Boulter = \n", "", " He is an actor . \n", " = 1 + 1 = \n", "", " = = Career = = \n"]
    lines += ["", " He acts . \n", "", " = 2 = 2 = \n", "", " A law . \n"]
    file = parquet(tmp_path / "test-00000-of-00001.parquet", [{"text": line} for line in lines])
    first, second = load_documents([f"wikitext={file}"])
    assert first.name == "wikitext/Robert Boulter"
    assert first.text == (
        " = Robert Boulter = \n\n He is an actor . \n = 1 + 1 = \n\n = = Career = = \n\n He acts . \n\n"
    )
    assert second == Document("wikitext/2 = 2", " = 2 = 2 = \n\n A law . \n")


def test_pg19_is_a_document_a_book(tmp_path: Path) -> None:
    book = {"short_book_title": "Emma by Jane Austen", "publication_date": 1816, "url": "http://x", "text": "Emma ..."}
    file = parquet(tmp_path / "test.parquet", [book])
    assert load_documents([f"pg19={file}"]) == [Document("pg19/Emma by Jane Austen", "Emma ...")]


@pytest.mark.parametrize("name", ["wikitext", "pg19"])
def test_a_published_corpus_says_how_to_go_on_without_the_hub(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"text '{name}' \(hf://.*could not be read .*as {name}=FILE, or use one of"):
        load_documents([name])
    with pytest.raises(UserError, match=r"data file 'no.parquet' does not exist"):
        load_documents([f"{name}=no.parquet"])
    with pytest.raises(UserError, match=r"has nothing in column .*'text' of a row with 'body'"):
        load_documents([f"{name}={parquet(tmp_path / 'a.parquet', [{'body': 'x'}])}"])


def test_a_data_set_is_read_by_configuration_split_and_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # a folder owner/name is read as the repository of that name would be
    card = "---\nconfigs:\n" + "".join(
        f"- config_name: {config}\n  data_files:\n  - split: test\n    path: {config}/test-*\n" for config in "ab"
    )
    for config in "ab":
        parquet(tmp_path / f"owner/name/{config}/test-00000-of-00001.parquet", [{"body": f"text of {config}"}])
    (tmp_path / "owner/name/README.md").write_text(card + "---\n")
    monkeypatch.chdir(tmp_path)
    assert load_documents(["owner/name/b:test:body"]) == [Document("owner/name/b:test:body:0", "text of b")]
    with pytest.raises(UserError, match=r"has nothing in column 'text' of a row with 'body'"):
        load_documents(["owner/name/b:test"])


def texts_of(path: Path) -> list[str]:
    return [document.text for document in load_documents([str(path)])]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_a_byte_order_mark_names_the_encoding_and_is_no_text(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffgrün\r\nblau".encode(encoding))
    (tmp_path / "b.jsonl").write_bytes('\ufeff{"text": "one"}\r\n{"text": "two"}'.encode(encoding))
    assert texts_of(tmp_path) == ["grün\nblau", "one", "two"]


def test_hidden_and_tool_files_are_left_out_and_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    kept = ["a.txt", "sub/b.md"]
    left_out = [".git/c.md", ".hidden.txt", "__MACOSX/._a.txt", "node_modules/x/README.md", "sub/._b.md"]
    left_out += ["sub/.ipynb_checkpoints/b-checkpoint.md", "own/lib/top.txt"]
    for name in (*kept, *left_out, "own/pyvenv.cfg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"text of {name}")
    assert texts_of(tmp_path) == [f"text of {name}" for name in kept]
    assert capfd.readouterr().err == (
        f"texts: {tmp_path}: hidden and tool files are left out: .git, .hidden.txt, __MACOSX and 4 more\n"
    )


def test_a_hidden_folder_that_is_named_is_read(tmp_path: Path) -> None:
    (tmp_path / ".texts").mkdir()
    (tmp_path / ".texts/a.txt").write_text("mine")
    assert texts_of(tmp_path / ".texts") == ["mine"]


def test_documents_with_the_same_content_count_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfone  \r\ntwo")
    rows = [{"text": "three"}, {"text": "one\r\ntwo"}, {"text": "three", "id": 2}, {"text": "four"}]
    (tmp_path / "sub/c.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    names = [str(tmp_path), str(tmp_path / "sub"), str(tmp_path / "b.txt")]
    assert [document.text for document in load_documents(names)] == ["one\ntwo\n", "three", "four"]
    assert "texts: 8 with the content of another text count once, such as" in capfd.readouterr().err


def test_rows_of_a_data_set_with_the_same_content_count_once(tmp_path: Path) -> None:
    books = [{"short_book_title": title, "text": text} for title, text in [("A", "x"), ("B", "x"), ("A", "y")]]
    found = load_documents([f"pg19={parquet(tmp_path / 'test.parquet', books)}"])
    assert found == [Document("pg19/A", "x"), Document("pg19/A#2", "y")]


def test_endings_are_read_in_any_case(tmp_path: Path) -> None:
    (tmp_path / "A.TXT").write_text("one")
    (tmp_path / "B.Md").write_text("two")
    (tmp_path / "C.JSONL").write_text('{"text": "three"}')
    assert texts_of(tmp_path) == ["one", "two", "three"]
    assert texts_of(tmp_path / "C.JSONL") == ["three"]


def test_a_folder_without_texts_says_what_is_read_and_what_it_has(tmp_path: Path) -> None:
    for name in ("a.py", "b.py", "c.csv", "Makefile"):
        (tmp_path / name).write_text("x")
    with pytest.raises(
        UserError, match=r"files that end in \.txt, \.md, \.jsonl \(it has 2 \.py, 1 .*, 1 .*\); rename"
    ):
        load_documents([str(tmp_path)])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="it has no files"):
        load_documents([str(tmp_path / "empty")])


def test_links_are_followed_once(tmp_path: Path) -> None:
    for name in ("texts", "elsewhere"):
        (tmp_path / name).mkdir()
    (tmp_path / "elsewhere/b.txt").write_text("two")
    (tmp_path / "texts/a.txt").write_text("one")
    (tmp_path / "texts/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "texts/again").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "texts")
    assert [document.name for document in load_documents([str(tmp_path / "texts")])] == [
        f"{tmp_path}/texts/a.txt",
        f"{tmp_path}/texts/again/b.txt",
    ]


def test_a_link_that_leads_nowhere_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "a.txt").symlink_to(tmp_path / "gone.txt")
    with pytest.raises(UserError, match=r"a\.txt' is a link to a file that is gone; remove the link"):
        load_documents([str(tmp_path)])


def test_a_pipe_is_refused_instead_of_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    for path in (tmp_path, tmp_path / "pipe.txt"):
        with pytest.raises(UserError, match=r"pipe\.txt' is no regular file"):
            load_documents([str(path)])


def test_empty_files_beside_texts_are_no_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "b.jsonl").write_text("\n \n")
    (tmp_path / "c.md").write_text("text")
    assert texts_of(tmp_path) == ["text"]


def test_a_folder_that_cannot_be_listed_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise PermissionError(13, "Permission denied", "locked")

    (tmp_path / "a.txt").write_text("text")
    monkeypatch.setattr(os, "scandir", fail)  # the tests may run as root, who may list everything
    with pytest.raises(UserError, match="text folder 'locked' cannot be read: Permission denied; make it readable"):
        load_documents([str(tmp_path)])


def test_a_file_name_that_is_no_unicode_can_be_saved(tmp_path: Path) -> None:
    (Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt"))).write_text("text")
    [document] = load_documents([str(tmp_path)])
    assert document.name == f"{tmp_path}/caf\\udce9.txt"
