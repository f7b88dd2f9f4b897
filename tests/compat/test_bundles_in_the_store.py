"""The bundles in bundles/ against a real store: the good chain is applied, no refused one leaves anything behind."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deltasync.core.errors import DeltasyncError
from deltasync.core.hashing import digest_of
from deltasync.core.names import parse_workspace
from deltasync_server.config import StoreConfig
from deltasync_server.receive import Store

BUNDLES = Path(__file__).resolve().parents[2] / "bundles"
GOOD: list[dict[str, Any]] = json.loads((BUNDLES / "good/index.json").read_text(encoding="utf-8"))
REFUSED: list[dict[str, Any]] = json.loads((BUNDLES / "refused/index.json").read_text(encoding="utf-8"))
LIFE = parse_workspace("life")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """A store that has received the good chain."""
    with Store(StoreConfig(data=tmp_path_factory.mktemp("data"))) as store:
        store.recover()
        for row in GOOD:
            sealed = io.BytesIO((BUNDLES / "good" / row["file"]).read_bytes())
            assert store.receive(LIFE, sealed, expected_identity=None).root == row["root"]
        yield store


@pytest.mark.parametrize("chain", ["recipes", "parts"])
def test_the_store_makes_files_of_what_it_has(tmp_path: Path, chain: str) -> None:
    """The chains with recipes and with parts lead to their trees on disk."""
    rows = json.loads((BUNDLES / chain / "index.json").read_text(encoding="utf-8"))
    with Store(StoreConfig(data=tmp_path / "data")) as store:
        store.recover()
        for row in rows:
            sealed = io.BytesIO((BUNDLES / chain / row["file"]).read_bytes())
            assert store.receive(LIFE, sealed, expected_identity=None).root == row["root"]
        store.trees.bring_forward(LIFE)
        for line in (BUNDLES / chain / rows[-1]["tree"]).read_text(encoding="utf-8").splitlines()[1:]:
            _, _, _, _, digest, path = line.split("\t")
            assert digest_of((store.trees.path(LIFE) / path).read_bytes()).hex() == digest


@pytest.mark.parametrize("row", REFUSED, ids=lambda row: row["file"].removesuffix(".tar.zst"))
def test_the_store_refuses_by_exactly_the_rule_and_keeps_nothing(store: Store, row: dict[str, Any]) -> None:
    """The error is that of the index; head, counts and the files of the store are as before."""
    before = store.workspace(LIFE), _files(store)
    with pytest.raises(DeltasyncError) as caught:
        sealed = io.BytesIO((BUNDLES / "refused" / row["file"]).read_bytes())
        store.receive(LIFE, sealed, expected_identity=None)
    assert (caught.value.code, caught.value.facts.get("rule")) == (row["code"], row["rule"])
    assert (store.workspace(LIFE), _files(store)) == before


def _files(store: Store) -> set[Path]:
    return {path for path in store.config.data.rglob("*") if path.is_file() and not path.name.startswith("state.db")}
