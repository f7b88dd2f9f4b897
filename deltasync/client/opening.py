"""Where a workspace's state lies, whose it is, and whether it may be used here."""

from __future__ import annotations

import contextlib
import os
import secrets
import sqlite3
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote_to_bytes

from deltasync import db
from deltasync.client.address import normal_url
from deltasync.core.errors import AlreadyRunning, Corrupt, NotFound, RootUnavailable, UsageError, WorkspaceCopied
from deltasync.core.hashing import digest_of, directory_digest
from deltasync.core.manifest import EMPTY_ROOT, Kind, decode_directory
from deltasync.core.names import RESERVED, parse_workspace, shown
from deltasync.disk import Lock, require_confinement, space_guard, staged

DATABASE, LOCK, SUSPECT, REMOTE = "state.db", "lock", "suspect", "remote"
STORE_FOLDERS = ("cache", "workspaces")
"""What every data folder of a server holds beside its database, which is called as ours is."""
DATABASE_PATH_BYTES_MAX = 500
"""SQLite opens no file beyond about this, whatever the system allows."""
_FIRST_HEAD = ("INSERT INTO head VALUES (1, NULL, NULL, '', 0, ?, 0, ?, NULL, NULL)", (EMPTY_ROOT, EMPTY_ROOT))
_DAMAGED = ("SQLITE_CORRUPT", "SQLITE_NOTADB")


@dataclass(frozen=True, slots=True)
class Asked:
    """What the user said about the workspace to open."""

    state_dir: Path | None
    workspace: str | None
    take_over: bool
    read_only: bool


@dataclass(slots=True)
class Opened:
    """An open state: the real path of the workspace, the state's folder, the database, the lock, what to tell."""

    root: Path
    folder: Path
    connection: sqlite3.Connection
    lock: Lock | None
    notes: list[str] = field(default_factory=list)


def opened(root: Path, asked: Asked, migrations: Sequence[str]) -> Opened:
    """Open the state of the workspace at `root`, or make it."""
    require_confinement()
    real = usable_root(root)
    folder = asked.state_dir.absolute() if asked.state_dir else real / RESERVED
    if not asked.read_only:
        _refuse_store(real)
    if not (folder / DATABASE).is_file():
        _refuse_nested(real)
        _refuse_strangers(folder, asked.state_dir)
    if asked.read_only:
        if not (folder / DATABASE).is_file():
            raise NotFound(
                f"{shown(str(real))} is not a workspace yet; run `deltasync push` or `deltasync watch` on it"
            )
        return Opened(real, folder, db.connect(folder / DATABASE, migrations, read_only=True), None)
    known = _make_folder(folder)
    lock, before = _locked(folder, real)
    try:
        connection, notes = _database(folder, migrations, before)
        state = Opened(real, folder, connection, lock, notes)
        try:
            _begin(state, known=known)
            _recognise(state, asked)
        except BaseException as error:
            connection.close()
            if isinstance(error, sqlite3.DatabaseError):
                raise damaged(folder, error) from error
            raise
    except BaseException:
        lock.close()  # without a mark: the next opening checks the database
        raise
    return state


def damaged(folder: Path, error: sqlite3.DatabaseError) -> Exception:
    """Turn an error of the state's database into one of ours that says what to do next."""
    raised = db.damaged(folder / DATABASE, error)
    if not isinstance(raised, Corrupt):
        return raised
    return Corrupt(f"{raised.sentence}; run the command again: it is set aside and made anew from the workspace")


def usable_root(root: Path) -> Path:
    """Return the real path of a workspace's folder, or raise RootUnavailable when it cannot be listed."""
    name = shown(str(root))
    try:
        real = root.resolve(strict=True)
        os.scandir(real).close()
    except FileNotFoundError as error:
        raise RootUnavailable(f"there is no folder {name}; create it, or mount what belongs there") from error
    except NotADirectoryError as error:
        raise RootUnavailable(f"{name} is not a folder; a workspace is a folder") from error
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "its links form a loop"
        raise RootUnavailable(f"the folder {name} cannot be read ({reason}); nothing was changed") from error
    return real


