"""Room: how much may still be written, by the disk's reserve, by the quota, and by what one tenant may hold."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from deltasync.core.errors import HostBusy, NoSpace
from deltasync.core.names import bytes_text
from deltasync.disk import DiskFull
from deltasync_server.config import StoreConfig
from deltasync_server.ledger import Ledger
from deltasync_server.tenants import Tenant

RESERVE_SHARE = 20
"""The reserve of free space and of inodes is at most this part of the disk's: a small disk can still be used."""
COARSE_INODES = 1000
"""In what a sender is told of free inodes: one by one they would say whether somebody else had a content before."""
SPARE_SHARE = 20
"""Less than this part of the quota free, or twice the reserve: what nothing needs goes in the next quiet moment."""


@dataclass(frozen=True, slots=True)
class Shortage:
    """How much has to go before something fits."""

    bytes: int = 0
    inodes: int = 0

    def __bool__(self) -> bool:
        return bool(self.bytes or self.inodes)

    def is_met_by(self, other: Shortage) -> bool:
        """Tell whether so much of both is enough."""
        return self.bytes <= other.bytes and self.inodes <= other.inodes

    def or_more(self, other: Shortage) -> Shortage:
        """Return the greater of both, by bytes and by inodes."""
        return Shortage(max(self.bytes, other.bytes), max(self.inodes, other.inodes))


class GivesWay(Protocol):
    """Something that can be begun anew, and is removed when its space is needed."""

    def release(self, size_bytes: int) -> None:
        """Remove what nobody uses, where that frees so many bytes."""


