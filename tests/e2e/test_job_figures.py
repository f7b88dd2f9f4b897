"""What jobs moved and took, as it is recorded, shown, summed and scraped (spec J-80 to J-82)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from commands import begun, seen, shell
from serving import Served, serving, until
from user import User

from deltasync.core.jobs import State


def figure(served: Served, name: str) -> float:
    """Return one number of /metrics."""
    lines = served.get("/metrics").body.decode().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(f"deltasync_{name} "))


def test_figures_are_recorded_shown_and_summed(tmp_path: Path) -> None:
    """A job's row has its files, bytes, seconds and errors; `jobs show` and `jobs stats` tell them, /metrics sums."""
    user = User(tmp_path / "home")
    folder = tmp_path / "home/work"
    folder.mkdir()
    (folder / "a.txt").write_bytes(b"alpha\n" * 10)
    with serving(tmp_path / "data", "--run-without-token") as served:
        user.environment["DELTASYNC_ON"] = served.url
        done = user.run("run", "--json", "--", "cp", "a.txt", "b.txt", cwd=folder)
        assert done.code == 0, done.err
        shown = user.run("jobs", "show", done.json["job"], "--json").json["metrics"]
        assert (shown["files_in"], shown["bytes_in"], shown["files_out"], shown["bytes_out"]) == (1, 60, 1, 60)
        assert (shown["file_count"], shown["total_bytes"]) == (2, 120)
        assert (shown["success_rate"], shown["error_count"]) == (1.0, 0)
        steps = [shown[f"{step}_seconds"] for step in ("queued", "staged", "run", "collected")]
        assert (
            all(each >= 0 for each in steps)
            and min(steps[1:]) > 0
            and abs(sum(steps) - shown["duration_seconds"]) < 1e-6
        )
        assert user.run("run", "--", "sh", "-c", "exit 3", cwd=folder).code == 3
        waiting = begun(served, shell("sleep 1000"), State.RUNNING)
        assert seen(served, waiting)["metrics"] is None
        assert user.run("jobs", "cancel", waiting).code == 0
        until(lambda: seen(served, waiting)["state"] == "cancelled")
        assert seen(served, waiting)["metrics"]["error_count"] == 1
        told = user.run("jobs", "stats", "--since", "1h", "--json").json
        assert (told["jobs"], told["states"]) == (3, {"done": 2, "cancelled": 1})
        assert (told["commands_failed"], told["totals"]["bytes_out"], told["totals"]["error_count"]) == (1, 60, 1)
        assert round(told["success_rate"], 2) == 0.33
        assert user.run("jobs", "stats", "--since", "0s", "--json").json["jobs"] == 0
        assert "3: " in user.run("jobs", "stats").out and user.run("jobs", "stats", "--since", "soon").code == 2
        assert (figure(served, "jobs_done_total"), figure(served, "jobs_cancelled_total")) == (2, 1)
        assert (figure(served, "job_bytes_in_total"), figure(served, "job_run_seconds_total") > 0) == (60, True)
        assert figure(served, "job_slots") == 4
        until(lambda: figure(served, "job_sessions") == 0)


def test_a_job_that_never_had_its_turn_has_no_figures(tmp_path: Path) -> None:
    """What was cancelled in the queue is counted, and has no figures of its own."""
    with serving(tmp_path / "data", "--run-without-token", "--slots", "1") as served:
        begun(served, shell("sleep 1000"), State.RUNNING)
        waits = begun(served, shell("true"))
        assert figure(served, "jobs_queued") == 1
        cancelled: Any = served.request("DELETE", f"/api/v1/jobs/{waits}").json
        assert (cancelled["state"], cancelled["metrics"]) == ("cancelled", None)
        assert (figure(served, "jobs_cancelled_total"), figure(served, "jobs_queued")) == (1, 0)