def client_id() -> str:
    """Return the id of this machine and user; the first call makes it."""
    path = _client_id_path()
    try:
        for _ in range(3):
            with contextlib.suppress(FileNotFoundError):
                text = path.read_text(errors="replace").strip()
                if len(text) == 32 and text.isalnum():
                    return text
                path.unlink()
            _make_client_id(path)
    except OSError as error:
        raise UsageError(
            f"no client id can be kept in {shown(str(path))} ({error.strerror}); "
            "name another file with DELTASYNC_CLIENT_ID_FILE"
        ) from error
    raise Corrupt(f"{shown(str(path))} does not hold a client id; remove it and run the command again")


def _make_client_id(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    fresh = path.with_name(f"{path.name}.{secrets.token_hex(6)}")
    with staged(fresh) as out:
        out.write(secrets.token_hex(16).encode())
    try:
        os.link(fresh, path)  # a link, not a rename: of two first starts only one gives the id
    except FileExistsError:
        pass
    except OSError:
        fresh.rename(path)  # no links here
    fresh.unlink(missing_ok=True)


def _client_id_path() -> Path:
    if named := os.environ.get("DELTASYNC_CLIENT_ID_FILE"):
        return Path(named)
    return home_of_states() / "client-id"


def home_of_states() -> Path:
    """Return the folder of what is kept for this user beside the workspaces."""
    if home := os.environ.get("DELTASYNC_HOME"):
        return Path(home)
    import platformdirs

    return Path(platformdirs.user_state_dir("deltasync"))


def is_store(folder: Path) -> bool:
    """Tell whether a folder is the data folder of a server, as far as it can be looked at."""
    try:
        return (folder / DATABASE).is_file() and all((folder / name).is_dir() for name in STORE_FOLDERS)
    except OSError:
        return False


def _refuse_store(root: Path) -> None:
    """Refuse a workspace inside of a server's data folder: our state would lie in the server's tree (spec F-10)."""
    for parent in (root, *root.parents):
        if is_store(parent):
            raise UsageError(
                f"{shown(str(root))} belongs to the data folder {shown(str(parent))} of a deltasync-server, which "
                "alone may change what is in it; fetch the workspace into another folder and push that one"
            )


def _refuse_nested(root: Path) -> None:
    """Refuse a new workspace inside of one that carries its files; one that was there before it is left out of it."""
    if RESERVED in root.parts:
        raise UsageError(f"{shown(str(root))} lies inside a folder {RESERVED}, which is our own")
    for parent in root.parents:
        if has_history(parent / RESERVED):
            raise UsageError(
                f"{shown(str(root))} lies inside the workspace {shown(str(parent))}; use that one, or a folder outside "
                f"of it (or remove {shown(str(parent / RESERVED))}, if that was never meant to be a workspace)"
            )


def has_history(folder: Path) -> bool:
    """Tell whether something was ever sealed from a state that is kept in a folder; one that cannot be read counts."""
    try:
        is_there = (folder / DATABASE).is_file()
    except OSError:
        return False
    if not is_there or not (folder / DATABASE).stat().st_size:
        return False  # an empty one is all that was left of a first command that was killed
    row = _first_row(folder, "SELECT sealed_sequence FROM head")
    return row is None or bool(row[0])


def _refuse_strangers(folder: Path, state_dir: Path | None) -> None:
    """Refuse to keep a state among files of other kinds, where it would be carried, or removed, with them."""
    with contextlib.suppress(OSError):
        if state_dir is not None and not (folder / LOCK).exists() and any(folder.iterdir()):
            raise UsageError(f"{shown(str(folder))} holds other files; name an empty folder with --state-dir")


def refuse_inside(folder: Path, root: Path) -> None:
    """Refuse a folder for bundles that lies inside of a workspace, which would carry them: its own, or another one."""
    real = folder.resolve()
    for parent in (real, *real.parents):
        if parent == root or has_history(parent / RESERVED):
            raise UsageError(
                f"{shown(str(folder))} lies inside the workspace {shown(str(parent))}, which would carry the bundles "
                "as files; name a folder outside of it with --to"
            )


def _make_folder(folder: Path) -> bool:
    """Make the state's folder, for its owner only; tell whether a state was kept there before."""
    try:
        with space_guard(folder):
            folder.mkdir(mode=0o700, exist_ok=True, parents=True)
        if folder.is_symlink():
            raise UsageError(f"{shown(str(folder))} is a link; remove it, or name the real folder with --state-dir")
        folder.chmod(0o700)
    except OSError as error:
        raise UsageError(
            f"no state can be kept in {shown(str(folder))} ({error.strerror}); name another folder with --state-dir"
        ) from error
    return (folder / LOCK).exists()


def _locked(folder: Path, root: Path) -> tuple[Lock, str]:
    """Take the writer's lock, leave our name in it, and return what the last holder left."""
    path = folder / LOCK
    before = ""
    try:
        with contextlib.suppress(FileNotFoundError):
            before = path.read_text(errors="replace")[:200].strip()
        lock = Lock(path, "")
    except AlreadyRunning as error:
        raise AlreadyRunning(
            f"{shown(before) or 'another process'} is using the workspace {shown(str(root))}; "
            "wait until it ends, or stop it"
        ) from error
    except OSError as error:
        raise UsageError(
            f"the state in {shown(str(folder))} cannot be opened ({error.strerror}); it may belong to another user"
        ) from error
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:2]]).strip()
    try:
        with space_guard(folder):
            path.write_text(f"process {os.getpid()} ({command})", errors="replace")
    except BaseException:
        lock.close()
        raise
    return lock, before


