"""The part of a tar that holds the numbered images of one key, taken apart into the frames of a stack."""

from __future__ import annotations

import io
import re

from data_pipelines.shards.scan import IMAGE_SUFFIXES, MEMBER_NAME
from data_pipelines.shards.tar import Member, TarDamageError, walk

_MAGIC = slice(257, 262)  # of a header, where every tar of these decades says what it is
_FRAME = re.compile(r"([0-9]{1,9})\.([A-Za-z]+)")


def frames_in(content: bytes, key: str) -> tuple[bytes, ...]:
    """The images KEY.NUMBER.SUFFIX in a part of a tar, in the order of their numbers; none where it is no such part.

    Of several of one number the first counts; what else lies between them is passed over.
    """
    if content[_MAGIC] != b"ustar":
        return ()
    found: dict[int, Member] = {}
    try:
        for item in walk(io.BytesIO(content), len(content)):
            match = MEMBER_NAME.match(item.name) if isinstance(item, Member) else None
            frame = _FRAME.fullmatch(match[2]) if match is not None and match[1] == key else None
            if frame is not None and frame[2].lower() in IMAGE_SUFFIXES:
                found.setdefault(int(frame[1]), item)  # type: ignore[arg-type]
    except TarDamageError:  # a file that only begins like a tar: whoever decodes it says what it is
        return ()
    places = [found[number] for number in sorted(found)]
    return tuple(content[place.offset : place.offset + place.size] for place in places) if len(places) > 1 else ()
