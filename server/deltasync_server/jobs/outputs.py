"""Outputs: what lies at the places that a job may write, looked at without following a link (spec J-60)."""

from __future__ import annotations

import stat
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from deltasync.core.argv import pattern_of
from deltasync.core.jobs import JobRequest, Output, Trouble
from deltasync.core.manifest import EMPTY_ROOT, Entry, Kind
from deltasync.core.names import NameRefused, bytes_text, parse_path, shown
from deltasync.disk import Folder
from deltasync_server.jobs.contents import Contents, Spoiled

FILE_BYTES_MAX = 50 * 10**9
TROUBLES_MAX = 1_000
"""How many problems are told one by one."""
_KINDS = {
    stat.S_IFLNK: "a link",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


@dataclass(slots=True)
class Gathered:
    """What is there."""

    entries: dict[str, Entry] = field(default_factory=dict)
    """Files and folders by their places; a folder's digest is that of an empty one."""
    places: list[str] = field(default_factory=list)
    """The outputs among them."""
    problems: dict[str, str] = field(default_factory=dict)
    strays: list[Trouble] = field(default_factory=list)
    """What the command wrote where nothing comes home from."""

    def troubles(self) -> list[Trouble]:
        """Return the problems, by place, as they are told."""
        told = [Trouble(place=place, reason=reason) for place, reason in sorted(self.problems.items())]
        if len(told) > TROUBLES_MAX:
            more = Trouble(place="", reason=f"{len(told) - TROUBLES_MAX} more places have problems")
            told = [*told[:TROUBLES_MAX], more]
        return told + self.strays


class Gathering:
    """One look at a session whose command is dead."""

    def __init__(self, session: Folder, contents: Contents, *, file_bytes: int = FILE_BYTES_MAX) -> None:
        """file_bytes: what a file may have to come home (spec J-33)."""
        self._session, self._contents, self._file_bytes = session, contents, file_bytes
        self._named: set[str] = set()
        """Places that an output names, whatever is there."""
        self.found = Gathered()

    def run(self, request: JobRequest, staged: Mapping[str, bytes]) -> Gathered:
        """Look at every place. staged: the digests that files of `in_place` inputs had, by their places."""
        for output in request.outputs:
            self._output(output)
        for each in request.inputs:
            if each.in_place:
                self._in_place(each.place, staged)
        top = self._held("outputs", "")
        if top is not None:
            with top:
                self._beside(top, "", [output.place for output in request.outputs])
        self._contents.record()
        return self.found

    def _output(self, output: Output) -> None:
        above, _, last = output.place.rpartition("/")
        pattern = pattern_of(last) if output.is_pattern else None
        folder = self._held("outputs", above)
        if folder is None:
            return
        with folder:
            names = [last]
            if pattern is not None:  # a name may look like a pattern that does not match it
                names = sorted(name for name in folder.names() if name == last or pattern.match(name))
            for name in names:
                self._named.add(place := _joined(above, name))
                if self._take(folder, name, place, must_be_folder=output.is_folder):
                    self.found.places.append(place)

    def _held(self, top: str, above: str) -> Folder | None:
        """Hold the folder that a place is in; None where it is not there, or is none any more."""
        try:
            return self._session.walk_to(_joined(top, above))
        except FileNotFoundError:
            return None
        except OSError as error:
            self.refuse(above, f"is no folder of the session any more ({error.strerror})")
            return None

    def _take(self, folder: Folder, name: str, place: str, *, must_be_folder: bool = False) -> bool:
        """Take what is at a place, with all that is in it; False where nothing comes of it."""
        if place in self.found.entries:
            return True  # it lies in another output
        try:
            parse_path(place)
            mode = folder.stat(name).st_mode
        except NameRefused as error:
            return self.refuse(place, f"has a name that cannot be carried: {error}")
        except FileNotFoundError:
            return False
        except OSError as error:
            return self.refuse(place, f"cannot be looked at ({error.strerror})")
        if stat.S_ISDIR(mode):
            return self._take_folder(folder, name, place)
        if must_be_folder:
            return self.refuse(place, "was to be a folder and is none")
        if not stat.S_ISREG(mode):
            return self.refuse(place, f"is {_KINDS.get(stat.S_IFMT(mode), 'no file')}, and only files and folders are")
        return self._take_file(folder, name, place)

    def _take_folder(self, folder: Folder, name: str, place: str) -> bool:
        try:
            with folder.enter(name) as inside:
                self.found.entries[place] = Entry(name, Kind.DIRECTORY, digest=EMPTY_ROOT)
                for each in sorted(inside.names()):
                    self._take(inside, each, f"{place}/{each}")
        except OSError as error:
            self.refuse(place, f"cannot be read ({error.strerror})")
        return place in self.found.entries

    def _take_file(self, folder: Folder, name: str, place: str, *, but: bytes | None = None) -> bool:
        try:
            size = folder.stat(name).st_size
            if size > self._file_bytes:
                return self.refuse(place, f"has {bytes_text(size)}, and a file may have {bytes_text(self._file_bytes)}")
            entry = self._contents.take(folder, name, but=but)
        except FileNotFoundError:
            return self.refuse(place, "went away while it was collected")
        except Spoiled as spoiled:
            return self.refuse(place, str(spoiled))
        if entry is not None:
            self.found.entries[place] = entry
        return entry is not None

    def refuse(self, place: str, reason: str) -> bool:
        """Say why something does not come home; False, as what comes of it."""
        self.found.problems.setdefault(shown(place), reason)
        return False

    def _in_place(self, place: str, staged: Mapping[str, bytes]) -> None:
        above, _, name = place.rpartition("/")
        folder = self._held("inputs", above)
        if folder is not None:
            with folder:
                self._changed(folder, name, place, staged, is_top=True)

    def _changed(self, folder: Folder, name: str, place: str, staged: Mapping[str, bytes], *, is_top: bool) -> None:
        """Take the files of an input whose bytes are others than before; what was removed stays where it came from."""
        if place in self.found.entries:
            return  # an output has this place
        try:
            parse_path(place)
            mode = folder.stat(name).st_mode
            if stat.S_ISDIR(mode):
                with folder.enter(name) as inside:
                    for each in sorted(inside.names()):
                        self._changed(inside, each, f"{place}/{each}", staged, is_top=False)
            elif stat.S_ISREG(mode):
                if self._take_file(folder, name, place, but=staged.get(place)):
                    self.found.places.append(place)
            elif is_top or not stat.S_ISLNK(mode):  # a link inside a folder came with it
                self.refuse(place, f"is {_KINDS.get(stat.S_IFMT(mode), 'no file')} by now, and only files come home")
        except NameRefused as error:
            self.refuse(place, f"has a name that cannot be carried: {error}")
        except FileNotFoundError:
            pass
        except OSError as error:
            self.refuse(place, f"cannot be read ({error.strerror})")

    def _beside(self, folder: Folder, above: str, places: Collection[str]) -> None:
        """Name what the command wrote beside the outputs (spec J-60)."""
        for name in sorted(folder.names()):
            place = _joined(above, name)
            if place in self._named:
                continue
            if any(each.startswith(f"{place}/") for each in places):
                try:
                    with folder.enter(name) as inside:
                        self._beside(inside, place, places)
                except OSError:
                    continue  # the outputs below it have said so
            else:
                self.refuse(place, "was written beside the outputs, and is none of them; --out names it")


def _joined(above: str, name: str) -> str:
    return f"{above}/{name}" if above and name else above or name