def record_close(folder: Path) -> None:
    """Leave word in the lock file that the database was closed cleanly, and how it looked then."""
    with contextlib.suppress(OSError):
        (folder / LOCK).write_text(_closed_mark(folder))


def _closed_mark(folder: Path) -> str:
    status = (folder / DATABASE).stat()
    return f"closed {status.st_size} {status.st_mtime_ns}"


def _database(folder: Path, migrations: Sequence[str], before: str) -> tuple[sqlite3.Connection, list[str]]:
    """Open the database and say what to tell; one that is damaged is set aside and a fresh one begins."""
    path = folder / DATABASE
    if len(os.fsencode(path)) > DATABASE_PATH_BYTES_MAX:
        raise UsageError(
            f"the path {shown(str(folder))} is too long to keep the state in it; "
            "name a folder with a shorter path with --state-dir"
        )
    if path.is_symlink() or (path.exists() and not os.access(path, os.R_OK | os.W_OK)):
        raise UsageError(f"{shown(str(path))} is no file that this user may read and write")
    try:
        # A database that changed since its last clean close was cut off, restored or damaged: have SQLite check it.
        is_known = path.exists() and before == _closed_mark(folder)
        is_suspect = (folder / SUSPECT).exists()
        _make_private(path)
        connection = db.connect(path, migrations)
        if (is_known or db.is_sound(connection)) and (not is_suspect or _is_whole(connection)):
            (folder / SUSPECT).unlink(missing_ok=True)
            return connection, []
        connection.close()
    except Corrupt as error:
        if not str(getattr(error.__cause__, "sqlite_errorname", "")).startswith(_DAMAGED):
            raise
    aside = _set_aside(folder)
    return db.connect(path, migrations), [
        f"the state was damaged and is set aside as {aside}; everything is read again"
    ]


def _set_aside(folder: Path) -> str:
    """Rename a damaged database and what belongs to it; return its new name."""
    number = 1 + sum(1 for _ in folder.glob(f"{DATABASE}.damaged-*"))
    name = f"{DATABASE}.damaged-{number}"
    for suffix in ("-wal", "-shm", ""):
        with contextlib.suppress(FileNotFoundError):
            (folder / f"{DATABASE}{suffix}").rename(folder / f"{name}{suffix}")
    (folder / SUSPECT).unlink(missing_ok=True)
    return name


def _is_whole(connection: sqlite3.Connection) -> bool:
    """Tell whether every directory object is what its digest says, and none is missing; SQLite cannot know."""
    try:
        if not db.is_sound(connection):
            return False
        objects = connection.execute("SELECT digest, CAST(body AS BLOB) FROM objects")
        if not all(directory_digest(body) == digest for digest, body in objects):
            return False
        roots = connection.execute("SELECT digest FROM directories UNION SELECT sealed_root FROM head").fetchall()
        seen, todo = {EMPTY_ROOT}, [root for (root,) in roots]
        while todo:
            digest = todo.pop()
            if digest not in seen:
                seen.add(digest)
                (body,) = connection.execute("SELECT body FROM objects WHERE digest = ?", (digest,)).fetchone()
                todo.extend(entry.digest for entry in decode_directory(body) if entry.kind is Kind.DIRECTORY)
    except (sqlite3.Error, TypeError):  # the latter: a row that is not there, or a value of another kind
        return False
    return True


