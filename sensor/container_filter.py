"""Which containers a request's ContainerFilter means. No I/O."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

from .container import HEX_DIGITS, is_hex_id
from .errors import RequestError
from .glob import glob_match, parse_glob, render

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from .container import Container, ContainerTable


class ContainerFilterFields(Protocol):
    """The API's ContainerFilter."""

    @property
    def ids(self) -> Sequence[str]: ...
    @property
    def names(self) -> Sequence[str]: ...
    @property
    def image_ids(self) -> Sequence[str]: ...
    @property
    def image_names(self) -> Sequence[str]: ...


_ID_CHARACTERS: Final = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_+-.")
_TEXT_LIMIT: Final = 4096


class ContainerMatcher:
    """Which containers a ContainerFilter means: any of its entries will do.

    ids          whole, or the beginning of a hexadecimal one. A beginning means *one* container: the one it
                 fits first. So that it can't come to mean another, later one, the matcher remembers it.
    names        with or without the leading '/', shell globs too (no engine allows their characters in one)
    image_ids    with or without 'sha256:', whole or the first 12 digits or more
    image_names  shell globs in which `*` also crosses '/'. Matched against every way to write the name: a
                 pattern without a tag takes any tag, Docker Hub's registry and 'library/' may be left out,
                 and 'sha256:...' is an image id
    """

    def __init__(
        self,
        ids: Iterable[str] = (),
        names: Iterable[str] = (),
        image_ids: Iterable[str] = (),
        image_names: Iterable[str] = (),
        *,
        field: str = "subscription.container_filter",
    ) -> None:
        """Raises RequestError for an entry that can match nothing."""
        self._ids: set[str] = set()
        self._prefixes: dict[str, str | None] = {}  # -> the container it came to mean
        self._image_ids: tuple[str, ...] = ()
        self._names: list[bytes] = []
        self._image_names: list[bytes] = []
        for position, text in enumerate(ids):
            self._add_id(text, f"{field}.ids[{position}]")
        for position, text in enumerate(names):
            _check_text(text, f"{field}.names[{position}]", "a container's name")
            self._names.append(_glob(text.removeprefix("/")))
        for position, text in enumerate(image_ids):
            self._image_ids += (_image_id_prefix(text, f"{field}.image_ids[{position}]"),)
        for position, text in enumerate(image_names):
            where = f"{field}.image_names[{position}]"
            _check_text(text, where, "an image's name or a pattern of it")
            if text.startswith("sha256:"):
                self._image_ids += (_image_id_prefix(text.rstrip("*"), where),)
            else:
                self._image_names.append(_glob(text))

    @classmethod
    def of(
        cls, container_filter: ContainerFilterFields | None, field: str = "subscription.container_filter"
    ) -> ContainerMatcher | None:
        """The matcher of a request's filter; None if there is none or it says nothing: every container."""
        if container_filter is None:
            return None
        f = container_filter
        if not (f.ids or f.names or f.image_ids or f.image_names):
            return None
        return cls(f.ids, f.names, f.image_ids, f.image_names, field=field)

    def bind(self, table: ContainerTable, field: str = "subscription.container_filter") -> None:
        """Let each beginning of an id mean what it means now; RequestError if it fits several containers."""
        for prefix in self._prefixes:
            fits = table.with_prefix(prefix)
            if len(fits) > 1:
                some = ", ".join(container.id[: len(prefix) + 4] for container in fits[:3])
                raise RequestError(
                    f"{field}.ids", f"{prefix!r} begins {len(fits)} container ids ({some}, ...)"
                )
            for container in fits:
                self._prefixes[prefix] = container.id

    def matches(self, container: Container) -> bool:
        """Ask again when the container's name or image changes: it may be that it matches only then."""
        return (
            container.id in self._ids
            or self._matches_prefix(container.id)
            or (bool(self._image_ids) and container.image_id.startswith(self._image_ids))
            or self._matches_name(container.name)
            or self._matches_image_name(container.image_name)
        )

    def definite(self) -> set[str] | None:
        """The ids of all containers that it means, now and later; None if others may come to be meant."""
        if self._names or self._image_ids or self._image_names or None in self._prefixes.values():
            return None
        whole = {text for text in self._ids if text.lower() not in self._prefixes}
        return whole.union(filter(None, self._prefixes.values()))

    def _add_id(self, text: str, where: str) -> None:
        if not text:
            raise RequestError(where, "is empty; give a container's id or the beginning of one")
        if len(text) > 1024 or not _ID_CHARACTERS.issuperset(text):
            raise RequestError(where, f"{text[:80]!r} is not a container's id")
        lower = text.lower()
        if len(text) == 64 and HEX_DIGITS.issuperset(lower):
            self._ids.add(lower)
            return
        self._ids.add(text)  # bare runc and LXC have names for ids
        if len(text) < 64 and HEX_DIGITS.issuperset(lower):
            self._prefixes[lower] = None

    def _matches_prefix(self, container_id: str) -> bool:
        if not self._prefixes or not is_hex_id(container_id):
            return False
        for prefix, meant in self._prefixes.items():
            if meant == container_id:
                return True
            if meant is None and container_id.startswith(prefix):
                self._prefixes[prefix] = container_id
                return True
        return False

    def _matches_name(self, name: str) -> bool:
        if not name or not self._names:
            return False
        text = _glob_text(name.removeprefix("/"))
        return any(glob_match(pattern, text) for pattern in self._names)

    def _matches_image_name(self, image_name: str) -> bool:
        if not image_name or not self._image_names:
            return False
        spellings = [_glob_text(spelling) for spelling in image_spellings(image_name)]
        return any(glob_match(pattern, text) for pattern in self._image_names for text in spellings)


