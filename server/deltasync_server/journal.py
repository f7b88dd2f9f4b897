"""The journal: received bundles on disk until what they carry is durable; torn blobs are rebuilt from it."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import secrets
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from deltasync.core.bundle import BundleReader, Source
from deltasync.core.errors import Corrupt, DeltasyncError, NoSpace, Refused
from deltasync.core.wire import Limits
from deltasync.disk import Folder, fsync_folder, make_private, open_regular, start_writeback, write_all
from deltasync_server.blobs import Cache
from deltasync_server.state import (
    ReceiptRow,
    State,
    batched,
    blob_rows,
    journalled,
    lacking_of,
    split_digests,
    write_blobs,
)
from deltasync_server.tenants import folder_of

SPACE_CHECK_BYTES = 32 * 2**20
_BATCH = 512
_UNREADABLE = frozenset({errno.EBADMSG, errno.EINVAL, errno.EIO, errno.ELOOP, errno.ENOENT, errno.EUCLEAN})
"""What says that a file cannot be read, and not that there is no room or no descriptor."""
_log = logging.getLogger(__name__)

ShouldStop = Callable[[], bool]


class Spool:
    """A bundle's bytes as they arrive: written to the journal and passed on to the strict reader in one go."""

    def __init__(self, folder: Folder, source: Source, require_space: Callable[[], None]) -> None:
        self._folder = folder
        self._source = source
        self._require_space = require_space
        self._unchecked_bytes = 0
        self.size_bytes = 0
        self._is_keeping = True
        self.name = f"{secrets.token_hex(8)}.spool"
        self.is_kept = False
        """Set just before the commit that names this file: from then on only that commit's failure removes it."""
        self.has_failed_source = False
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self._descriptor = os.open(self.name, flags, 0o600, dir_fd=folder.fd)

    def read(self, size: int, /) -> bytes:
        """Pass bytes of the source on, once they are in the journal file while it is kept."""
        chunk = self._take(size)
        self._unchecked_bytes += len(chunk)
        if self._is_keeping:
            write_all(self._descriptor, chunk)
            self.size_bytes += len(chunk)
        if self._unchecked_bytes >= SPACE_CHECK_BYTES:
            self._unchecked_bytes = 0
            self._require_space()
            if self._is_keeping:
                start_writeback(self._descriptor)  # so that the fsync at the end finds little left to do
        return chunk

    def _take(self, size: int) -> bytes:
        try:
            return self._source.read(size)
        except BaseException:
            self.has_failed_source = True
            raise

    def make_durable(self) -> None:
        """Make the file and its name durable (spec ST-11)."""
        os.fsync(self._descriptor)
        self._folder.fsync()

    def stop_keeping(self) -> None:
        """Pass bytes on without writing them from now on: what the bundle brings is made durable by itself."""
        self._is_keeping = False
        self.size_bytes = 0
        os.ftruncate(self._descriptor, 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)
        if not (self.is_kept and self._is_keeping):
            os.unlink(self.name, dir_fd=self._folder.fd)


@dataclass(slots=True, eq=False)
class Assembled:
    """A bundle that lies whole in a file of the store's, open at its beginning."""

    folder: Folder
    name: str
    descriptor: int
    size_bytes: int
    has_failed: bool = False
    """The disk did not take it: the file is not used again."""

    def read(self, size: int, /) -> bytes:
        """Return the next bytes."""
        return os.read(self.descriptor, size)

    def make_durable(self) -> None:
        """Make the bytes durable; an fsync that fails is believed."""
        try:
            os.fsync(self.descriptor)
        except OSError:
            self.has_failed = True
            raise


class Adopted:
    """An assembled bundle on its way in: its file becomes the journal file, without another copy."""

    def __init__(self, folder: Folder, whole: Assembled) -> None:
        self._folder = folder
        self._whole = whole
        self._is_moved = False
        self.size_bytes = self.lying_bytes = whole.size_bytes
        self.name = f"{secrets.token_hex(8)}.spool"
        self.is_kept = False
        """Set just before the commit that names this file, as in `Spool`."""
        self.has_failed_source = False

    def read(self, size: int, /) -> bytes:
        """Pass bytes of the file on."""
        return self._whole.read(size)

    def make_durable(self) -> None:
        """Make the file durable and move it into the journal (spec ST-11)."""
        self._whole.make_durable()
        os.rename(self._whole.name, self.name, src_dir_fd=self._whole.folder.fd, dst_dir_fd=self._folder.fd)
        self._is_moved = True
        self._folder.fsync()

    def stop_keeping(self) -> None:
        """Leave the file where it is: what the bundle brings is made durable by itself."""
        self.size_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_moved and not self.is_kept:
            os.rename(self.name, self._whole.name, src_dir_fd=self._folder.fd, dst_dir_fd=self._whole.folder.fd)


