"""ContainerFilter as a user expects it to work."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ringside.sensor.container import Container, ContainerTable
from ringside.sensor.container_filter import ContainerMatcher
from ringside.sensor.errors import RequestError

WEB = "254dd98a7bf1581560ddace9f98b7933bfb3c2f5fc0504ec1b8dcc9614bc7062"
JOB = "254dd98a7bf1581560ddace9f98b7933bfb3c2f5fc0504ec1b8dcc9614bc7063"
IMAGE = "d462265d362c919b7dd37f8ba80caa822d13704695f47c8fc42a1c2266ecd164"
web = Container(WEB, name="/ecstatic_darwin", image_id=IMAGE, image_name="nginx:1.27")
bare = Container("web-1", name="", runtime="runc")


@dataclass
class Filter:
    ids: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    image_ids: list[str] = field(default_factory=list)
    image_names: list[str] = field(default_factory=list)


def test_no_filter_and_an_empty_one_are_no_matcher() -> None:
    assert ContainerMatcher.of(None) is None
    assert ContainerMatcher.of(Filter()) is None
    matcher = ContainerMatcher.of(Filter(names=["ecstatic_darwin"]))
    assert matcher is not None
    assert matcher.matches(web)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (WEB, True),
        (WEB.upper(), True),
        (WEB[:12], True),
        (WEB[:1], True),
        (JOB, False),
        ("254e", False),
        ("web-1", False),
    ],
)
def test_ids(text: str, expected: bool) -> None:
    assert ContainerMatcher(ids=[text]).matches(web) is expected


def test_ids_that_are_names_match_whole() -> None:
    assert ContainerMatcher(ids=["web-1"]).matches(bare)
    assert not ContainerMatcher(ids=["web"]).matches(bare)
    assert not ContainerMatcher(ids=["abc"]).matches(Container("abcdef"))
    assert ContainerMatcher(ids=["abc"]).matches(Container("abc"))


def test_the_beginning_of_an_id_means_one_container() -> None:
    matcher = ContainerMatcher(ids=[WEB[:12]])
    assert matcher.matches(web)
    assert not matcher.matches(Container(JOB)), "a later one that happens to begin alike"
    assert matcher.matches(web)


def test_the_beginning_of_an_id_must_be_unique() -> None:
    table = ContainerTable()
    table.created(WEB, "docker", 1)
    matcher = ContainerMatcher(ids=["254d"])
    matcher.bind(table)
    table.created(JOB, "docker", 1)
    assert not matcher.matches(Container(JOB))
    assert matcher.matches(web)
    with pytest.raises(RequestError, match="begins 2 container ids") as raised:
        ContainerMatcher(ids=["254d"]).bind(table)
    assert raised.value.field == "subscription.container_filter.ids"
    ContainerMatcher(ids=[WEB, "ffff"]).bind(table)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/ecstatic_darwin", True),
        ("ecstatic_darwin", True),
        ("ecstatic_*", True),
        ("*darwin", True),
        ("ecstatic", False),
        ("Ecstatic_Darwin", False),
        ("*", True),
    ],
)
def test_names(text: str, expected: bool) -> None:
    assert ContainerMatcher(names=[text]).matches(web) is expected
    assert not ContainerMatcher(names=[text]).matches(bare), "it has no name"


def test_names_of_any_characters() -> None:
    for name in ("/a b", "/ünïcode", "/\udcff", "/x\n", "/[x]"):
        assert ContainerMatcher(names=["*"]).matches(Container(WEB, name=name))
    assert ContainerMatcher(names=["ünïcode"]).matches(Container(WEB, name="/ünïcode"))
    assert ContainerMatcher(names=["kube-system/*/POD"]).matches(
        Container(WEB, name="/kube-system/dns-1/POD")
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (IMAGE, True),
        ("sha256:" + IMAGE, True),
        (IMAGE[:12], True),
        ("sha256:" + IMAGE[:20], True),
        (WEB, False),
    ],
)
def test_image_ids(text: str, expected: bool) -> None:
    assert ContainerMatcher(image_ids=[text]).matches(web) is expected
    assert not ContainerMatcher(image_ids=[text]).matches(bare)


GCR = "gcr.io/google_containers/nginx-ingress-controller:0.9"
DIGEST = f"quay.io/app/db@sha256:{WEB}"


@pytest.mark.parametrize(
    ("pattern", "image_name", "expected"),
    [
        ("busybox", "busybox", True),
        ("busybox", "busybox:1.36", True),
        ("busybox", "busybox:latest", True),
        ("busybox", "docker.io/library/busybox:1.36", True),
        ("busybox", "index.docker.io/library/busybox", True),
        ("busybox:latest", "busybox", True),
        ("busybox:1.*", "busybox:1.36", True),
        ("busybox:1.*", "busybox:2.0", False),
        ("busybox:*", "busybox", True),
        ("docker.io/library/busybox", "busybox:1.36", True),
        ("docker.io/foo/bar", "foo/bar:2", True),
        ("foo/bar", "docker.io/foo/bar:2", True),
        ("foo/bar", "foo/bar", True),
        ("bar", "foo/bar", False),
        ("*/bar", "foo/bar:2", True),
        ("busybox", "quay.io/me/busybox", False),
        ("busybox", "busyboxes", False),
        ("busy*", "busybox:1.36", True),
        ("b?sybox", "busybox", True),
        ("[bc]usybox", "busybox", True),
        ("gcr.io/*", GCR, True),
        ("*nginx*", GCR, True),
        ("gcr.io/google_containers/nginx-ingress-controller", GCR, True),
        ("gcr.io/google_containers/nginx-ingress-controller:1.0", GCR, False),
        ("docker.io/gcr.io/*", GCR, False),
        ("localhost:5000/app", "localhost:5000/app:3", True),
        ("localhost:5000/app:3", "localhost:5000/app:3", True),
        ("localhost", "localhost:5000/app:3", False),
        ("localhost/app", "localhost/app:3", True),
        ("docker.io/localhost/app", "localhost/app:3", False),
        ("quay.io/app/db", DIGEST, True),
        (DIGEST, DIGEST, True),
        ("quay.io/app/db:latest", DIGEST, False),
        ("quay.io/app/db:1", f"quay.io/app/db:1@sha256:{WEB}", True),
        (f"quay.io/app/db:1@sha256:{WEB}", f"quay.io/app/db:1@sha256:{WEB}", True),
        ("*", "anything", True),
        ("nginx", "NGINX", False),
    ],
)
def test_image_names(pattern: str, image_name: str, expected: bool) -> None:
    container = Container(WEB, image_name=image_name)
    assert ContainerMatcher(image_names=[pattern]).matches(container) is expected


@pytest.mark.parametrize("pattern", ["sha256:" + IMAGE, "sha256:" + IMAGE[:16], f"sha256:{IMAGE[:16]}*"])
def test_an_image_name_may_be_an_image_id(pattern: str) -> None:
    assert ContainerMatcher(image_names=[pattern]).matches(web)


def test_any_entry_will_do() -> None:
    matcher = ContainerMatcher(ids=["ffff"], names=["no"], image_ids=["0" * 64], image_names=["no", "ngin?"])
    assert matcher.matches(web)
    assert not matcher.matches(bare)


def test_a_name_that_becomes_known_later() -> None:
    matcher = ContainerMatcher(image_names=["nginx"])
    assert not matcher.matches(Container(WEB))
    assert matcher.matches(web)


@pytest.mark.parametrize(
    ("entry", "path"),
    [
        (Filter(ids=["ok", ""]), "ids[1]"),
        (Filter(ids=["a/b"]), "ids[0]"),
        (Filter(ids=["x" * 1025]), "ids[0]"),
        (Filter(ids=["with space"]), "ids[0]"),
        (Filter(names=[""]), "names[0]"),
        (Filter(names=["/"]), "names[0]"),
        (Filter(names=["x" * 5000]), "names[0]"),
        (Filter(names=["a\0b"]), "names[0]"),
        (Filter(image_ids=[""]), "image_ids[0]"),
        (Filter(image_ids=["nginx"]), "image_ids[0]"),
        (Filter(image_ids=[IMAGE[:11]]), "image_ids[0]"),
        (Filter(image_ids=[IMAGE + "0"]), "image_ids[0]"),
        (Filter(image_names=[""]), "image_names[0]"),
        (Filter(image_names=["sha256:xyz"]), "image_names[0]"),
    ],
)
def test_entries_that_can_match_nothing(entry: Filter, path: str) -> None:
    with pytest.raises(RequestError) as raised:
        ContainerMatcher.of(entry)
    assert raised.value.field == f"subscription.container_filter.{path}"
    assert raised.value.problem


@given(st.text(min_size=1, max_size=60), st.text(min_size=1, max_size=60))
def test_any_pattern_and_any_name_get_an_answer(pattern: str, name: str) -> None:
    try:
        matcher = ContainerMatcher(names=[pattern], image_names=[pattern])
    except RequestError:
        return
    assert matcher.matches(Container(WEB, name=name, image_name=name)) in (True, False)


@given(st.text(alphabet="ab:.@", min_size=1, max_size=30))
def test_an_image_name_matches_itself_whatever_it_is(image_name: str) -> None:
    assert ContainerMatcher(image_names=[image_name]).matches(Container(WEB, image_name=image_name))
