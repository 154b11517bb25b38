import json
import random
import string
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from baklava.data.documents import Document
from baklava.data.windows import Splits, Window, cut_windows, make_splits, read_windows, write_windows
from baklava.errors import UserError


class Characters:
    """A tokenizer of one token a character, with a start token like Llama's or without."""

    def __init__(self, bos: int | None = None) -> None:
        self.bos_token_id = bos

    def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> dict[str, list[int]]:
        start = [self.bos_token_id] if add_special_tokens and self.bos_token_id is not None else []
        return {"input_ids": start + [ord(letter) for letter in text]}


def document(name: str, tokens: int) -> Document:
    return Document(name, "".join(random.Random(name).choices(string.ascii_letters, k=tokens)))


def test_windows_follow_each_other_and_start_as_the_tokenizer_starts_a_text() -> None:
    cut = cut_windows([document("a", 30)], Characters(bos=1), context=8, continuation=4, per_document=5)
    assert [window.name for window in cut] == ["a:0", "a:1"]
    assert [window.ids[0] for window in cut] == [1, 1]
    assert [token for window in cut for token in window.ids[1:]] == [ord(c) for c in document("a", 22).text]
    assert {(len(window.ids), window.continuation_length) for window in cut} == {(12, 4)}


def test_splits_share_no_document_and_depend_on_the_seed_alone() -> None:
    documents = [document(f"d{i}", 40) for i in range(20)]
    first = make_splits(documents, Characters(), context=8, continuation=4, seed=0)
    again = make_splits(list(reversed(documents)), Characters(), context=8, continuation=4, seed=0)
    other = make_splits(documents, Characters(), context=8, continuation=4, seed=1)
    parts = [{w.document for w in part} for part in (first.calibration, first.search, first.validation)]
    assert [len(part) for part in parts] == [3, 4, 4]
    assert not parts[0] & parts[1] | parts[0] & parts[2] | parts[1] & parts[2]
    assert first == again != other


def test_few_documents_are_cut_into_more_windows_without_sharing() -> None:
    documents = [document(f"d{i}", 200) for i in range(4)]
    cut = make_splits(documents, Characters(), context=8, continuation=4, seed=0)
    parts = [{w.document for w in part} for part in (cut.calibration, cut.search, cut.validation)]
    assert sum(map(len, parts)) == len(set().union(*parts))
    assert all(len(part) >= 3 for part in (cut.calibration, cut.search, cut.validation))


def test_short_documents_and_copies_neither_shrink_the_splits_nor_join_them() -> None:
    long = [document(f"d{i}", 200) for i in range(3)]
    short = [document(f"s{i}", 5) for i in range(60)]
    copies = [Document(f"copy{i}", long[0].text) for i in range(10)]
    alone, crowded = (
        make_splits(texts, Characters(), context=8, continuation=4, seed=0) for texts in (long, long + short + copies)
    )
    assert [len(part) for part in (crowded.calibration, crowded.search, crowded.validation)] == [3, 4, 4]
    used = [{w.document for w in part} for part in (crowded.calibration, crowded.search, crowded.validation)]
    assert [len(documents) for documents in used] == [1, 1, 1]
    assert len(set().union(*used)) == 3
    assert len(alone.search) == len(crowded.search)


def test_texts_too_short_or_too_few_are_one_sentence() -> None:
    with pytest.raises(UserError, match="has 11 tokens, but a window needs 8 of context \\+ 4 of continuation"):
        cut_windows([document("a", 11), document("b", 3)], Characters(), context=8, continuation=4)
    with pytest.raises(UserError, match="2 of 2 texts are long enough"):
        make_splits([document("a", 99), document("b", 99)], Characters(), context=8, continuation=4, seed=0)
    with pytest.raises(UserError, match="at least 1 token"):
        cut_windows([document("a", 99)], Characters(), context=0, continuation=4)


def test_a_window_file_is_read_and_checked(tmp_path: Path) -> None:
    file = tmp_path / "windows.json"
    good = {"context": 3, "continuation": 2, "windows": [{"name": "w", "ids": [1, 2, 3, 4, 5]}]}
    file.write_text(json.dumps(good))
    [window] = read_windows(file, vocabulary=10)
    assert (window.name, window.ids, window.context_length, window.continuation_length) == ("w", (1, 2, 3, 4, 5), 3, 2)
    bad: list[tuple[object, str]] = [
        ({**good, "windows": []}, "has no windows"),
        ({**good, "windows": [{"name": "w", "ids": [1, 2]}]}, "has 2 ids, not 5"),
        ({**good, "windows": [{"name": "w", "ids": [1, 2, 3, 4, 10]}]}, "outside 0 to 9"),
        ({**good, "windows": 2 * good["windows"]}, "two windows named 'w'"),  # type: ignore[operator]
        ({**good, "windows": [{"ids": [1]}]}, "cannot read windows"),
        ({"context": 3}, "cannot read windows"),
    ]
    for content, said in bad:
        file.write_text(json.dumps(content))
        with pytest.raises(UserError, match=said):
            read_windows(file, vocabulary=10)
    with pytest.raises(UserError, match="cannot read windows"):
        read_windows(SimpleNamespace(name="nothing").name, vocabulary=10)


