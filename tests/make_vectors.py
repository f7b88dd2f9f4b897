"""Write spec/vectors from readable parts; the files are reviewed and committed, tests only read them.

The roots are computed here with MessagePack and BLAKE3 spelled out, not with the code under test.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

from blake3 import blake3

VECTORS = Path(__file__).parent.parent / "spec" / "vectors"
CONTEXT = "deltasync 2026-11-21 directory object v1"


def text(value: str) -> bytes:
    raw = value.encode()
    if len(raw) < 32:
        return bytes([0xA0 | len(raw)]) + raw
    return (b"\xd9" + bytes([len(raw)]) if len(raw) < 256 else b"\xda" + struct.pack(">H", len(raw))) + raw


def integer(value: int) -> bytes:
    if 0 <= value < 128:
        return bytes([value])
    if -32 <= value < 0:
        return struct.pack("b", value)
    forms = [(b"\xcc", "B"), (b"\xcd", "H"), (b"\xce", "I"), (b"\xcf", "Q")]
    signed = [(b"\xd0", "b"), (b"\xd1", "h"), (b"\xd2", "i"), (b"\xd3", "q")]
    for marker, form in forms if value >= 0 else signed:
        try:
            return marker + struct.pack(">" + form, value)
        except struct.error:
            continue
    raise ValueError(value)


def array(items: list[bytes]) -> bytes:
    count = len(items)
    head = bytes([0x90 | count]) if count < 16 else b"\xdc" + struct.pack(">H", count)
    return head + b"".join(items)


def directory(tree: dict) -> tuple[bytes, bytes]:
    """Return body and digest of {name: {...}} where a nested "entries" marks a directory."""
    items = []
    for name in sorted(tree, key=str.encode):
        node = tree[name]
        kind = "directory" if "entries" in node else "symlink" if "target" in node else "file"
        digest = {
            "directory": lambda node=node: directory(node["entries"])[1],
            "symlink": lambda: b"",
            "file": lambda node=node: blake3(node["content"].encode()).digest(),
        }[kind]()
        fields = [
            text(name),
            text(kind),
            integer(len(node["content"].encode()) if kind == "file" else 0),
            integer(node.get("mtime_ns", 0)),
            b"\xc3" if node.get("executable") else b"\xc2",
            b"\xc4" + bytes([len(digest)]) + digest,
            text(node.get("target", "")),
        ]
        items.append(array(fields))
    body = array(items)
    return body, blake3(body, derive_key_context=CONTEXT).digest()


TREES = {
    "the empty tree": {},
    "one empty file": {"a": {"content": ""}},
    "a file with time and execute bit": {
        "run.sh": {"content": "#!/bin/sh\n", "mtime_ns": 1700000000123456789, "executable": True}
    },
    "an empty directory": {"empty": {"entries": {}}},
    "a symlink": {"link": {"target": "dir/file"}},
    "times before 1970 and after 2106": {
        "old": {"content": "x", "mtime_ns": -1},
        "new": {"content": "x", "mtime_ns": 4294967296000000000},
    },
    "order is by bytes": {
        "a": {"content": "1"},
        "B": {"content": "2"},
        "é": {"content": "3"},
        "z": {"content": "4"},
        "\U0001f600": {"content": "5"},
        "\uffee": {"content": "6"},
    },
    "nested": {
        "media": {
            "entries": {
                "clip.txt": {"content": "frames", "mtime_ns": 5},
                "sub": {"entries": {"n" * 40: {"content": "long name"}}},
            }
        },
        "link": {"target": "media/clip.txt"},
    },
    "twenty entries": {f"f{i:02d}": {"content": str(i), "mtime_ns": i * 1000} for i in range(20)},
}

PATHS = {
    "good": [
        "a",
        "a/b",
        "a..b",
        "...",
        "-rf",
        "con",
        "a b",
        " ",
        "é",
        "e\u0301",
        "[/red]",
        "a\\b",
        "x" * 255,
        "/".join(["d"] * 200),
        "日本語/ファイル",
        "a:b",
        "~",
        "$HOME",
        "*",
        ".hidden",
        ".deltasyncignore",
    ],
    "refused": [
        "",
        "/",
        "/a",
        "a/",
        "a//b",
        ".",
        "..",
        "a/./b",
        "a/../b",
        "../a",
        "a\u0000b",
        "a\nb",
        "\u001b[31m",
        "\u007f",
        "a\u0085",
        "x" * 256,
        "é" * 128,
        "/".join(["d"] * 201),
        "/".join(["x" * 200] * 21),
        ".deltasync",
        ".deltasync/state.db",
        "a/.deltasync",
        "\ud800",
    ],
    "workspace_good": ["media", "My Videos", "a.b", "été", "x" * 100],
    "workspace_refused": ["", ".", "..", ".hidden", "a/b", "a\\b", " a", "a ", "x" * 101, "a\nb", ".deltasync"],
    "targets_inside": [
        ["link", "file"],
        ["a/link", "../file"],
        ["a/b/link", "../../c"],
        ["link", "a/../b"],
        ["link", "."],
        ["a/link", ".."],
        ["link", "missing"],
        ["link", "x" * 4095],
    ],
    "targets_outside": [
        ["link", "/etc/passwd"],
        ["link", ".."],
        ["link", "../x"],
        ["a/link", "../../x"],
        ["link", "a/../../x"],
        ["link", ""],
        ["link", "a\nb"],
        ["link", "x" * 4096],
    ],
}

_A, _B = "a" * 64, "b" * 64
HEADS = {
    "fresh": {"client_id": "", "epoch": "", "sequence": 0, "root": None, "past_epochs": []},
    "used": {"client_id": "one", "epoch": "e2", "sequence": 7, "root": _A, "past_epochs": ["e1"]},
}
SEQUENCE = [
    ["the first bundle", "fresh", None, ["one", "e1", 1, None], False, "APPLY"],
    ["the first bundle may not start late", "fresh", None, ["one", "e1", 2, None], False, "GAP"],
    ["the first bundle starts from the empty tree", "fresh", None, ["one", "e1", 1, _A], False, "FORK"],
    ["the next bundle", "used", None, ["one", "e2", 8, _A], False, "APPLY"],
    ["the next bundle of another parent", "used", None, ["one", "e2", 8, _B], False, "FORK"],
    ["the same bundle again", "used", "same", ["one", "e2", 7, _B], False, "DUPLICATE"],
    ["the same old bundle again", "used", "same", ["one", "e2", 3, _B], False, "DUPLICATE"],
    ["the same bundle of a past epoch again", "used", "same", ["one", "e1", 2, _B], False, "DUPLICATE"],
    ["another bundle under a spent number", "used", "other", ["one", "e2", 7, _A], False, "FORK"],
    ["an old number without a receipt", "used", None, ["one", "e2", 2, _A], False, "FORK"],
    ["a number ahead", "used", None, ["one", "e2", 9, _A], False, "GAP"],
    ["a past epoch", "used", None, ["one", "e1", 8, _A], False, "STALE_EPOCH"],
    ["a new epoch continues", "used", None, ["one", "e3", 8, _A], False, "APPLY"],
    ["a new epoch does not start over", "used", None, ["one", "e3", 1, None], False, "FORK"],
    ["a new epoch from another tree", "used", None, ["one", "e3", 8, _B], False, "FORK"],
    ["another client", "used", None, ["two", "e3", 8, _A], False, "NOT_OWNER"],
    ["another client repeats the owner's bundle", "used", "same", ["two", "e2", 7, _A], False, "DUPLICATE"],
    ["another client takes over", "used", None, ["two", "e3", 8, _A], True, "APPLY"],
    ["a take-over still has to follow the head", "used", None, ["two", "e3", 8, _B], True, "FORK"],
    ["a take-over does not revive a past epoch", "used", None, ["two", "e1", 8, _A], True, "STALE_EPOCH"],
]

# Deltas: trees are {path: content}, a path that ends in "/" is a directory, "->x" is a symlink's target. Operations are
# written short: "verb path", "verb path < source"; the maker fills in kind, digests and sizes.
DELTAS = [
    ["create with parents", {}, ["created d/", "created d/a"], {"d/": "", "d/a": "1"}],
    ["edit", {"a": "1"}, ["updated a"], {"a": "2"}],
    ["delete a file", {"a": "1", "b": "2"}, ["deleted a"], {"b": "2"}],
    ["delete a directory with everything below", {"d/": "", "d/e/": "", "d/e/a": "1"}, ["deleted d/"], {}],
    ["move a file", {"a": "1"}, ["moved b < a"], {"b": "1"}],
    ["move and edit a file", {"a": "1"}, ["moved b < a"], {"b": "2"}],
    ["swap of files by moves", {"a": "1", "b": "2"}, ["moved a < b", "moved b < a"], {"a": "2", "b": "1"}],
    ["chain of files", {"a": "1", "b": "2"}, ["moved c < b", "moved b < a"], {"b": "1", "c": "2"}],
    ["a file goes over another", {"a": "1", "b": "2"}, ["updated b", "deleted a"], {"b": "1"}],
    ["move a directory", {"d/": "", "d/a": "1"}, ["moved e/ < d/"], {"e/": "", "e/a": "1"}],
    [
        "swap of directories",
        {"d/": "", "d/a": "1", "e/": "", "e/b": "2"},
        ["moved d/ < e/", "moved e/ < d/"],
        {"e/": "", "e/a": "1", "d/": "", "d/b": "2"},
    ],
    [
        "chain of directories",
        {"d/": "", "d/a": "1", "e/": "", "e/b": "2"},
        ["moved f/ < e/", "moved e/ < d/"],
        {"e/": "", "e/a": "1", "f/": "", "f/b": "2"},
    ],
    [
        "move and edit inside",
        {"d/": "", "d/a": "1", "d/b": "2"},
        ["moved e/ < d/", "updated e/a base=1"],
        {"e/": "", "e/a": "3", "e/b": "2"},
    ],
    [
        "move and delete inside",
        {"d/": "", "d/a": "1", "d/b": "2"},
        ["moved e/ < d/", "deleted e/a base=1"],
        {"e/": "", "e/b": "2"},
    ],
    [
        "move and create inside",
        {"d/": "", "d/a": "1"},
        ["moved e/ < d/", "created e/b"],
        {"e/": "", "e/a": "1", "e/b": "2"},
    ],
    [
        "move into a former child",
        {"d/": "", "d/c/": "", "d/c/x": "1", "d/a": "2"},
        ["moved c/ < d/c/", "moved c/d/ < d/"],
        {"c/": "", "c/x": "1", "c/d/": "", "c/d/a": "2"},
    ],
    ["move below its own old name", {"d/": "", "d/a": "1"}, ["moved d/e/ < d/"], {"d/": "", "d/e/": "", "d/e/a": "1"}],
    ["move into a new parent", {"d/": "", "d/a": "1"}, ["moved n/d/ < d/"], {"n/": "", "n/d/": "", "n/d/a": "1"}],
    ["move over a directory", {"d/": "", "d/a": "1", "e/": "", "e/b": "2"}, ["moved e/ < d/"], {"e/": "", "e/a": "1"}],
    [
        "a file leaves a moved directory",
        {"d/": "", "d/a": "1", "d/b": "2"},
        ["moved e/ < d/", "moved f < d/b"],
        {"e/": "", "e/a": "1", "f": "2"},
    ],
    ["a file leaves a deleted directory", {"d/": "", "d/a": "1"}, ["deleted d/", "moved f < d/a"], {"f": "1"}],
    ["file becomes directory", {"x": "1"}, ["deleted x", "created x/", "created x/a"], {"x/": "", "x/a": "2"}],
    ["directory becomes file", {"x/": "", "x/a": "1"}, ["deleted x/", "created x"], {"x": "2"}],
    ["link becomes file", {"x": "->a"}, ["deleted x", "created x"], {"x": "2"}],
    ["retarget a link", {"x": "->a"}, ["updated x"], {"x": "->b"}],
    ["copy", {"a": "1"}, ["created b"], {"a": "1", "b": "1"}],
    ["content asked for again", {"a": "1"}, ["updated a"], {"a": "1"}],
]

REFUSED_DELTAS = [
    ["no parent", {}, ["created d/a"], {"d/": "", "d/a": "1"}, "B-40"],
    ["the parent is a file", {"d": "1"}, ["created d/a"], {"d": "1", "d/a": "1"}, "B-40"],
    ["already there", {"a": "1"}, ["created a"], {"a": "2"}, "B-41"],
    ["moved onto a file", {"a": "1", "b": "2"}, ["moved b < a"], {"b": "1"}, "B-41"],
    ["update of nothing", {}, ["updated a"], {"a": "1"}, "B-42"],
    ["delete of nothing", {}, ["deleted a"], {}, "B-42"],
    ["update of another kind", {"x": "->a"}, ["updated x"], {"x": "1"}, "B-42"],
    ["delete of another kind", {"x/": ""}, ["deleted x"], {}, "B-42"],
    ["delete of another content", {"a": "1"}, ["deleted a base=9"], {}, "B-43"],
    ["update of another content", {"a": "1"}, ["updated a base=9"], {"a": "2"}, "B-43"],
    ["move of another content", {"a": "1"}, ["moved b < a base=9"], {"b": "1"}, "B-43"],
    ["move of nothing", {}, ["moved b < a"], {"b": "1"}, "B-44"],
    ["move of another kind", {"a": "->x"}, ["moved b < a"], {"b": "1"}, "B-44"],
    ["one source moves twice", {"a": "1"}, ["moved b < a", "moved c < a"], {"b": "1", "c": "1"}, "B-44"],
]


def kind(path: str, tree: dict) -> str:
    return "directory" if path.endswith("/") else "symlink" if tree.get(path, "").startswith("->") else "file"


def digest(content: str) -> str:
    return blake3(content.encode()).hexdigest()


def operation(short: str, before: dict, after: dict) -> dict:
    words, base = short.split(), None
    if words[-1].startswith("base="):
        base = digest(words.pop()[5:])
    verb, path = words[0], words[1]
    value = {"operation": verb, "kind": kind(path, before if verb == "deleted" else after), "path": path.rstrip("/")}
    source = words[3] if len(words) > 2 else path
    if verb == "moved":
        value["source_path"] = source.rstrip("/")
    if verb != "created" and value["kind"] == "file" and not before.get(source, "").startswith("->"):
        value["base"] = base or digest(before.get(source, ""))
    if verb != "deleted" and value["kind"] == "file":
        value |= {"digest": digest(after[path]), "size": len(after[path])}
    if verb != "deleted" and value["kind"] == "symlink":
        value["target"] = after[path][2:]
    return value


def deltas() -> dict:
    good = [
        {"name": name, "before": before, "operations": [operation(o, before, after) for o in short], "after": after}
        for name, before, short, after in DELTAS
    ]
    refused = [
        {"name": name, "before": before, "operations": [operation(o, before, after) for o in short], "rule": rule}
        for name, before, short, after, rule in REFUSED_DELTAS
    ]
    return {"good": good, "refused": refused}


def write(name: str, value: object) -> None:
    VECTORS.mkdir(parents=True, exist_ok=True)
    (VECTORS / name).write_text(json.dumps(value, indent=1, ensure_ascii=True) + "\n")


def main() -> None:
    roots = [
        {"name": name, "tree": tree, "body": directory(tree)[0].hex(), "root": directory(tree)[1].hex()}
        for name, tree in TREES.items()
    ]
    write("roots.json", roots)
    write("paths.json", PATHS)
    write("deltas.json", deltas())
    keys = ["name", "head", "recorded", "header", "take_over", "verdict"]
    write("sequence.json", {"heads": HEADS, "cases": [dict(zip(keys, case, strict=True)) for case in SEQUENCE]})


if __name__ == "__main__":
    main()
