"""A selection of paths: what a scan sees of a folder that holds far more (spec J-22)."""

from __future__ import annotations

from collections.abc import Collection, Iterable


class Selection:
    """Some paths below a root, with everything that is in them and nothing that is beside them."""

    def __init__(self, paths: Iterable[str]) -> None:
        """Take paths relative to the root; one that lies in another one is seen with it."""
        self.paths: list[str] = []
        self._names: dict[str, set[str]] = {}
        for path in sorted(set(paths), key=lambda each: each.split("/")):
            if not (self.paths and path.startswith(f"{self.paths[-1]}/")):
                self.paths.append(path)
        for path in self.paths:
            while path:
                path, _, name = path.rpartition("/")
                self._names.setdefault(path, set()).add(name)

    def names(self, folder: str) -> Collection[str] | None:
        """Return what there is to see directly in a folder above the paths; None in one of them: everything."""
        return self._names.get(folder)