def _make_private(path: Path) -> None:
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))


def _begin(state: Opened, *, known: bool) -> None:
    """Write the first rows of a fresh database: a new history, and an empty tree."""
    connection = state.connection
    if connection.execute("SELECT 1 FROM head").fetchone() is not None:
        return
    if known and not state.notes:
        state.notes.append("the state of this workspace was lost; everything is read again")
    meta = {"client_id": client_id(), "state_id": secrets.token_hex(16), **_place(state.root)}
    with db.transaction(connection):
        connection.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", meta.items())
        connection.execute(*_FIRST_HEAD)
        connection.execute(
            "UPDATE head SET epoch = ?, workspace = ?, url = ?", (new_epoch(), *remembered(state.folder))
        )
        inode = signed(state.root.stat().st_ino)
        connection.execute(
            "INSERT OR IGNORE INTO directories VALUES (1, 0, '', ?, ?, NULL, 0, 0, x'', x'')", (inode, EMPTY_ROOT)
        )


def remember(folder: Path, workspace: str, url: str | None) -> None:
    """Keep a workspace's name and server beside the database, so that a lost database does not lose them."""
    with contextlib.suppress(OSError), staged(folder / REMOTE) as out:  # without it the user gives --to again
        out.write(f"{workspace}\n{url or ''}\n".encode())


def remembered(folder: Path) -> tuple[str | None, str | None]:
    """Return the workspace's name and server as they were before the database was lost, as far as they are known."""
    try:
        workspace, url = (folder / REMOTE).read_text().splitlines()
        return str(parse_workspace(workspace)), normal_url(url) if url else None
    except (OSError, ValueError, UsageError):
        return None, None


def new_epoch() -> str:
    """Return a fresh id of a client history."""
    return secrets.token_hex(16)


def signed(inode: int) -> int:
    """Return an inode number as SQLite and arrays keep it: 64 bits with a sign."""
    return inode - (1 << 64) if inode >= 1 << 63 else inode


def _place(root: Path) -> dict[str, str]:
    status = root.stat()
    return {"root": root.as_uri(), "root_inode": str(status.st_ino), "root_device": str(status.st_dev)}


def require_original(root: Path, folder: Path, connection: sqlite3.Connection) -> None:
    """Raise WorkspaceCopied when the workspace at `root` is a copy of one that is still there."""
    meta = dict(connection.execute("SELECT key, value FROM meta").fetchall())
    former = _stated_root(meta)
    if former == root or _is_same_file(former / RESERVED, folder):
        return  # one folder, perhaps reached by two paths
    if _has_inode(former, meta["root_inode"]) and _state_id(former / RESERVED) == meta["state_id"]:
        raise WorkspaceCopied(
            f"{shown(str(root))} is a copy of the workspace {shown(str(former))}; "
            f"give it a name of its own with --workspace NAME --to {shown(_url(connection) or 'URL')}, "
            "or let it replace the original with --take-over"
        )


def _stated_root(meta: Mapping[str, str]) -> Path:
    return Path(os.fsdecode(unquote_to_bytes(meta["root"].removeprefix("file://"))))


def _recognise(state: Opened, asked: Asked) -> None:
    """Compare where the state says it is with where it was found: at its place, moved, or copied."""
    meta = dict(state.connection.execute("SELECT key, value FROM meta").fetchall())
    here = _place(state.root)
    if meta["client_id"] != client_id():
        reason = "this state was written by another machine or user"
        _renew(state, {"client_id": client_id()}, reason, drop_pending=True)
    if meta["root"] == here["root"]:
        return
    former = _stated_root(meta)
    if asked.state_dir and _has_inode(former, meta["root_inode"]) and not former.samefile(state.root):
        raise UsageError(
            f"{shown(str(state.folder))} holds the state of {shown(str(former))}; "
            "give each workspace its own --state-dir"
        )
    if _is_same_file(former / RESERVED, state.folder):
        return  # one folder reached by two paths
    fresh_name = asked.workspace is not None and asked.workspace != _workspace(state.connection)
    is_copy = False
    try:
        require_original(state.root, state.folder, state.connection)
    except WorkspaceCopied:
        if not (fresh_name or asked.take_over):
            raise
        is_copy = True
        here["state_id"] = secrets.token_hex(16)
    told = "copied" if is_copy else "moved"
    _renew(state, here, f"this workspace was {told} from {shown(str(former))}", forget=is_copy and fresh_name)