class Rebuilt(NamedTuple):
    """Blobs that were wrong at start: those that the journal could give again, and those that it could not."""

    rebuilt: list[bytes]
    lost: list[bytes]


class Journal:
    """DATA/journal, and what is rebuilt and released from it."""

    def __init__(self, data: Path, state: State, cache: Cache, limits: Limits, *, keep_bundles: bool) -> None:
        make_private(data / "journal")
        self._data = data
        self._state = state
        self._cache = cache
        self._limits = limits
        self._keep_bundles = keep_bundles
        self.folder = Folder.open(data / "journal")

    def spool(self, source: Source, require_space: Callable[[], None]) -> Spool | Adopted:
        """Return a fresh journal file that takes a bundle, or the one that an assembled bundle becomes."""
        if isinstance(source, Assembled):
            return Adopted(self.folder, source)
        return Spool(self.folder, source, require_space)

    def size_bytes(self) -> int:
        """Return how many bytes the journal takes."""
        total = 0
        for name in self.folder.names():
            with contextlib.suppress(FileNotFoundError):
                total += self.folder.stat(name).st_size
        return total

    def clear_unreferenced(self) -> None:
        """Remove files that no receipt names; nobody may be receiving."""
        with self._state.read() as db:
            named = {row.journal for row in journalled(db)}
        for name in self.folder.names():
            if name not in named:
                os.unlink(name, dir_fd=self.folder.fd)

    def rebuild(self) -> Rebuilt:
        """Hash every blob that a journalled bundle carries and rebuild the wrong ones (spec ST-41).

        A power cut leaves files of the right size full of zeros, so neither existence nor fingerprint is believed.
        """
        with self._state.read() as db:
            receipts = journalled(db)
        rebuilt: set[bytes] = set()
        wrong: set[bytes] = set()
        right: set[bytes] = set()
        for receipt in receipts:
            carried = [digest for digest in split_digests(receipt.carried) if digest not in right | rebuilt]
            with self._state.read() as db:
                rows, lacking = blob_rows(db, carried), lacking_of(db, carried)
            here = {digest for digest in rows if digest not in wrong and self._cache.holds_right_bytes(digest)}
            right |= here
            if sought := (rows.keys() - here) | lacking:
                given = self._republish(receipt, sought)
                rebuilt.update(given)
                wrong = (wrong | (rows.keys() - here)).difference(given)
        for receipt in receipts if wrong else ():  # a bundle may have brought again what another one carries
            given = self._republish(receipt, wrong)
            rebuilt.update(given)
            wrong.difference_update(given)
        return Rebuilt(sorted(rebuilt), sorted(wrong))

    def _republish(self, receipt: ReceiptRow, wrong: Collection[bytes]) -> list[bytes]:
        """Write blobs again from a journalled bundle; returns those that it could give.

        Raises what says nothing of the journal file, such as NoSpace: the file still has what it has.
        """
        _log.warning("rebuilding %d blob(s) from the journal of %s", len(wrong), receipt.file_name)
        with self._cache.staging() as staging:
            try:
                with self._open(receipt) as source:
                    reader = BundleReader(source, self._limits)
                    for operation, views, recipe in reader.contents():
                        if recipe is None and bytes.fromhex(operation.digest or "") in wrong:
                            staging.write(operation, views)
            except (OSError, Refused, Corrupt) as error:
                if isinstance(error, OSError) and error.errno not in _UNREADABLE:
                    raise
                _log.error("journal file %s cannot be read (%s)", receipt.journal, error)
                return []
            with self._state.hold():
                with self._state.read() as db:
                    kept = blob_rows(db, staging.staged)
                try:
                    with self._cache.published(staging, kept, renews=True) as rows, self._state.write() as db:
                        write_blobs(db, rows, kept)
                except BaseException:
                    for digest in kept:  # trees that are linked to what was there must hear of it once rows can say so
                        self._cache.doubt(digest)
                    raise
            return [row.digest for row in rows]

    def _open(self, receipt: ReceiptRow) -> contextlib.closing[_File]:
        return contextlib.closing(_File(open_regular(receipt.journal or "", at=self.folder.fd)))

    def checkpoint(self, should_stop: ShouldStop = lambda: False) -> int:
        """Make every blob of the journalled bundles durable and release their files; returns how many (spec ST-42)."""
        with self._state.read() as db:
            receipts = journalled(db)
        done = 0
        for receipt in receipts:
            if should_stop():
                break
            if not self._has_given(receipt):
                continue  # it may be all that has what is asked for
            if not self._make_durable(receipt, should_stop):
                break
            self._release(receipt)
            done += 1
        return done

    def _has_given(self, receipt: ReceiptRow) -> bool:
        """Put back what the bundle carried and the cache has lost since; False where some of that is still lost."""
        with self._state.read() as db:
            lacking = lacking_of(db, split_digests(receipt.carried))
        if not lacking:
            return True
        try:
            return len(self._republish(receipt, lacking)) == len(lacking)
        except (NoSpace, OSError) as error:
            _log.error("what journal file %s holds cannot be put back now (%s)", receipt.journal, error)
            return False

    def _make_durable(self, receipt: ReceiptRow, should_stop: ShouldStop) -> bool:
        digests = split_digests(receipt.carried)
        for batch in batched(digests, _BATCH):
            if should_stop():
                return False
            rows, failed = self._unchanged(batch)
            failed |= {digest for digest in rows if self._cache.is_doubtful(digest)}
            for digest in rows:
                self._with_blob(digest, start_writeback)
            failed |= {digest for digest in rows if not self._with_blob(digest, os.fsync)}
            if failed and not self._replace(receipt, failed):
                return False
        self._cache.make_names_durable(digests)
        return True

    def _unchanged(self, digests: Sequence[bytes]) -> tuple[list[bytes], set[bytes]]:
        """Return the blobs that are as their rows say, and those that are not; what has no row is not needed."""
        with self._state.hold(), self._state.read() as db:
            rows = blob_rows(db, digests)
            same = [digest for digest, row in rows.items() if self._cache.has_unchanged(row)]
        return same, rows.keys() - set(same)

    def _with_blob(self, digest: bytes, action: Callable[[int], None]) -> bool:
        """Do something with an open blob; False when the disk failed it. A blob that was collected needs nothing."""
        try:
            descriptor = self._cache.open(digest)
        except FileNotFoundError:
            return True
        try:
            action(descriptor)
        except OSError as error:
            _log.error("blob %s could not be made durable (%s)", digest.hex(), error)
            self._cache.doubt(digest)
            return False
        finally:
            os.close(descriptor)
        return True

    def _replace(self, receipt: ReceiptRow, failed: Collection[bytes]) -> bool:
        """Write blobs anew whose fsync, or whose folder's, failed: asked again it would say yes (spec ST-43)."""
        try:
            replaced = self._republish(receipt, failed)
        except (NoSpace, OSError) as error:
            _log.error("blobs that the disk failed cannot be written anew now (%s)", error)
            return False
        return len(replaced) == len(failed) and all(self._with_blob(digest, os.fsync) for digest in replaced)

    def _release(self, receipt: ReceiptRow) -> None:
        """Drop or keep a journal file: first the row forgets it, so that no row names a file that is gone."""
        name = receipt.journal or ""
        if self._keep_bundles:
            kept = self._data / folder_of(receipt.workspace, "bundles")
            kept.mkdir(0o700, parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError), Folder.open(kept) as folder:
                os.link(name, receipt.file_name, src_dir_fd=self.folder.fd, dst_dir_fd=folder.fd)
            fsync_folder(kept)
        with self._state.write() as db:
            db.execute("UPDATE receipts SET journal = NULL, carried = NULL WHERE journal = ?", (name,))
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self.folder.fd)

    def damaged_files(self) -> Iterator[tuple[ReceiptRow, str]]:
        """Yield the journalled bundles whose file does not read as the bundle that the receipt names, and why."""
        with self._state.read() as db:
            receipts = journalled(db)
        for receipt in receipts:
            try:
                with self._open(receipt) as source:
                    reader = BundleReader(source, self._limits)
                    if reader.metadata().identity != receipt.identity:
                        raise Corrupt("it holds another bundle")
                    reader.finish()
            except (OSError, DeltasyncError) as error:
                yield receipt, str(error)

    def close(self) -> None:
        """Let the folder go."""
        self.folder.close()


class _File:
    """An open file as a bundle's source."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def read(self, size: int, /) -> bytes:
        return os.read(self._descriptor, size)

    def close(self) -> None:
        os.close(self._descriptor)
