"""Swaps folders and files below some places for links to a folder outside, until its standard input ends.

`python racer.py SEED OUTSIDE PLACE…`; the last line of its output is how many swaps it made.
"""

from __future__ import annotations

import contextlib
import os
import random
import sys
import threading

LISTED_EACH = 400
"""After so many swaps it is looked up again what is there."""
ASIDE = "~aside"
HELD_SECONDS = 0.02
"""How long links stay at most where all files are swapped at once."""


def listed(places: list[str]) -> list[str]:
    """Return what can be swapped: everything below the places, but what is aside."""
    found = []
    for place in places:
        for above, folders, files in os.walk(place):
            folders[:] = [name for name in folders if not name.startswith(".deltasync")]
            found += [f"{above}/{name}" for name in (*folders, *files) if not name.endswith(ASIDE)]
    return found


def put(path: str, target: str) -> bool:
    """Put a link in a path's place; False where it was gone."""
    try:
        os.rename(path, path + ASIDE)
    except OSError:
        return False
    with contextlib.suppress(OSError):
        os.symlink(target, path)
    return True


def take_away(path: str) -> None:
    """Put back what a link took the place of."""
    with contextlib.suppress(OSError):
        if os.path.islink(path):
            os.unlink(path)
    with contextlib.suppress(OSError):
        os.rename(path + ASIDE, path)


def main() -> None:
    """Swap until told to stop: one after another, then all files at once for a moment, in turns."""
    chance, outside, places = random.Random(sys.argv[1]), sys.argv[2], sys.argv[3:]
    is_over = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), is_over.set()), daemon=True).start()
    swaps = 0
    while not is_over.is_set():
        known = listed(places)
        for _ in range(min(LISTED_EACH, 4 * len(known))):
            path = chance.choice(known)
            if put(path, outside if os.path.isdir(path) else f"{outside}/secret"):
                take_away(path)
                swaps += 1
        swapped = [path for path in known if not os.path.isdir(path) and put(path, f"{outside}/secret")]
        is_over.wait(chance.random() * HELD_SECONDS)  # whoever is about to open one by its name finds a link
        for path in swapped:
            take_away(path)
        swaps += len(swapped)
    print(swaps)


if __name__ == "__main__":
    main()
