"""Settings: units, the three layers, and what is said of a bad value."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from deltasync import config
from deltasync.core.errors import UsageError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", 0),
        ("500", 500),
        ("500b", 500),
        ("1k", 1024),
        ("10M", 10 * 2**20),
        ("10m", 10 * 2**20),
        ("2GiB", 2 * 2**30),
        ("2 GiB", 2 * 2**30),
        ("2GB", 2 * 10**9),
        ("1.5K", 1536),
        ("1T", 2**40),
        (4096, 4096),
    ],
)
def test_a_size_is_read_in_bytes_and_its_usual_units(text: config.Raw, expected: int) -> None:
    """A size is read in bytes and its usual units: K, M, G and T count in 1024s, KB and so on in 1000s."""
    assert config.parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "M", "-1", "10X", "1e9", "ten", "10MM", "0x10", "1_000", "nan", "inf", True])
def test_what_is_no_size_is_refused(text: config.Raw) -> None:
    """What is no size is refused."""
    with pytest.raises(ValueError, match="size"):
        config.parse_size(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", 0.0),
        ("2", 2.0),
        ("2s", 2.0),
        ("250ms", 0.25),
        ("0.5", 0.5),
        ("30m", 1800.0),
        ("12h", 43200.0),
        ("7d", 604800.0),
        ("2w", 1209600.0),
        (2, 2.0),
        (0.25, 0.25),
    ],
)
def test_a_time_is_read_in_seconds_and_its_usual_units(text: config.Raw, expected: float) -> None:
    """A time is read in seconds and its usual units."""
    assert config.parse_seconds(text) == pytest.approx(expected)


@pytest.mark.parametrize("text", ["", "s", "-1s", "7y", "1h30m", "soon", float("nan"), float("inf"), [1]])
def test_what_is_no_time_is_refused(text: config.Raw) -> None:
    """What is no time is refused."""
    with pytest.raises(ValueError, match=r"time|value"):
        config.parse_seconds(text)


def test_the_table_and_the_type_name_the_same_settings() -> None:
    """The table of settings and the Settings type name the same settings, and no variable twice."""
    fields = {field.encode_name for field in msgspec.structs.fields(config.Settings)}
    assert fields == {*config.SETTINGS, *config.DERIVED}
    assert len({setting.variable for setting in config.SETTINGS.values()}) == len(config.SETTINGS)
    assert all(setting.help.endswith((".", "]", "].")) for setting in config.SETTINGS.values())


def test_a_flag_wins_over_the_environment_and_that_over_a_file(tmp_path: Path) -> None:
    """A flag wins over the environment, the environment over the workspace's file, that over the user's file."""
    user, own = tmp_path / "user.toml", tmp_path / "own.toml"
    user.write_text('settle = "9s"\ntimeout = 9\nbwlimit = "9M"\nrescan = 9\n')
    own.write_text("timeout = 8\nbwlimit = 8\nrescan = 8\n")
    settings = config.load(
        {"rescan": "6", "bwlimit": None, "exclude": []},
        {"DELTASYNC_BWLIMIT": "7", "DELTASYNC_RESCAN": "7"},
        [(user, False), (own, True)],
    )
    assert (settings.settle_seconds, settings.timeout_seconds) == (9.0, 8.0)
    assert (settings.bandwidth_bytes, settings.rescan_seconds) == (7, 6.0)
    assert settings.exclude == ()


def test_nothing_set_gives_the_defaults_that_the_help_names() -> None:
    """Nothing set gives the defaults that the help names in brackets."""
    settings = config.load({}, {"PATH": "/bin", "DELTASYNC_TO": " "})
    assert settings == config.Settings()
    for key, field in {each.encode_name: each for each in msgspec.structs.fields(config.Settings)}.items():
        words = config.SETTINGS[key].help if key in config.SETTINGS else ""
        if words.endswith("]."):
            named = words[words.rindex("[") + 1 : -2]
            assert config.SETTINGS[key].kind.parse(named) == field.default, key


def test_every_setting_has_a_variable() -> None:
    """Every setting can be set by its DELTASYNC_ variable."""
    examples = {
        config.SWITCH: ("yes", True),
        config.PATTERNS: ("*.tmp  build/", ("*.tmp", "build/")),
        config.SIZE: ("3k", 3072),
        config.CHUNKED: ("1M", 1 << 20),
        config.SECONDS: ("3m", 180.0),
        config.POSITIVE: ("3m", 180.0),
        config.COUNT: ("3", 3),
        config.JOBS: ("3", 3),
        config.LEVEL: ("3", 3),
        config.DAYS: ("3", 3.0),
        config.ADDRESS: ("http://host:8080", "http://host:8080"),
        config.NAME: ("proj", "proj"),
        config.FOLDER: ("/tmp/x", "/tmp/x"),
        config.REMOTE_FOLDER: ("~/x", "~/x"),
        config.COMMAND: ("ssh -i key", "ssh -i key"),
    }
    for key, setting in config.SETTINGS.items():
        text, expected = examples[setting.kind]
        settings = config.load({}, {setting.variable: text})
        field = next(each.name for each in msgspec.structs.fields(settings) if each.encode_name == key)
        assert getattr(settings, field) == expected, key


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, "http://seed:1"),
        ({"REMOTE_UPLOAD_ENABLED": "1"}, "http://seed:1"),
        ({"REMOTE_UPLOAD_ENABLED": "true"}, "http://seed:1"),
        ({"REMOTE_UPLOAD_ENABLED": "0"}, None),
        ({"REMOTE_UPLOAD_ENABLED": "false"}, None),
        ({"REMOTE_UPLOAD_ENABLED": "0", "DELTASYNC_TO": "http://own:2"}, "http://own:2"),
        ({"DELTASYNC_TO": "http://own:2"}, "http://own:2"),
    ],
)
def test_the_seeds_variables_are_aliases(environment: dict[str, str], expected: str | None) -> None:
    """The seed's variables are aliases; its endpoint counts unless REMOTE_UPLOAD_ENABLED says no."""
    seed = {
        "REMOTE_UPLOAD_ENDPOINT": "http://seed:1",
        "REMOTE_UPLOAD_TIMEOUT": "60",
        "REMOTE_UPLOAD_MAX_RETRIES": "5",
    }
    settings = config.load({}, seed | environment)
    assert (settings.to, settings.timeout_seconds, settings.max_retries) == (expected, 60.0, 5)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("colour = 1", ["colour is no setting", "allowed are", "bwlimit"]),
        ("settel = 1", ["did you mean settle?"]),
        ('bwlimit = "10X"', ["bwlimit: '10X' is not a size such as 500k, 10M or 2GiB"]),
        ("bwlimit = -1", ["bwlimit: '-1' is not a size"]),
        ("level = 0", ["level: '0' is not a whole number from 1 to 19"]),
        ("level = 20", ["level: '20' is not a whole number from 1 to 19"]),
        ("jobs = 0", ["jobs: '0' is not a whole number from 1 to 64"]),
        ("timeout = 0", ["timeout: '0' is not a time above zero"]),
        ('gitignore = "maybe"', ["gitignore: 'maybe' is not true or false"]),
        ("exclude = [1]", ["exclude: '[1]' is not a list of patterns"]),
        ("exclude = {a = 1}", ["is not a list of patterns"]),
        ("settle = [1]", ["settle: '[1]' is not a time"]),
        ('to = "host:8080"', ["to: 'host:8080' is not an address such as https://host:8080"]),
        ('workspace = "a/b"', ["workspace: a/b is not a workspace's name: a name holds no '/'"]),
        ("max-retries = 1.5", ["is not a whole number from 0"]),
        ("take-over = true", ["take-over is set only by a flag or by DELTASYNC_TAKE_OVER"]),
        ("settle = ", ["is not TOML"]),
    ],
)
def test_a_bad_file_is_named_with_the_key_and_what_is_allowed(tmp_path: Path, content: str, words: list[str]) -> None:
    """A bad value in a file is one sentence that names the file, the key and what is allowed."""
    path = tmp_path / "config.toml"
    path.write_text(content)
    with pytest.raises(UsageError) as caught:
        config.load({}, {}, [(path, False)])
    assert str(path) in caught.value.sentence
    assert "\n" not in caught.value.sentence
    for word in words:
        assert word in caught.value.sentence