def claim(folder: Path, receiver: str, workspace: str, *, take_over: bool = False) -> None:
    """Remember, for this machine and user, which folder is a workspace at a receiver; refuse a second one.

    folder: of the state, which is bound to both. The server tells clients apart, not folders: of two that bear one
    name, each would replace what the other sent (spec S-16).
    Raises WorkspaceCopied while the other's state stands where it was.
    """
    path = _client_id_path()
    name = digest_of(f"{receiver}\n{workspace}".encode()).hex()
    path = path.with_name(f"{path.name}.workspaces") / name
    mine = os.fsencode(folder)
    with contextlib.suppress(OSError):  # a machine that cannot keep this must not keep anybody from working
        before = path.read_bytes() if path.exists() else b""
        before = b"" if b"\0" in before else before  # a disk that lost what it was told to keep may hold zeros here
        other = Path(os.fsdecode(before))
        is_free = not before or before == mine or take_over or _is_same_file(other, folder)
        if not is_free and _bound_to(other) == (workspace, receiver):
            raise WorkspaceCopied(
                f"the workspace {shown(workspace)} on {shown(receiver)} is another folder, whose state is "
                f"{shown(str(other))}; give this one a name of its own with --workspace NAME, "
                "or let it replace the other with --take-over"
            )
        if before != mine:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with staged(path) as out:
                out.write(mine)


def _is_same_file(former: Path, folder: Path) -> bool:
    try:
        return (former / DATABASE).samefile(folder / DATABASE)
    except OSError:
        return False


def _has_inode(path: Path, inode: str) -> bool:
    try:
        return str(path.stat().st_ino) == inode
    except OSError:
        return False


def _state_id(folder: Path) -> str | None:
    row = _first_row(folder, "SELECT value FROM meta WHERE key = 'state_id'")
    return None if row is None else str(row[0])


def _bound_to(folder: Path) -> tuple[str | None, str | None] | None:
    """Return the workspace's name and the receiver that a state is bound to; None where no state is."""
    row = _first_row(folder, "SELECT workspace, url FROM head")
    return None if row is None else (row[0], row[1])


def _first_row(folder: Path, query: str) -> tuple[str | None, ...] | None:
    path = folder / DATABASE
    if not path.is_file():
        return None
    try:
        with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as other:
            row: tuple[str | None, ...] | None = other.execute(query).fetchone()
    except sqlite3.Error:
        return None
    return row


def _workspace(connection: sqlite3.Connection) -> str | None:
    name: str | None = connection.execute("SELECT workspace FROM head").fetchone()[0]
    return name


def _url(connection: sqlite3.Connection) -> str | None:
    url: str | None = connection.execute("SELECT url FROM head").fetchone()[0]
    return url


def _renew(
    state: Opened, meta: dict[str, str], reason: str, *, forget: bool = False, drop_pending: bool = False
) -> None:
    """Go on in a new epoch; forget: with nothing sealed, under another name.

    Bundles sealed before stay pending: the server takes them, has them, or sees in them that the histories parted.
    drop_pending: not so, because they would make the workspace another client's; what they carry is sealed again.
    """
    with db.transaction(state.connection) as connection:
        connection.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", meta.items())
        if forget:
            for table in ("outbox", "parts", "streams"):
                connection.execute(f"DELETE FROM {table}")
            connection.execute("DELETE FROM head")
            connection.execute(*_FIRST_HEAD)
        if drop_pending:
            connection.execute("DELETE FROM outbox WHERE state = 'pending'")
            # What is sealed next has their numbers: it must not be taken for a part, nor for what ends a stream.
            connection.execute("DELETE FROM parts")
            connection.execute("UPDATE streams SET sealed = NULL")
            connection.execute(
                "UPDATE head SET sealed_sequence = acknowledged_sequence, sealed_root = acknowledged_root"
            )
        connection.execute("UPDATE head SET epoch = ?", (new_epoch(),))
    told = "" if forget else "; nothing that the host has is sent again"
    state.notes.append(f"{reason}; a new history begins{told}")