def image_spellings(image_name: str) -> tuple[str, ...]:
    """Every way in which a user may write the image of a container, [REGISTRY/]PATH[:TAG][@DIGEST]."""
    rest, _, digest = image_name.partition("@")
    path, tag = rest, ""
    # A colon before the last '/' is a registry's port.
    if ":" in rest.rpartition("/")[2]:
        path, _, tag = rest.rpartition(":")
    paths = [path]
    for hub in ("docker.io/library/", "index.docker.io/library/", "docker.io/", "index.docker.io/"):
        if path.startswith(hub):
            paths.append(path.removeprefix(hub))
            break
    else:
        registry, slash, _ = path.partition("/")
        if not slash:
            paths.append(f"docker.io/library/{path}")
        elif "." not in registry and ":" not in registry and registry != "localhost":
            paths.append(f"docker.io/{path}")
    spellings = [image_name]
    for spelling in paths:
        spellings.append(spelling)
        if tag or not digest:
            spellings.append(f"{spelling}:{tag or 'latest'}")
        if digest:
            spellings.append(f"{spelling}@{digest}")
    return tuple(dict.fromkeys(spellings))


def _check_text(text: str, where: str, what: str) -> None:
    if not text or text == "/":
        raise RequestError(where, f"is empty; give {what}")
    if len(text) > _TEXT_LIMIT:
        raise RequestError(where, f"is longer than {_TEXT_LIMIT} characters")
    if "\0" in text:
        raise RequestError(where, "contains a NUL, which no name does")


def _image_id_prefix(text: str, where: str) -> str:
    digits = text.removeprefix("sha256:").lower()
    if not 12 <= len(digits) <= 64 or not HEX_DIGITS.issuperset(digits):
        raise RequestError(
            where, f"{text[:80]!r} is not an image id: 64 hexadecimal digits, or the first 12 or more"
        )
    return digits


def _glob(pattern: str) -> bytes:
    return render(parse_glob(pattern.encode("utf-8", "surrogatepass")))


def _glob_text(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass").replace(b"\0", b"?")