def test_bad_flags_and_variables_are_named_as_they_were_given() -> None:
    """A bad value is named as it was given: the flag, the variable, or the alias."""
    with pytest.raises(UsageError, match=r"^--settle: 'x' is not a time such as"):
        config.load({"settle": "x"}, {})
    with pytest.raises(UsageError, match=r"^DELTASYNC_SETTLE: 'x' is not a time such as"):
        config.load({}, {"DELTASYNC_SETTLE": "x"})
    with pytest.raises(UsageError, match=r"^REMOTE_UPLOAD_TIMEOUT: 'x' is not a time above zero"):
        config.load({}, {"REMOTE_UPLOAD_TIMEOUT": "x"})
    with pytest.raises(UsageError, match=r"^REMOTE_UPLOAD_ENABLED: 'x' is not true or false"):
        config.load({}, {"REMOTE_UPLOAD_ENABLED": "x", "REMOTE_UPLOAD_ENDPOINT": "http://h"})


@pytest.mark.parametrize("key", ["to", "workspace", "state-dir", "proxy"])
def test_a_workspaces_own_file_never_says_where_it_is_sent(tmp_path: Path, key: str) -> None:
    """A workspace's own file never says where it is sent: it may have come with the folder from elsewhere."""
    path = tmp_path / "config.toml"
    path.write_text(f'{key} = "http://evil.example"\n')
    with pytest.raises(UsageError, match=f"{key} is set only in the user's own file, by a flag or by DELTASYNC_"):
        config.load({}, {}, [(path, True)])


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """A file that cannot be read, or is not text, is named; one that is not there is no trouble."""
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match=r"binary\.toml is not TOML"):
        config.load({}, {}, [(binary, False)])
    with pytest.raises(UsageError, match="cannot be read"):
        config.load({}, {}, [(tmp_path, False)])
    assert config.load({}, {}, [(tmp_path / "none" / "config.toml", False), (binary / "below", True)]).to is None


