"""Characters <-> ids."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from charlm.errors import InputError

UNKNOWN = "<unk>"  # stands for every character that the training split lacks; it is never generated
FIRST_WRITTEN = 1  # the ids from here on, all but that of `<unk>`
END = "<eos>"  # ends a document
END_CODE = sys.maxunicode + 1  # where an array of code points needs a place for it

_FEW = 0.02  # of a text's characters: as many are looked up one by one in the time that all others take

CodePoints = npt.NDArray[np.unsignedinteger]  # uint8 where all are ASCII, else uint32
Ids = npt.NDArray[np.integer]


def code_points(text: str) -> CodePoints:
    """Return the Unicode code points of `text`, shape (len(text),).

    Raises:
        InputError: a lone surrogate, which is half of a character and belongs to no text.
    """
    if text.isascii():
        return np.frombuffer(text.encode("ascii"), dtype=np.uint8)  # a quarter of the memory to read
    try:
        return np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    except UnicodeEncodeError as error:
        raise InputError(
            f"the text has a lone surrogate U+{ord(text[error.start]):04X} at character {error.start}, which is not a "
            "character; decode the source with the encoding that it was written in"
        ) from None


def looked_up(table: Ids, codes: npt.NDArray[np.integer]) -> Ids:
    """Return `table[codes]`, of the table's type."""
    if table.dtype == codes.dtype == np.uint8:
        # From bytes to bytes there is a way that is five times as fast as numpy's.
        translation = bytes(table[:256]).ljust(256, b"\0")
        return np.frombuffer(bytearray(codes.data).translate(translation), dtype=np.uint8)
    found: Ids = table[codes]
    return found


def looked_up_characters(table: Ids, text: str) -> Ids:
    """Return what `table` has for the code point of each character, shape (len(text),).

    Raises:
        InputError: a lone surrogate, as `code_points`.
    """
    if table.dtype == np.uint8:
        # A byte for each character. "?" stands for one beyond Latin-1, too: where those are few, they are looked up one
        # by one, and all others at the speed of bytes.
        narrow = np.frombuffer(text.encode("latin-1", "replace"), dtype=np.uint8)
        places = np.flatnonzero(narrow == ord("?"))
        if len(places) < _FEW * len(text):
            ids = looked_up(table, narrow)
            rare = np.array([ord(text[i]) for i in places], dtype=np.uint32)
            ids[places] = table[rare]
            if not (rare >> 11 == 0xD800 >> 11).any():
                return ids
    return looked_up(table, code_points(text))


class Vocabulary:
    """The symbols of a model in the order of their ids.

    A symbol is one character, or one of the special symbols `<unk>` (always id 0) and `<eos>`. A list of strings is the
    whole of it, so that it can travel in a checkpoint.

    Raises:
        InputError: a symbol that is neither, a symbol given twice, or no `<unk>` in first place.
    """

    unknown_id = 0

    def __init__(self, symbols: Sequence[str]) -> None:
        self.symbols = list(symbols)
        if self.symbols[:1] != [UNKNOWN] or len(set(self.symbols)) != len(self.symbols):
            raise InputError(f"a vocabulary begins with {UNKNOWN} and names each symbol once")
        self.end_id = self.symbols.index(END) if END in self.symbols else None
        # The smallest type that torch can index with: it has kernels for uint8, int16 and int32, for uint16 only some.
        size = len(self.symbols)
        self.dtype = np.dtype(np.uint8 if size <= 2**8 else np.int16 if size <= 2**15 else np.int32)
        self._ids = np.zeros(END_CODE + 1, dtype=self.dtype)  # by code point; `<unk>` where there is none
        for i, symbol in enumerate(self.symbols[1:], start=1):
            if symbol != END and len(symbol) != 1:
                raise InputError(f"{symbol!r} is neither one character nor {UNKNOWN} or {END}")
            self._ids[END_CODE if symbol == END else ord(symbol)] = i
        # By id, what text is made of: UTF-32 of a character, and whether it is none.
        self._utf32 = np.array([ord(symbol[0]) for symbol in self.symbols], dtype="<u4")
        self._is_special = np.array([len(symbol) > 1 for symbol in self.symbols])

    @classmethod
    def of(cls, codes: npt.NDArray[np.integer]) -> Vocabulary:
        """Return the vocabulary of all that occurs in `codes`, in the order of the code points, `<eos>` at the end."""
        return cls([UNKNOWN, *(END if code == END_CODE else chr(code) for code in np.unique(codes))])

    def __len__(self) -> int:
        return len(self.symbols)

    def encode_codes(self, codes: npt.NDArray[np.integer]) -> Ids:
        """Return the ids of code points, same shape; what is not in the vocabulary becomes `<unk>`."""
        return looked_up(self._ids, codes)

    def encode(self, text: str) -> Ids:
        """Return the ids of `text`, shape (len(text),); a character not in the vocabulary becomes `<unk>`."""
        return looked_up_characters(self._ids, text)

    def missing(self, text: str) -> list[str]:
        """Return the characters of `text` that are not in the vocabulary, each once, in order."""
        return sorted({text[i] for i in np.flatnonzero(self.encode(text) == self.unknown_id)})

    def decode(self, ids: npt.NDArray[np.integer]) -> str:
        """Return the text of `ids`, shape (T,); special symbols appear by their names."""
        pieces, begin = [], 0
        for place in np.flatnonzero(self._is_special[ids]).tolist():
            pieces += [self._characters(ids[begin:place]), self.symbols[ids[place]]]
            begin = place + 1
        return "".join([*pieces, self._characters(ids[begin:])])

    def _characters(self, ids: npt.NDArray[np.integer]) -> str:
        text: str = self._utf32[ids].tobytes().decode("utf-32-le", "surrogatepass")
        return text