class Room:
    """Answers whether something fits, before it is written; what can be done without gives way first."""

    def __init__(self, config: StoreConfig, ledger: Ledger) -> None:
        self._config = config
        self._ledger = ledger
        self._lock = threading.Lock()
        """Held while what is to come is weighed: two that fit one at a time do not both."""
        self.gives_way: tuple[GivesWay, ...] = ()
        self.evict: Callable[[Shortage], bool] = lambda short: False
        """Has so much removed of what nothing needs; True where that goes on when it returns."""
        self.give_back: Callable[[Tenant, int], None] = lambda tenant, size_bytes: None
        """Finds out what a tenant holds without need, up to so many bytes, so that it counts no more."""

    @property
    def bounds_tenants(self) -> bool:
        """Whether a tenant has a part, beyond which it may not go."""
        return self._config.tenant_quota is not None or self._config.tenant_files is not None

    @property
    def is_bounded(self) -> bool:
        """Whether anything but the disk bounds what comes."""
        return self.bounds_tenants or self._config.quota is not None

    def is_low(self) -> bool:
        """Tell whether less than the reserve of the disk is free."""
        return self._disk_shortage(0) > 0

    def spare_shortage(self) -> Shortage:
        """Return how much should go in a quiet moment, so that what comes next need not wait."""
        return Shortage(self._spare_bytes(), self._inode_shortage(3) if self._inode_shortage(2) else 0)

    def _spare_bytes(self) -> int:
        reserve_bytes, spare_bytes = space_of(self._config)[1], (self._config.quota or 0) // SPARE_SHARE
        if not (self._disk_shortage(reserve_bytes) or self._quota_shortage(spare_bytes)):
            return 0
        return max(self._disk_shortage(2 * reserve_bytes), self._quota_shortage(2 * spare_bytes))

    def require(self, size_bytes: int = 0) -> None:
        """Raise NoSpace when so many bytes more would touch the disk's reserves or go beyond the quota.

        Uploads, streams and content that nothing needs give way, where that is enough; HostBusy while they do.
        """
        self._fit(size_bytes, lambda: max(self._disk_shortage(size_bytes), self._quota_shortage(size_bytes)))

    def require_disk(self, size_bytes: int = 0) -> None:
        """Raise as `require` does, of bytes that the quota has in it already, as content that is coming."""
        self._fit(size_bytes, lambda: self._disk_shortage(size_bytes))

    @contextmanager
    def reserved(self, tenant: Tenant, size_bytes: int, *, files: int = 0) -> Iterator[None]:
        """Count what a tenant brings as coming for the length of a block, before its first byte; raises as `require`.

        size_bytes: of content that the tenant does not hold yet. files: how many more its workspaces will have.
        """
        with self._lock:
            self.require_share(tenant, size_bytes, files=files)
            if size_bytes:  # what brings nothing may always delete
                self._fit(size_bytes, lambda: self._quota_shortage(size_bytes))
            self._ledger.expect(tenant, size_bytes)
        try:
            yield
        finally:
            self._ledger.expect(tenant, -size_bytes)

    def require_share(self, tenant: Tenant, size_bytes: int = 0, *, files: int = 0) -> None:
        """Raise NoSpace when a tenant would hold more than its part, by bytes or by files (spec H-108)."""
        if not self.bounds_tenants:
            return
        usage = self._ledger.usage(tenant)
        if size_bytes > 0 and usage.bytes_limit is not None and usage.bytes + size_bytes > usage.bytes_limit:
            self.give_back(tenant, usage.bytes + size_bytes - usage.bytes_limit)
            usage = self._ledger.usage(tenant)
        if size_bytes > 0 and usage.bytes_limit is not None and usage.bytes + size_bytes > usage.bytes_limit:
            raise NoSpace(
                f"you may hold {bytes_text(usage.bytes_limit)} on this server: {bytes_text(usage.bytes)} are held and "
                f"{bytes_text(size_bytes)} would come; remove what does not fit and push, release a pin, or ask for "
                f"more: what else is deleted counts until none of the last {self._config.keep_sequences} states has it",
                needed_bytes=size_bytes,
                held_bytes=usage.bytes,
                quota_bytes=usage.bytes_limit,
            )
        self.require_files(tenant, files)

    def require_files(self, tenant: Tenant, files: int) -> None:
        """Raise NoSpace when the workspaces of a tenant would have more files than they may."""
        limit = self._config.tenant_files
        if files > 0 and limit is not None and (there := self._ledger.files(tenant)) + files > limit:
            raise NoSpace(
                f"you may have {limit} files on this server: {there} are there and {files} would come; delete some, or "
                "ask its operator",
                files=there,
                files_limit=limit,
            )

    def _fit(self, size_bytes: int, shortage: Callable[[], int]) -> None:
        def short() -> Shortage:
            return Shortage(shortage(), self._inode_shortage())

        for each in self.gives_way:
            if not (short_bytes := short().bytes):
                break
            each.release(short_bytes)
        if not (lacking := short()):
            return
        is_under_way = self.evict(lacking)
        if not (lacking := short()):
            return
        if is_under_way:
            raise HostBusy("the server is removing what nothing needs any more to make room; try again")
        raise self._few_inodes() if lacking.inodes else self._full(size_bytes)

    def _inode_shortage(self, reserves: int = 1) -> int:
        """Return how many inodes are lacking to so many times the reserve."""
        free, reserve = inodes_of(self._config)
        return max(0, reserves * reserve - free)

    def _few_inodes(self) -> NoSpace:
        free, reserve = inodes_of(self._config)
        return NoSpace(
            f"fewer than the reserve of {reserve} inodes are free at {self._config.data}; remove some files there and "
            "try again",
            free_inodes=free // COARSE_INODES * COARSE_INODES,
            reserve_inodes=reserve,
        )

    def _disk_shortage(self, size_bytes: int) -> int:
        free_bytes, reserve_bytes = space_of(self._config)
        return max(0, size_bytes + reserve_bytes - free_bytes)

    def _quota_shortage(self, size_bytes: int) -> int:
        quota = self._config.quota
        return 0 if quota is None else max(0, self._ledger.held_bytes() + size_bytes - quota)

    def _full(self, size_bytes: int) -> NoSpace:
        needed = f"{bytes_text(size_bytes)} to write, " if size_bytes else ""
        quota = self._config.quota
        if quota is not None and self._quota_shortage(size_bytes):
            return NoSpace(
                f"the server's quota of {bytes_text(quota)} is used up: {needed}remove what does not fit and push, "
                "release a pin, have it keep fewer sequences, or ask for a larger --quota",
                needed_bytes=size_bytes or None,
                quota_bytes=quota,
            )
        free_bytes, reserve_bytes = space_of(self._config)
        return DiskFull(
            f"less than the reserve of {bytes_text(reserve_bytes)} would be free at {self._config.data}: {needed}"
            "{free} free; free some space and try again",
            free_bytes,
            needed_bytes=size_bytes or None,
            reserve_bytes=reserve_bytes,
        )


def space_of(config: StoreConfig) -> tuple[int, int]:
    """Return how many bytes of a store's disk are free, and how many of them are the reserve."""
    disk = os.statvfs(config.data)
    reserve_bytes = min(config.low_disk_bytes, disk.f_blocks * disk.f_frsize // RESERVE_SHARE)
    return disk.f_bavail * disk.f_frsize, reserve_bytes


def inodes_of(config: StoreConfig) -> tuple[int, int]:
    """Return how many inodes of a store's disk are free, and how many of them are the reserve."""
    disk = os.statvfs(config.data)
    return disk.f_favail, min(config.low_disk_inodes, disk.f_files // RESERVE_SHARE)  # 0 where they are made as needed
