"""The real Prefect server: deployments served, `smoke` started over its API with other values, and what it shows."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gristmill.flows.server import free_port
from tests.flows.browser import browser

COMMAND = [str(Path(sys.executable).with_name("gristmill"))]


class Api:
    """Prefect's REST API. A busy server answers 503, and is asked again, as Prefect's own client does."""

    def __init__(self, url: str) -> None:
        self.url = url

    def __call__(self, path: str, body: Any = None, method: str | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        asked = urllib.request.Request(f"{self.url}/{path}", data, {"Content-Type": "application/json"}, method=method)
        until = time.monotonic() + 30
        while True:
            try:
                with urllib.request.urlopen(asked, timeout=30) as answer:
                    text = answer.read()
                    return json.loads(text) if text else None
            except urllib.error.HTTPError as error:
                if error.code != 503 or time.monotonic() > until:
                    raise
                time.sleep(1.0)

    def wait(self, run: str, states: set[str], seconds: float) -> dict[str, Any]:
        until = time.monotonic() + seconds
        while (found := self(f"flow_runs/{run}"))["state"]["type"] not in states:
            assert time.monotonic() < until, f"the flow run is still {found['state']}"
            time.sleep(0.5)
        return found

    def artifacts(self, run: str) -> dict[str, str]:
        found = self("artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [run]}}, "limit": 100})
        return {a["key"]: a["data"] for a in found if isinstance(a["data"], str)}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Api, Path, str]]:
    """`gristmill ui` on a free port, in a folder of its own."""
    folder, port = tmp_path_factory.mktemp("ui"), free_port()
    with (folder / "ui.log").open("wb") as log:
        process = subprocess.Popen(
            [*COMMAND, "ui", "--port", str(port)], cwd=folder, stdout=log, stderr=log, start_new_session=True
        )
    api = Api(f"http://127.0.0.1:{port}/api")
    try:
        until = time.monotonic() + 120
        while True:
            assert process.poll() is None, (folder / "ui.log").read_text()[-3000:]
            assert time.monotonic() < until, (folder / "ui.log").read_text()[-3000:]
            try:
                if len(api("deployments/filter", {})) == 3:
                    break
            except OSError:
                pass  # not up yet
            time.sleep(0.5)
        yield api, folder, f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise


def started(api: Api, deployment: str, **parameters: Any) -> str:
    found = next(d for d in api("deployments/filter", {}) if d["name"] == deployment)
    given = {**found["parameters"], **parameters}
    return api(f"deployments/{found['id']}/create_flow_run", {"parameters": given, "state": {"type": "SCHEDULED"}})[
        "id"
    ]


@pytest.mark.slow
def test_smoke_over_the_api(served: tuple[Api, Path, str]) -> None:
    api, folder, _ = served
    deployments = {d["name"]: d for d in api("deployments/filter", {})}
    assert set(deployments) == {"tiny", "smoke", "nightly"}
    (schedule,) = deployments["nightly"]["schedules"]
    assert schedule["schedule"]["cron"]
    assert deployments["nightly"]["paused"] or not schedule["active"]
    form = deployments["smoke"]["parameter_openapi_schema"]
    assert {"rl_zero", "report"} <= set(form["definitions"]["Stage"]["enum"])
    assert form["definitions"]["GRPOConfig"]["properties"]["temperature"]["description"]

    recipe = deployments["smoke"]["parameters"]["recipe"]
    recipe = {**recipe, "rl": {**recipe["rl"], "steps": 2}}
    run = started(api, "smoke", recipe=recipe)
    ended = api.wait(run, {"COMPLETED", "FAILED", "CRASHED"}, 300)
    assert ended["state"]["type"] == "COMPLETED", (folder / "ui.log").read_text()[-3000:]
    tasks = api("task_runs/filter", {"flow_runs": {"id": {"any_": [run]}}, "limit": 100})
    assert {t["name"].rsplit("-", 1)[0] for t in tasks} >= {"ingest", "pretrain", "rl_zero", "rl", "report"}
    assert all(t["state"]["type"] == "COMPLETED" for t in tasks)
    artifacts = api.artifacts(run)
    assert "never run in this store" in artifacts["plan"]
    assert "data:image/png;base64," in artifacts["pretrain"]
    manifests = [json.loads(p.read_text()) for p in folder.glob(".gristmill/store/rl/*/manifest.json")]
    assert [m["config"]["steps"] for m in manifests] == [2]

    again = started(api, "smoke", recipe=recipe, from_stage="rl")
    assert api.wait(again, {"COMPLETED", "FAILED", "CRASHED"}, 200)["state"]["type"] == "COMPLETED"
    states = {
        t["name"].rsplit("-", 1)[0]: t["state"]["name"]
        for t in api("task_runs/filter", {"flow_runs": {"id": {"any_": [again]}}, "limit": 100})
    }
    assert states["pretrain"] == "Cached"
    assert states["rl"] == states["report"] == "Completed"


@pytest.mark.slow
def test_cancelled_and_resumed(served: tuple[Api, Path, str]) -> None:
    api, folder, _ = served
    recipe = next(d for d in api("deployments/filter", {}) if d["name"] == "smoke")["parameters"]["recipe"]
    recipe = {**recipe, "seed": 7, "pretrain": {**recipe["pretrain"], "steps": 400, "checkpoint_every": 10}}
    run = started(api, "smoke", recipe=recipe, until_stage="pretrain")
    until = time.monotonic() + 120
    while not (found := list(folder.glob(".gristmill/store/pretrain/*/work/checkpoint-????????"))):
        assert time.monotonic() < until, (folder / "ui.log").read_text()[-3000:]
        time.sleep(0.05)
    out = found[0].parent.parent
    api(f"flow_runs/{run}/set_state", {"state": {"type": "CANCELLING"}, "force": False})
    assert api.wait(run, {"CANCELLED"}, 60)
    pid = json.loads((out / "log" / "starts.jsonl").read_text().splitlines()[0])["pid"]
    until = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < until, "the training process outlived its cancelled flow run"
        time.sleep(0.2)
    again = started(api, "smoke", recipe=recipe, until_stage="pretrain")
    assert api.wait(again, {"COMPLETED", "FAILED", "CRASHED"}, 200)["state"]["type"] == "COMPLETED"
    starts = [json.loads(line)["from_step"] for line in (out / "log" / "starts.jsonl").read_text().splitlines()]
    assert starts[0] == 0
    assert starts[-1] > 0


@pytest.mark.ui
def test_the_page_shows_the_run(served: tuple[Api, Path, str], tmp_path: Path) -> None:
    """In headless Chromium: the flow's run, its tasks by name, and the picture in a stage's card.

    With GRISTMILL_PICTURES the pictures are kept in that folder.
    """
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert chromium, "make test-ui needs a chromium on the PATH"
    api, _, url = served
    run = started(api, "smoke")
    assert api.wait(run, {"COMPLETED", "FAILED", "CRASHED"}, 300)["state"]["type"] == "COMPLETED"
    found = api("artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [run]}}, "limit": 100})
    (card,) = [a for a in found if a["key"] == "pretrain"]
    (deployment,) = [d for d in api("deployments/filter", {}) if d["name"] == "smoke"]
    pages = {
        "runs": (f"{url}/runs", "smoke"),
        "run": (f"{url}/runs/flow-run/{run}", "pretrain      done"),  # its log
        "card": (f"{url}/artifacts/artifact/{card['id']}", "data:image/png;base64,"),
        "form": (f"{url}/deployments/deployment/{deployment['id']}/run", "from_stage"),
    }
    with browser(chromium, tmp_path) as page:
        for name, (address, wanted) in pages.items():
            page.open(address, wanted)
            page.picture(tmp_path / f"ui-{name}.png", 1500 if name == "card" else 1000)
            assert (tmp_path / f"ui-{name}.png").stat().st_size > 10_000
            if name == "run":
                page.click("Task Runs", "pretrain-")
                page.picture(tmp_path / "ui-tasks.png")
    if keep := os.environ.get("GRISTMILL_PICTURES"):
        Path(keep).mkdir(parents=True, exist_ok=True)
        for picture in tmp_path.glob("ui-*.png"):
            shutil.copy(picture, keep)
