"""The tokens of captions: byte pairs, trained on a run's own captions or OpenAI's."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FILE = "tokenizer.json"
START, END = "<|startoftext|>", "<|endoftext|>"
#: OpenAI's pieces of a text, before each is taken apart into byte pairs.
_PIECES = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_CLIP_FILE = "bpe_simple_vocab_16e6.txt.gz"
_CLIP_SIZE = 49408


class Vocabulary:
    """Texts to token ids and back, in the format of Hugging Face's `tokenizers`.

    The last two ids begin and end a text, so that the end's is the highest.

    Args:
        stored: What `as_json` gave.

    Raises:
        ValueError: It is none, or has no tokens that begin and end a text.
    """

    def __init__(self, stored: str) -> None:
        self._tokenizer = _package().Tokenizer.from_str(stored)
        self._tokenizer.encode_special_tokens = True  # a caption that spells one out is text like any other
        self._stored = stored
        self.size = self._tokenizer.get_vocab_size()
        start, end = (self._tokenizer.token_to_id(token) for token in (START, END))
        if (start, end) != (self.size - 2, self.size - 1):
            raise ValueError(f"a vocabulary of {self.size} tokens must end with {START} and {END}")
        self.start, self.end = int(start), int(end)

    def encode(self, texts: Sequence[str], context: int) -> np.ndarray:
        """(n, context) int64: start, the text's tokens as far as there is room, end, zeros."""
        found = np.zeros((len(texts), context), dtype=np.int64)
        for row, each in zip(found, self._tokenizer.encode_batch(list(texts), add_special_tokens=False), strict=True):
            ids = [self.start, *each.ids[: context - 2], self.end]
            row[: len(ids)] = ids
        return found

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids, without what begins, ends and fills."""
        kept = []
        for token in ids:
            if token == self.end:
                break
            if token != self.start:
                kept.append(token)
        return str(self._tokenizer.decode(kept)).strip()

    def as_json(self) -> str:
        """All of it, as a `tokenizer.json`."""
        return self._stored

    @property
    def checksum(self) -> str:
        """SHA-256 of `as_json`."""
        return hashlib.sha256(self._stored.encode()).hexdigest()


def trained(texts: Iterable[str], size: int) -> Vocabulary:
    """Byte pairs (Sennrich et al. 2016) of lower-case texts, at most `size` tokens with start and end; the same texts
    give the same vocabulary. Every byte is a token, so that any text can be written."""
    package = _package()
    tokenizer = package.Tokenizer(package.models.BPE())
    tokenizer.normalizer = package.normalizers.Sequence(
        [package.normalizers.NFC(), package.normalizers.Lowercase(), package.normalizers.Strip()]
    )
    tokenizer.pre_tokenizer = package.pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = package.decoders.ByteLevel()
    alphabet = package.pre_tokenizers.ByteLevel.alphabet()
    trainer = package.trainers.BpeTrainer(
        vocab_size=size - 2, min_frequency=2, initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _with_ends(tokenizer)


def clip_vocabulary() -> Vocabulary:
    """OpenAI's, as the package open_clip_torch brings it.

    Raises:
        ValueError: The package is not there, or its file is another.
    """
    found = find_spec("open_clip")
    place = None if found is None or found.origin is None else Path(found.origin).with_name(_CLIP_FILE)
    if place is None or not place.is_file():
        raise ValueError(
            "method.tower.vocabulary is clip, which comes with the package open_clip_torch, and that is not installed: "
            "pip install open_clip_torch, or set method.tower.vocabulary=trained"
        )
    package = _package()
    lines = gzip.decompress(place.read_bytes()).decode("utf-8").split("\n")
    merges = [tuple(line.split()) for line in lines[1 : _CLIP_SIZE - 256 - 2 + 1 - 256]]
    letters = list(_bytes_to_letters().values())
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges)]
    vocab = {token: number for number, token in enumerate(tokens)}
    tokenizer = package.Tokenizer(package.models.BPE(vocab, merges, end_of_word_suffix="</w>"))
    blanks = package.normalizers.Replace(package.Regex(r"\s+"), " ")
    tokenizer.normalizer = package.normalizers.Sequence(
        [package.normalizers.NFC(), blanks, package.normalizers.Lowercase()]
    )
    pieces = package.pre_tokenizers.Split(package.Regex(_PIECES), behavior="removed", invert=True)
    as_bytes = package.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = package.pre_tokenizers.Sequence([pieces, as_bytes])
    tokenizer.decoder = package.decoders.Sequence([package.decoders.Replace("</w>", " "), package.decoders.ByteLevel()])
    made = _with_ends(tokenizer)
    if made.size != _CLIP_SIZE:
        raise ValueError(f"{place} gives {made.size} tokens and not {_CLIP_SIZE}: it is another file than OpenAI's")
    return made


def check_package() -> None:
    """Raise ValueError unless the package that texts are taken apart with is there; imports nothing."""
    if find_spec("tokenizers") is None:
        raise ValueError(
            "learning from captions needs the package tokenizers: pip install '.[text]' in this checkout, or "
            "pip install tokenizers"
        )


def _package() -> Any:
    check_package()
    import tokenizers

    return tokenizers


def _with_ends(tokenizer: Tokenizer) -> Vocabulary:
    special = _package().AddedToken
    tokenizer.add_special_tokens([special(token, special=True, normalized=False) for token in (START, END)])
    return Vocabulary(json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False))


def _bytes_to_letters() -> dict[int, str]:
    """A printable letter for each byte, in the order of OpenAI's (GPT-2's) table."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + place) for place, byte in enumerate(others)}