def test_written_windows_are_read_again_with_their_documents(tmp_path: Path) -> None:
    cut = [Window(f"d:{number}", "d", (1, 2, 3, number), 3) for number in range(2)]
    write_windows(tmp_path / "windows.json", cut)
    assert read_windows(tmp_path / "windows.json", vocabulary=10) == cut


def parts_of(splits: Splits) -> list[list[Window]]:
    return [list(windows) for windows in (splits.calibration, splits.search, splits.validation)]


def shared_tokens(one: Window, other: Window) -> int:
    """The length of the longest run of tokens that two windows share, found the slow way."""
    runs = {one.ids[a:b] for a, b in combinations(range(len(one.ids) + 1), 2)}
    return max(
        (b - a for a, b in combinations(range(len(other.ids) + 1), 2) if other.ids[a:b] in runs),
        default=0,
    )


def with_other_line_ends(text: str) -> str:
    return "\ufeff" + "\r\n".join(f"{line} " for line in text.split("\n"))


@pytest.mark.parametrize(
    "copy",
    [
        str,
        with_other_line_ends,
        lambda text: text + document("more", 100).text,
        lambda text: document("before", 7).text + text,
        lambda text: document("before", 101).text + text,
    ],
    ids=["same", "line ends", "longer", "shifted", "after another"],
)
@pytest.mark.parametrize("seed", range(3))
def test_no_two_splits_share_a_window_by_content(copy: Callable[[str], str], seed: int) -> None:
    originals = [document(f"d{number}", 200) for number in range(5)]
    copies = [Document(f"c{number}", copy(original.text)) for number, original in enumerate(originals)]
    cut = make_splits([*originals, *copies], Characters(), context=24, continuation=8, seed=seed)
    parts = parts_of(cut)
    assert all(len(part) >= 2 for part in parts)
    for one, other in combinations(parts, 2):
        assert max(shared_tokens(a, b) for a in one for b in other) < 16


def test_texts_may_share_phrases() -> None:
    documents = [Document(f"d{n}", "The same start. " + document(f"d{n}", 100).text) for n in range(11)]
    cut = make_splits(documents, Characters(), context=80, continuation=20, seed=0)
    assert len({window.document for part in parts_of(cut) for window in part}) == 11


@pytest.mark.parametrize("texts", [30, 5, 3])
def test_a_licence_that_begins_every_text_costs_its_window_and_not_the_text(
    texts: int, capfd: pytest.CaptureFixture[str]
) -> None:
    licence = document("licence", 30).text
    documents = [Document(f"d{number}", licence + document(f"d{number}", 300).text) for number in range(texts)]
    parts = parts_of(make_splits(documents, Characters(), context=24, continuation=8, seed=0))
    assert [len(part) for part in parts] == [3, 4, 4]
    for one, other in combinations(parts, 2):
        assert max(shared_tokens(a, b) for a in one for b in other) < 16
    assert capfd.readouterr().err == ""


def test_documents_that_share_content_are_counted_out_in_words(capfd: pytest.CaptureFixture[str]) -> None:
    base = [document(f"d{number}", 200) for number in range(3)]
    copies = [Document(f"c{number}", f"{number}" + base[0].text) for number in range(2)]
    make_splits([*base, *copies], Characters(), context=24, continuation=8, seed=0)
    assert capfd.readouterr().err == "windows: 2 texts are left out, since they share content with others\n"
    with pytest.raises(UserError, match=r"2 of 4 texts are long enough .* and differ"):
        make_splits([base[0], base[1], *copies], Characters(), context=24, continuation=8, seed=0)


def test_splits_leave_out_what_was_seen_elsewhere() -> None:
    documents = [document(f"d{number}", 200) for number in range(12)]
    seen = [Window("test:0", "test", tuple(map(ord, documents[3].text[5:37])), 24)]
    found = {
        window.document
        for seed in range(5)
        for part in parts_of(make_splits(documents, Characters(), context=24, continuation=8, seed=seed, seen=seen))
        for window in part
    }
    assert found == {f"d{number}" for number in range(12)} - {"d3"}
