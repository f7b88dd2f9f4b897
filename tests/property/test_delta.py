"""Properties of deltas: applying the difference of two trees to the first gives the second."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from trees import Flat, Objects, flat_trees, shuffled

from deltasync.core.delta import apply, cut, diff, moved_since
from deltasync.core.manifest import Entry, Kind, Verb
from deltasync.core.metadata import check_operations


def _check(old: Flat, new: Flat, renames: dict[str, str], max_operations: int) -> None:
    objects = Objects()
    old_root, new_root = objects.build(old), objects.build(new)
    operations = diff(old_root, new_root, objects.load, renames)
    check_operations(operations)
    whole = apply(old_root, operations, objects.load)
    assert whole.root == new_root
    assert whole.files == _files(new) - _files(old)
    assert whole.content_bytes == _bytes(new) - _bytes(old)
    root = old_root
    for run in cut(operations, lambda operation: operation.size, max_operations=max_operations, max_bytes=2):
        applied = apply(root, run, objects.load)
        objects.update(applied.objects)
        root = applied.root
    assert root == new_root
    assert objects.flat(root) == new


def _files(tree: Flat) -> int:
    return sum(entry.kind is Kind.FILE for entry in tree.values())


def _bytes(tree: Flat) -> int:
    return sum(entry.size for entry in tree.values())


@given(flat_trees(), flat_trees(), st.integers(1, 8))
@settings(max_examples=400, deadline=None)
def test_applying_the_difference_of_any_two_trees_gives_the_second(old: Flat, new: Flat, limit: int) -> None:
    """apply(old, diff(old, new)) == new, also when the delta is cut into runs of any length."""
    _check(old, new, {}, limit)


@given(st.data(), flat_trees(), st.integers(1, 8))
@settings(max_examples=400, deadline=None)
def test_renames_are_only_hints(data: st.DataObject, old: Flat, limit: int) -> None:
    """True renames and random lies about renames both lead to the right tree."""
    new, renames = data.draw(shuffled(old))
    lies = data.draw(
        st.dictionaries(st.sampled_from([*sorted(new), "q"]), st.sampled_from([*sorted(old), "q"]), max_size=3)
    )
    _check(old, new, renames, limit)
    _check(old, new, {**renames, **lies}, limit)


@given(flat_trees())
@settings(max_examples=100, deadline=None)
def test_a_tree_does_not_differ_from_itself(tree: Flat) -> None:
    """diff(tree, tree) is empty."""
    objects = Objects()
    root = objects.build(tree)
    assert diff(root, root, objects.load) == []


@given(flat_trees())
@settings(max_examples=100, deadline=None)
def test_everything_can_be_deleted_and_the_guard_sees_how_much(tree: Flat) -> None:
    """A delta to the empty tree deletes top-level entries and counts everything below them as dropped."""
    objects = Objects()
    operations = diff(objects.build(tree), objects.build({}), objects.load)
    assert all(operation.operation is Verb.DELETED and "/" not in operation.path for operation in operations)
    assert apply(objects.build(tree), operations, objects.load).entries_dropped == len(tree)


def test_what_a_moved_folder_took_along_and_gave_back_is_no_move() -> None:
    """A folder moves, and a file and a folder of it come back to where they were: both are created again."""
    objects = Objects()
    file = Entry("f", Kind.FILE, size=1, digest=b"f" * 32)

    def flat(**folders: str) -> Flat:
        tree: Flat = {}
        for folder, names in folders.items():
            tree[folder] = Entry(folder, Kind.DIRECTORY)
            for name in names:
                tree[f"{folder}/{name}"] = replace(file, name=name, digest=name.encode() * 32)
            tree |= (
                {f"{folder}/sub": Entry("sub", Kind.DIRECTORY), f"{folder}/sub/g": replace(file, name="g")}
                if ("s" in names)
                else {}
            )
        return tree

    old, new = objects.build(flat(a="fghs")), objects.build(flat(b="gh", a="fs"))
    operations = diff(old, new, objects.load, {"b": "a"})
    check_operations(operations)
    assert apply(old, operations, objects.load).root == new


def test_moves_one_after_the_other_are_one() -> None:
    """What moved twice came from the first place; what moved back did not move; what is new there came from nowhere."""
    assert moved_since({"b": "a"}, {"c": "b"}) == {"c": "a"}
    assert moved_since({"b": "a"}, {"a": "b"}) == {}
    assert moved_since({"b": "a"}, {"c": "a"}) == {"b": "a"}
    assert moved_since({"b": "a"}, {"x": "b/y"}) == {"b": "a", "x": "a/y"}
    assert moved_since({"b/y": "z"}, {"c": "b"}) == {"c/y": "z", "c": "b"}
