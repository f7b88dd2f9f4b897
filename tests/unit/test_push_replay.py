"""Bundle files on their way to a host that no network reaches: listed, shown, verified, exported, replayed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import folders
import msgspec
import pytest
from desk import Desk, Meddler
from lossy import Fault, lossy
from serving import Served, serving

from deltasync.client import outbox, replay
from deltasync.client.transport import open_transport
from deltasync.core.errors import HostBusy, NotFound, Refused, SequenceConflict, SequenceFork, UsageError


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("served") / "data") as running:
        yield running


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path / tmp_path.name)


def sent(served: Served, folder: Path, **options: object) -> list[replay.Replayed]:
    transport = open_transport(served.url, timeout=20)
    try:
        return replay.replay(folder, transport, **options)  # type: ignore[arg-type]
    finally:
        transport.close()


def a_life(desk: Desk, **options: object) -> None:
    """Push four times: create, change everything, create more, delete some."""
    folders.life(desk.root)
    desk.push(**options)  # type: ignore[arg-type]
    folders.later(desk.root)
    desk.push(**options)  # type: ignore[arg-type]
    folders.write(desk.root, "more/x", desk.root.name)
    desk.push(**options)  # type: ignore[arg-type]
    (desk.root / "copy.bin").unlink()
    desk.push(**options)  # type: ignore[arg-type]


def assert_arrived(served: Served, desk: Desk, found: replay.Replayed) -> None:
    state = served.get(f"/api/v1/workspaces/{found.workspace}?tree_sequence={found.sequence}&wait=20").json
    assert (state["root"], state["sequence"]) == (found.root, found.sequence)
    folders.assert_same(desk.root, served.data / "workspaces" / found.workspace / "tree")


def test_the_outbox_of_an_offline_folder_replays(served: Served, desk: Desk) -> None:
    """What was sealed without a server is a chain that an empty one takes, and takes only once."""
    a_life(desk)
    outbox_folder = desk.root / ".deltasync/outbox"
    (found,) = sent(served, outbox_folder)
    assert (found.sequence, found.applied, found.skipped) == (4, 4, 0)
    assert_arrived(served, desk, found)
    (again,) = sent(served, outbox_folder)
    assert (again.applied, again.skipped, again.root) == (0, 4, found.root)


def test_a_bundle_that_was_sealed_again_carries_everything(served: Served, desk: Desk) -> None:
    """A file changes while a bundle is sealed without a server: the next attempt's bundle is as full as the first's."""
    folders.life(desk.root)

    def change(_: object) -> None:
        folders.write(desk.root, "readme.txt", "changed meanwhile")  # after others of the same bundle

    report = desk.push(before=change)
    assert report.problems == []
    (found,) = sent(served, desk.root / ".deltasync/outbox")
    assert_arrived(served, desk, found)


def test_a_folder_as_the_server_replays(served: Served, desk: Desk, tmp_path: Path) -> None:
    """`--to file://` writes a chain; carried over in two parts it leads to the same tree."""
    usb = tmp_path / "usb"
    usb.mkdir()
    desk.url = usb.as_uri()
    folders.life(desk.root)
    first = desk.push()
    assert (first.sequence, first.pending) == (1, 0)
    assert desk.push().bundles == 0
    sent(served, usb)
    for path in usb.iterdir():
        path.unlink()
    folders.later(desk.root)
    desk.push()
    assert len(list(usb.iterdir())) == 1
    (found,) = sent(served, usb)
    assert (found.applied, found.skipped) == (1, 0)
    assert_arrived(served, desk, found)


def test_a_folder_that_is_not_mounted_loses_nothing(desk: Desk, tmp_path: Path) -> None:
    """While the disk is away a watching push seals into the outbox, and writes it out in order later."""
    usb = tmp_path / "usb"
    desk.url = usb.as_uri()
    folders.life(desk.root)
    away = desk.push(seal_offline=True)
    assert (away.pending, len(desk.outbox())) == (1, 1)
    usb.mkdir()
    folders.later(desk.root)
    back = desk.push(seal_offline=True)
    assert (back.pending, back.sequence, len(list(usb.iterdir()))) == (0, 2, 2)


def test_a_folder_that_went_back_is_resynced_from_its_own_chain(served: Served, desk: Desk, tmp_path: Path) -> None:
    """When the last bundle is taken out of the folder, the next one of a new epoch follows those that are left."""
    usb = tmp_path / "usb"
    usb.mkdir()
    desk.url = usb.as_uri()
    folders.life(desk.root)
    desk.push()
    folders.write(desk.root, "new", desk.root.name)
    desk.push()
    sorted(usb.iterdir(), key=lambda path: path.name[-26:])[-1].unlink()
    report = desk.push()
    assert (report.sequence, report.operations.created) == (2, 1)
    (found,) = sent(served, usb)
    assert_arrived(served, desk, found)


def test_a_missing_bundle_is_named(served: Served, desk: Desk) -> None:
    """Replay stops at a gap with exit 5 and says which number is missing; what comes before is applied."""
    a_life(desk)
    desk.outbox()[2].unlink()
    with pytest.raises(SequenceConflict, match=r"bundle 3 of .* is missing") as caught:
        sent(served, desk.root / ".deltasync/outbox")
    assert (caught.value.exit_code, caught.value.facts["expected_sequence"]) == (5, 3)
    assert served.get(f"/api/v1/workspaces/{desk.root.name}").json["sequence"] == 2


def test_another_history_is_refused_by_name(served: Served, desk: Desk, tmp_path: Path) -> None:
    """A second epoch that does not continue the first is named, and nothing of it is applied."""
    folders.life(desk.root)
    desk.push()
    other = Desk(tmp_path / "other")
    folders.write(other.root, "x", b"x")
    other.push(workspace=desk.root.name)
    folders.write(other.root, "y", b"y")
    other.push()
    sent(served, desk.root / ".deltasync/outbox")
    stray = other.outbox()[0].name
    with pytest.raises(SequenceFork, match=stray):
        sent(served, other.root / ".deltasync/outbox")
    assert served.get(f"/api/v1/workspaces/{desk.root.name}").json["sequence"] == 1


def test_replay_survives_a_lost_answer(served: Served, desk: Desk) -> None:
    """A receipt that is lost is asked for again: the same bundle twice gives it."""
    a_life(desk)
    with lossy(served.port) as proxy:
        proxy.faults.append(Fault(b"/bundles", swallow=True, skip=1))
        transport = open_transport(proxy.url, timeout=20)
        (found,) = replay.replay(desk.root / ".deltasync/outbox", transport)
        transport.close()
    assert found.sequence == 4
    assert_arrived(served, desk, found)


def test_one_of_several_workspaces_can_be_chosen(served: Served, desk: Desk, tmp_path: Path) -> None:
    """A folder may hold several workspaces; each goes to its own, or one is named, or renamed when it is alone."""
    folders.write(desk.root, "x", b"x")
    desk.push()
    other = Desk(tmp_path / f"{tmp_path.name}-2")
    folders.write(other.root, "y", b"y")
    other.push()
    both = tmp_path / "both"
    both.mkdir()
    for path in (*desk.outbox(), *other.outbox()):
        shutil.copy2(path, both)
    assert {found.workspace for found in sent(served, both)} == {desk.root.name, other.root.name}
    with pytest.raises(UsageError, match="--workspace"):
        sent(served, both, workspace="third")
    (found,) = sent(served, desk.root / ".deltasync/outbox", workspace=f"{tmp_path.name}-3")
    assert_arrived(served, desk, found)
    with pytest.raises(UsageError):
        sent(served, desk.root / ".deltasync/outbox", workspace="..")


def test_a_folder_without_bundles_is_an_error(served: Served, tmp_path: Path) -> None:
    """Nothing to replay is said, not passed over."""
    with pytest.raises(NotFound):
        sent(served, tmp_path)
    with pytest.raises(UsageError):
        sent(served, tmp_path / "nowhere")


def test_a_damaged_bundle_is_named_when_replayed(served: Served, desk: Desk) -> None:
    """The file that is broken is in the error's sentence."""
    folders.life(desk.root)
    desk.push()
    (path,) = desk.outbox()
    path.write_bytes(b"no bundle")
    with pytest.raises(Refused, match=f"{path.name}: B-1: .*; the file is damaged or incomplete: copy it again"):
        sent(served, path.parent)


