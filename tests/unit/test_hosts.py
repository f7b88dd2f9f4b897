"""The book of hosts: found by name and by origin, its owner's alone, and damaged in no silence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deltasync.client.address import is_exposed, resolved
from deltasync.client.hosts import Host, HostBook, token_in, token_of
from deltasync.core.errors import NotFound, UsageError

SECRETS = {"token": "canary-7e11", "client_key_pem": "canary-key"}


def host(name: str = "gpu", url: str = "https://gpu.example:8443", **members: str) -> Host:
    return Host(name=name, url=url, added_at="2026-11-22T00:00:00+00:00", **members)  # type: ignore[arg-type]


@pytest.fixture
def book(tmp_path: Path) -> HostBook:
    return HostBook.of_user({"DELTASYNC_HOME": str(tmp_path)})


def test_what_is_added_is_found_and_its_owners_alone(book: HostBook, tmp_path: Path) -> None:
    """A host is found by its name and by any address of its origin; folder and file are for its owner only."""
    book.add(host(**SECRETS))
    book.add(host("other", "http://127.0.0.1:8080"))
    assert [each.name for each in book.hosts()] == ["gpu", "other"]
    assert book.named("gpu") == host(**SECRETS)
    assert (tmp_path / "hosts").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "hosts/gpu.json").stat().st_mode & 0o777 == 0o600
    assert book.at("https://gpu.example:8443/prefix") == host(**SECRETS)
    for url in ("http://gpu.example:8443", "https://gpu.example", "https://gpu.example.evil:8443"):
        assert book.at(url) is None
    book.add(host("plain", "https://std.example"))
    found = book.at("https://std.example:443")
    assert found is not None and found.name == "plain"


def test_no_description_has_a_secret(book: HostBook) -> None:
    """What a traceback shows of a host or of its trust has neither token nor key."""
    shown = repr(host(**SECRETS)) + repr(host(**SECRETS).trust) + str(host(**SECRETS))
    assert "canary" not in shown


def test_a_name_and_an_origin_are_of_one_host(book: HostBook) -> None:
    """A second host of the same name or origin is refused: a remembered address has one trust and one token."""
    book.add(host())
    for second in (host(url="https://else.example"), host("second"), host("third", "https://gpu.example:8443/a")):
        with pytest.raises(UsageError, match=r"https://gpu\.example:8443 is known as gpu"):
            book.add(second)
    for name in ("", ".", "..", "a/b", "a b", "-x", "x" * 64, "a:1", "x.json"):
        with pytest.raises(UsageError, match="is no name for a host"):
            book.add(host(name, "https://else.example"))
        with pytest.raises(NotFound):
            book.remove(name)


def test_an_unknown_name_lists_the_known_ones(book: HostBook, tmp_path: Path) -> None:
    """A bare word that is no host names those that are; an address stands for itself."""
    home = {"DELTASYNC_HOME": str(tmp_path)}
    with pytest.raises(UsageError, match="none is known yet"):
        resolved("gpu", home)
    book.add(host())
    book.add(host("lab", "https://lab.example"))
    with pytest.raises(UsageError, match=r"cpu is no known host \(known are gpu, lab\)"):
        resolved("cpu", home)
    assert resolved("gpu", home) == "https://gpu.example:8443"
    for url in ("http://gpu", "file:///gpu", "host:1"):
        assert resolved(url, home) == url


def test_what_was_removed_is_gone(book: HostBook, tmp_path: Path) -> None:
    """A host that was removed is unknown, also one whose file is damaged."""
    book.add(host())
    (tmp_path / "hosts/gpu.json").write_bytes(b"\xff")
    book.remove("gpu")
    assert book.hosts() == [] and not list((tmp_path / "hosts").iterdir())
    with pytest.raises(NotFound):
        book.remove("gpu")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff",
        b"[]",
        b"{}",
        json.dumps({"name": "gpu", "url": "https://x", "added_at": "", "more": 1}).encode(),
        json.dumps({"name": "gpu", "url": "https://x", "added_at": "", "token": 5}).encode(),
        json.dumps({"name": "other", "url": "https://x", "added_at": ""}).encode(),
        json.dumps({"name": "gpu", "url": "https://x", "added_at": "", "state": "odd"}).encode(),
    ],
)
def test_a_damaged_file_is_one_sentence(book: HostBook, tmp_path: Path, content: bytes) -> None:
    """A file that is damaged is named with what to do; nothing is guessed from it."""
    book.add(host(**SECRETS))
    (tmp_path / "hosts/gpu.json").write_bytes(content)
    with pytest.raises(UsageError, match=r"gpu\.json .*`deltasync host rm gpu` and add it again") as caught:
        book.at("https://x")
    assert "\n" not in caught.value.sentence


def test_a_file_that_others_can_read_is_refused(book: HostBook, tmp_path: Path) -> None:
    """A token that others could read is no secret; a link in place of a file is none of ours."""
    book.add(host(**SECRETS))
    path = tmp_path / "hosts/gpu.json"
    for mode in (0o640, 0o604, 0o620):
        path.chmod(mode)
        with pytest.raises(UsageError, match="is not its owner's alone"):
            book.hosts()
    path.chmod(0o600)
    path.rename(tmp_path / "elsewhere.json")
    path.symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(UsageError, match="cannot be read"):
        book.hosts()


@pytest.mark.parametrize(
    ("token_for", "is_shown"),
    [
        ([], False),
        (["https://gpu.example:8443"], True),
        (["https://other.example", "HTTPS://GPU.example:8443/prefix/"], True),
        (["https://gpu.example"], False),
        (["http://gpu.example:8443"], False),
        (["https://gpu.example.evil:8443"], False),
        (["ssh://gpu.example:8443"], False),
    ],
)
def test_the_environments_token_is_for_the_origin_that_was_named(token_for: list[str], is_shown: bool) -> None:
    """Scheme, host and port are those of an address that was named beside it; otherwise it stays where it is."""
    environment, url = {"DELTASYNC_TOKEN": " abc\n"}, "https://gpu.example:8443"
    assert token_of(environment, url, token_for) == ("abc" if is_shown else None)
    assert token_of({}, url, token_for) is token_of({"DELTASYNC_TOKEN": " "}, url, token_for) is None


def test_a_token_is_one_visible_word() -> None:
    """A token has nothing that could become a second header; what is refused is not shown."""
    assert token_in(" abc.DEF-1\n", "file") == "abc.DEF-1"
    for wrong in ("", "canary two", "canary\r\nX: y", "canär", "x" * 4097):
        with pytest.raises(UsageError, match="holds no token") as caught:
            token_in(wrong, "file")
        assert "canary" not in caught.value.sentence


def test_what_crosses_a_network_in_the_clear() -> None:
    """Plain http is exposed but on loopback; https and folders are not."""
    for url in ("http://gpu", "http://10.0.0.1", "http://0.0.0.0:1", "http://[fd00::1]:1", "http://127.0.0.1.example"):
        assert is_exposed(url)
    for url in ("https://gpu", "http://127.0.0.1:1", "http://[::1]", "http://LOCALHOST", "file:///x"):
        assert not is_exposed(url)
