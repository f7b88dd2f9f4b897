"""Writes bundles/ again from its readable parts: `python tests/corpus.py [FOLDER]`."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from corpus_faults import FAULTS
from corpus_good import Step, good_chain, part_chain, recipe_chain, tree_text

from deltasync.core import bundle

FOLDER = Path(__file__).resolve().parent.parent / "bundles"


def write_chain(chain: Iterable[Step], folder: Path) -> None:
    """Write a good chain: bundle files as an export names them, trees/NN.txt and index.json."""
    (folder / "trees").mkdir(parents=True)
    index: list[dict[str, object]] = []
    for number, step in enumerate(chain, start=1):
        name, tree = bundle.file_name(step.metadata), f"trees/{number:02d}.txt"
        (folder / name).write_bytes(step.sealed)
        (folder / tree).write_text(tree_text(step.tree), encoding="utf-8")
        root = step.metadata.manifest.root
        index.append({"sequence": number, "file": name, "title": step.title, "tree": tree, "root": root})
    _write_index(folder, index)


def write_refused(folder: Path) -> None:
    """Write the refused bundles and index.json, which says what each one breaks."""
    folder.mkdir(parents=True)
    index: list[dict[str, object]] = []
    for fault in FAULTS:
        (folder / fault.file).write_bytes(fault.build())
        index.append({"file": fault.file, "code": fault.code, "rule": fault.rule, "says": fault.says})
    _write_index(folder, index)


def _write_index(folder: Path, index: list[dict[str, object]]) -> None:
    (folder / "index.json").write_text(json.dumps(index, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    """Write good/, recipes/, parts/ and refused/ anew, in bundles/ or in the folder that is named."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    writers = {
        "good": partial(write_chain, good_chain()),
        "recipes": partial(write_chain, recipe_chain()),
        "parts": partial(write_chain, part_chain()),
        "refused": write_refused,
    }
    for part, write in writers.items():
        shutil.rmtree(folder / part, ignore_errors=True)
        write(folder / part)
    print(f"wrote {sum(1 for _ in folder.rglob('*.tar.zst'))} bundles to {folder}")


if __name__ == "__main__":
    main()