def test_the_files_are_the_users_and_the_workspaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files are the user's, in DELTASYNC_HOME or the user's configuration folder, and the workspace's own."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    (user, is_own), (own, is_workspace) = config.files_of(tmp_path / "proj", {})
    assert (user.name, is_own, is_workspace) == ("config.toml", False, True)
    assert own == tmp_path / "proj" / ".deltasync" / "config.toml"
    assert config.files_of(None, {}) == [(user, False)]
    home = {"DELTASYNC_HOME": str(tmp_path / "home")}
    assert config.files_of(None, home) == [(tmp_path / "home" / "config.toml", False)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("HTTP://Host:8080/", "http://host:8080"),
        (" http://host/prefix/ ", "http://host/prefix"),
        ("file:///mnt/USB/", "file:///mnt/USB"),
        ("https://[::1]:8080", "https://[::1]:8080"),
        ("Gpu-1", "Gpu-1"),
        ("SSH://Ada@GPU/Project/", "ssh://Ada@GPU/Project"),
    ],
)
def test_an_address_has_one_spelling(text: str, expected: str) -> None:
    """An address has one spelling, so that what was remembered is recognised; a host's name is left for its book."""
    assert config.load({"to": text}, {}).to == expected


@pytest.mark.parametrize("text", ["", "a host", "host:8080", "ftp://host", "http://", "http:host", "file://"])
def test_what_is_no_address_is_refused(text: str) -> None:
    """What is no address is refused, with an example of one."""
    with pytest.raises(UsageError, match="is not an address such as https://host:8080"):
        config.load({"to": text}, {})
