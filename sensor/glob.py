"""Shell globs over bytes, read once by Python and matched alike by the kernel, by C and here.

A pattern is read into a tuple of sets: which bytes may stand at each place, None for a `*`.
From that it is written anew in the subset of the syntax that lib/glob.c of every kernel and
our C code understand the same way: `*`, `?`, `[...]` with single bytes and ranges, `\\`.

What a caller may write: `*`, `?`, `[a-z]`, `[!a-z]` or `[^a-z]`, `[[:digit:]]`, `\\` before any
of them. As for the kernel and unlike fnmatch(3), neither `/` nor a leading `.` is special, a
place is a byte and not a character, and a `[` that is never closed is itself.
"""

from __future__ import annotations

import string

Place = frozenset[int] | None
Glob = tuple[Place, ...]

ANY: frozenset[int] = frozenset(range(1, 256))
STAR: None = None

_CLASSES = {
    b"alnum": string.ascii_letters + string.digits,
    b"alpha": string.ascii_letters,
    b"blank": " \t",
    b"digit": string.digits,
    b"lower": string.ascii_lowercase,
    b"punct": string.punctuation,
    b"space": string.whitespace,
    b"upper": string.ascii_uppercase,
    b"xdigit": string.hexdigits,
}


def parse_glob(pattern: bytes) -> Glob:
    """The places of a pattern; every byte string is one. Adjacent stars become one."""
    places: list[Place] = []
    at = 0
    while at < len(pattern):
        byte = pattern[at : at + 1]
        at += 1
        if byte == b"*":
            if not places or places[-1] is not STAR:
                places.append(STAR)
        elif byte == b"?":
            places.append(ANY)
        elif byte == b"[" and (bracket := _bracket(pattern, at)) is not None:
            place, at = bracket
            places.append(place)
        elif byte == b"\\" and at < len(pattern):
            places.append(frozenset(pattern[at : at + 1]))
            at += 1
        else:
            places.append(frozenset(byte))
    return tuple(places)


def _bracket(pattern: bytes, at: int) -> tuple[frozenset[int], int] | None:
    """The set that begins behind a `[` and the index behind its `]`; None if it is never closed."""
    negated = pattern[at : at + 1] in (b"!", b"^")
    at += negated
    chosen: set[int] = set()
    first = at
    while at < len(pattern):
        if pattern[at] == 0x5D and at > first:  # ']' closes, but not as the first member
            return (ANY - chosen if negated else ANY & chosen), at + 1
        end = pattern.find(b":]", at + 2) if pattern.startswith(b"[:", at) else -1
        if end >= 0 and (members := _CLASSES.get(pattern[at + 2 : end])) is not None:
            chosen.update(members.encode())
            at = end + 2
            continue
        low, at = _member(pattern, at)
        high = low
        if pattern[at : at + 1] == b"-" and pattern[at + 1 : at + 2] not in (b"]", b""):
            high, at = _member(pattern, at + 1)
        chosen.update(range(low, high + 1))
    return None


def _member(pattern: bytes, at: int) -> tuple[int, int]:
    """One byte of a set, unescaped, and the index behind it."""
    if pattern[at] == 0x5C and at + 1 < len(pattern):
        at += 1
    return pattern[at], at + 1


def literal(glob: Glob) -> bytes | None:
    """The only text that the glob matches, or None if it matches several or none."""
    if any(place is STAR or len(place) != 1 for place in glob):
        return None
    return bytes(byte for place in glob if place is not STAR for byte in place)


def quote(text: bytes) -> Glob:
    """The glob that matches exactly this text."""
    return tuple(frozenset((byte,)) for byte in text)


def impossible(glob: Glob) -> bool:
    """True if nothing can match: a place accepts no byte (`[z-a]`, a NUL)."""
    return any(place is not STAR and not place & ANY for place in glob)


def render(glob: Glob) -> bytes:
    """The glob as a pattern that glob_match() and the kernel's own read the same way."""
    return b"".join(b"*" if place is STAR else render_place(place) for place in glob)


def render_place(place: frozenset[int]) -> bytes:
    """One place as a literal byte, `?` or a bracket without negation.

    Never negated: older lib/glob.c let `[!a]` match the NUL at the end of the text and read on
    behind it, and what a leading `^` means depends on the kernel.
    """
    if place == ANY:
        return b"?"
    if len(place) == 1:
        byte = bytes(place)
        return b"\\" + byte if byte in b"*?[]\\!^" else byte
    # As a single member or the end of a range, ']' stands first or it closes, '-' stands last or
    # it makes a range, and an empty range keeps '!' and '^' from the first place.
    ranges, single = _ranges(sorted(place))
    text = (b"]" if 0x5D in single else b"") + ranges
    marks = bytes(sorted(single & frozenset(b"!^")))
    tail = b"-" if 0x2D in single else b""
    return b"[" + (text or b"b-a") + marks + tail + b"]"


def _ranges(members: list[int]) -> tuple[bytes, set[int]]:
    """Sorted bytes as ranges where three or more follow each other, without those of `]-!^` that
    would begin or end one; these too.
    """
    awkward = frozenset(b"]-!^")
    text, single = b"", set()
    start = 0
    for at in range(1, len(members) + 1):
        if at < len(members) and members[at] == members[at - 1] + 1:
            continue
        run = members[start:at]
        start = at
        while run and run[0] in awkward:
            single.add(run.pop(0))
        while run and run[-1] in awkward:
            single.add(run.pop())
        text += bytes((run[0], 0x2D, run[-1])) if len(run) > 2 else bytes(run)
    return text, single


def glob_match(pattern: bytes, text: bytes) -> bool:
    """True if the whole text matches a pattern that render() wrote; `text` holds no NUL.

    rs_glob() in _perf.c does the same: keep them alike. There is no recursion: after a mismatch
    only the last star is tried again, one byte further, for an earlier one could do no better.
    """
    at = position = resume = 0
    star = -1
    while position < len(text):
        if pattern[at : at + 1] == b"*":
            at += 1
            star, resume = at, position
            continue
        matched, after = _match_place(pattern, at, text[position])
        if matched:
            at, position = after, position + 1
        elif star >= 0:
            resume += 1
            at, position = star, resume
        else:
            return False
    return not pattern[at:].strip(b"*")


def _match_place(pattern: bytes, at: int, byte: int) -> tuple[bool, int]:
    """Whether the place at `at` accepts the byte, and where the next place begins."""
    head, at = pattern[at : at + 1], at + 1
    if head == b"?":
        return True, at
    if head == b"[":
        return _match_bracket(pattern, at, byte)
    if head == b"\\" and at < len(pattern):
        head, at = pattern[at : at + 1], at + 1
    return head == bytes((byte,)), at


def _match_bracket(pattern: bytes, at: int, byte: int) -> tuple[bool, int]:
    """The same for a place that begins with `[`; one that is never closed is itself."""
    begin = at
    inverted = pattern[at : at + 1] == b"!"
    at += inverted
    first, inside = at, False
    while at < len(pattern) and (pattern[at] != 0x5D or at == first):
        low = high = pattern[at]
        if at + 2 < len(pattern) and pattern[at + 1] == 0x2D and pattern[at + 2] != 0x5D:
            high = pattern[at + 2]
            at += 2
        inside |= low <= byte <= high
        at += 1
    return (inside != inverted, at + 1) if at < len(pattern) else (byte == 0x5B, begin)
