"""Characters <-> ids."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from charlm.errors import InputError
from charlm.vocabulary import END, END_CODE, UNKNOWN, Vocabulary, code_points


def vocabulary_of(text: str) -> Vocabulary:
    return Vocabulary.of(code_points(text))


@pytest.mark.parametrize(
    "text",
    ["To be, or not to be", "naïve café", "红楼梦", "👩🏽‍🚀 e\u0301", "\ufeffBOM\r\nCRLF\r\n", "\x00\x1b[31m", ""],
)
def test_decode_undoes_encode(text: str) -> None:
    vocabulary = vocabulary_of(text)
    assert vocabulary.decode(vocabulary.encode(text)) == text


def test_special_symbols_appear_by_their_names() -> None:
    vocabulary = Vocabulary([UNKNOWN, "a", END, "b"])
    assert vocabulary.decode(np.array([2, 1, 0, 0, 3, 2])) == f"{END}a{UNKNOWN}{UNKNOWN}b{END}"


def test_ids_follow_the_code_points_behind_unknown() -> None:
    assert vocabulary_of("cabbage").symbols == [UNKNOWN, "a", "b", "c", "e", "g"]


def test_a_character_not_in_the_vocabulary_is_unknown_and_named() -> None:
    vocabulary = vocabulary_of("abc")
    assert vocabulary.encode("axb").tolist() == [1, 0, 2]
    assert vocabulary.missing("zaxb") == ["x", "z"]


def test_end_has_a_place_of_its_own() -> None:
    codes = np.append(code_points("ab"), np.uint32(END_CODE))
    vocabulary = Vocabulary.of(codes)
    assert vocabulary.symbols == [UNKNOWN, "a", "b", END]
    assert vocabulary.encode_codes(codes).tolist() == [1, 2, 3]
    assert vocabulary.end_id == 3


@pytest.mark.parametrize(
    ("symbols", "dtype"), [(256, np.uint8), (257, np.int16), (2**15, np.int16), (2**15 + 1, np.int32)]
)
def test_ids_take_the_smallest_type_that_holds_them(symbols: int, dtype: type) -> None:
    characters = [chr(0x100 + i) for i in range(symbols - 1)]
    vocabulary = Vocabulary([UNKNOWN, *characters])
    assert vocabulary.dtype == dtype
    assert vocabulary.encode(characters[-1])[0] == symbols - 1


@pytest.mark.parametrize("symbols", [[], ["a"], [UNKNOWN, "a", "a"], [UNKNOWN, "ab"], [UNKNOWN, ""]])
def test_what_is_no_vocabulary_is_refused(symbols: list[str]) -> None:
    with pytest.raises(InputError):
        Vocabulary(symbols)


def test_a_lone_surrogate_is_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"lone surrogate U\+D800 at character 2"):
        code_points("ab\ud800")


@given(st.text("ab?é", min_size=100), st.lists(st.tuples(st.integers(0, 99), st.sampled_from("’?中😀")), max_size=5))
def test_rare_characters_among_bytes_are_told_apart(text: str, rare: list[tuple[int, str]]) -> None:
    characters = list(text)
    for place, character in rare:
        characters[place] = character
    vocabulary = vocabulary_of("ab?é’😀")
    ids = {symbol: i for i, symbol in enumerate(vocabulary.symbols)}
    assert vocabulary.encode("".join(characters)).tolist() == [ids.get(c, 0) for c in characters]


def test_a_lone_surrogate_among_bytes_is_named_by_its_place() -> None:
    with pytest.raises(InputError, match=r"lone surrogate U\+DC00 at character 150"):
        vocabulary_of("a?").encode("a?" * 75 + "\udc00" + "a" * 100)