def test_a_bundle_whose_content_is_damaged_is_named_when_replayed(served: Served, desk: Desk) -> None:
    """What the server finds wrong with the bytes of a file is said of that file, and what to do."""
    folders.life(desk.root)
    desk.push()
    (path,) = desk.outbox()
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(Refused, match=f"{path.name}: B-4: .*; the file is damaged or incomplete: copy it again"):
        sent(served, path.parent)


def test_bundles_are_listed_shown_and_verified(desk: Desk) -> None:
    """`ls` shows pending and kept ones, `show` the manifest with its operations, `verify` what is broken."""
    a_life(desk)
    with desk.open() as state:
        listed = replay.bundle_list(state)
    assert [(each.sequence, each.state, Path(each.file or "").name) for each in listed] == [
        (number, "pending", path.name) for number, path in enumerate(desk.outbox(), 1)
    ]
    assert all(each.file_bytes for each in listed)
    shown = replay.bundle_show(desk.outbox()[0])
    assert (shown["version"], shown["sequence_number"], shown["identity"]) == ("2.0", 1, listed[0].identity)
    operations = shown["operations"]
    assert isinstance(operations, list)
    assert {"operation": "created", "kind": "directory", "path": "empty folder"} in operations
    msgspec.json.encode(shown)
    broken, renamed = desk.outbox()[1], desk.outbox()[2]
    broken.write_bytes(broken.read_bytes()[:-3])
    renamed = renamed.rename(renamed.with_name(renamed.name.replace("00000003", "00000005")))
    paths = [desk.outbox()[0], broken, renamed, desk.root / "nothing"]
    reasons = [each.reason for each in replay.bundle_verify(paths)]
    assert reasons[0] is None
    assert reasons[1] and reasons[1].endswith("truncated; the file is damaged or incomplete: copy it again")
    assert reasons[2] and "its name is not" in reasons[2]
    assert reasons[3] == "No such file or directory"


def test_a_full_export_of_an_unkept_workspace_is_one_chain_for_an_empty_server(
    served: Served, desk: Desk, tmp_path: Path
) -> None:
    """With the sent bundles gone, the whole tree is sealed anew from the empty one, and its root is the same."""
    with serving(tmp_path / "data") as first:
        desk.url = first.url
        a_life(desk)
        root = desk.push().root
    with desk.open() as state:
        epoch = outbox.head(state).epoch
        exported = replay.export(state, tmp_path / "usb/stick", full=True)
        assert outbox.head(state).epoch == epoch
    assert (exported.root, exported.left_out) == (root, {})
    assert [path.parent.name for path in exported.paths] == ["stick"]
    (found,) = sent(served, tmp_path / "usb/stick")
    assert (found.root, found.sequence) == (root, 1)
    assert_arrived(served, desk, found)


def test_a_full_export_uses_kept_bundles_that_are_whole(served: Served, desk: Desk, tmp_path: Path) -> None:
    """A complete kept chain is exported as it was sent, with its history; after a gap a new one is sealed."""
    with serving(tmp_path / "data") as first:
        desk.url = first.url
        a_life(desk, keep_sent_seconds=3600.0)
    names = [path.name for path in desk.outbox()]
    assert len(names) == 4
    with desk.open() as state:
        exported = replay.export(state, tmp_path / "usb", full=True)
    assert [path.name for path in exported.paths] == names
    (found,) = sent(served, tmp_path / "usb")
    assert (found.sequence, found.root) == (4, exported.root)
    assert_arrived(served, desk, found)
    desk.outbox()[1].unlink()
    with desk.open() as state:
        sealed = replay.export(state, tmp_path / "again", full=True)
    assert sealed.root == exported.root
    assert len(sealed.paths) == 1


def test_an_export_hands_out_what_is_pending(served: Served, desk: Desk, tmp_path: Path) -> None:
    """Pending bundles are copied and marked: taking one back later opens a new epoch."""
    a_life(desk)
    with desk.open() as state:
        exported = replay.export(state, tmp_path / "usb")
        assert all(row.left_machine for row in outbox.pending(state))
    assert [path.name for path in exported.paths] == [path.name for path in desk.outbox()]
    (found,) = sent(served, tmp_path / "usb")
    assert_arrived(served, desk, found)


def test_an_export_leaves_out_what_cannot_be_read(desk: Desk, tmp_path: Path) -> None:
    """A file that is gone since the last scan is observed again, or named when nobody can observe it."""
    folders.write(desk.root, "a", b"a")
    folders.write(desk.root, "d/b", b"b")
    with desk.open() as state:
        desk.observe(state)
        (desk.root / "d/b").unlink()
        exported = replay.export(state, tmp_path / "one", full=True)
        assert list(exported.left_out) == ["d/b"]
        again = replay.export(state, tmp_path / "two", full=True, rescan=lambda folders: desk.observe(state, folders))
        assert again.left_out == {}
        assert again.root == state.observed_root().hex()
    assert len(list((tmp_path / "one").iterdir())) == len(list((tmp_path / "two").iterdir())) == 1


def test_an_export_into_the_workspace_is_refused(desk: Desk) -> None:
    """Bundles must not become content of the folder that they describe."""
    folders.write(desk.root, "a", os.urandom(10))
    with desk.open() as state, pytest.raises(UsageError, match="outside"):
        replay.export(state, desk.root / "sub", full=True)


def test_an_export_to_where_nothing_can_be_written_is_a_usage_error(desk: Desk, tmp_path: Path) -> None:
    """A target that is no folder is said so."""
    folders.write(desk.root, "a", b"x")
    (tmp_path / "file").write_bytes(b"")
    with desk.open() as state, pytest.raises(UsageError, match="cannot be written"):
        replay.export(state, tmp_path / "file/below", full=True)


def test_an_export_writes_out_what_is_sealed_but_not_sent(served: Served, desk: Desk, tmp_path: Path) -> None:
    """A bundle that waits for the server without a file gets one, complete, and stays pending."""
    content = os.urandom(5000)
    folders.write(desk.root, "a", content)

    def stop() -> None:
        raise KeyboardInterrupt

    inner = open_transport(served.url)
    meddler = Meddler(inner)
    meddler.on_send.append(stop)
    with pytest.raises(KeyboardInterrupt):
        desk.push(transport=meddler)
    inner.close()
    with desk.open() as state:
        assert [row.file for row in outbox.pending(state)] == [None]
        exported = replay.export(state, tmp_path / "usb")
        (row,) = outbox.pending(state)
    assert row.file == exported.paths[0].name
    (found,) = sent(served, tmp_path / "usb")
    assert_arrived(served, desk, found)
    folders.write(desk.root, "b", b"after")
    desk.url = served.url
    assert desk.push().sequence == 2


def test_an_export_of_a_sealed_bundle_whose_content_is_gone_says_what_to_do(
    served: Served, desk: Desk, tmp_path: Path
) -> None:
    """What cannot be written out whole is not written out."""
    folders.write(desk.root, "a", os.urandom(5000))

    def stop() -> None:
        raise KeyboardInterrupt

    inner = open_transport(served.url)
    meddler = Meddler(inner)
    meddler.on_send.append(stop)
    with pytest.raises(KeyboardInterrupt):
        desk.push(transport=meddler)
    inner.close()
    (desk.root / "a").unlink()
    with desk.open() as state, pytest.raises(HostBusy, match="push or scan"):
        replay.export(state, tmp_path / "usb")
