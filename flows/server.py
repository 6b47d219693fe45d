"""The Prefect server of a project: its home in `.gristmill/prefect`, on the loopback address, telling nobody anything.

python -m gristmill.flows.server PORT      what `start` runs: the server, ending with the process that wanted it
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gristmill.flows.errors import UsageError

HOME = Path(".gristmill/prefect")
ADDRESS = "127.0.0.1"
START_SECONDS = 90.0
STOP_SECONDS = 10.0


def environment() -> dict[str, str]:
    """Prefect's settings for this project; to be in force before Prefect is imported."""
    home = str(HOME.absolute())
    return {
        "PREFECT_HOME": home,
        "PREFECT_PROFILES_PATH": f"{home}/profiles.toml",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_API_HOST": ADDRESS,
        "PREFECT_LOGGING_LEVEL": "INFO",  # for the UI: a run's log is there, stage by stage
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": os.environ.get("PREFECT_LOGGING_LEVEL", "WARNING"),
        "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
        "DO_NOT_TRACK": "1",
        "PYTHONSAFEPATH": "1",
    }


def is_up(url: str) -> bool:
    """Whether a Prefect API answers at `url`."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=3) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def running() -> str | None:
    """URL of the API that `gristmill ui` serves from this folder, if it does; PREFECT_API_URL names another."""
    if url := os.environ.get("PREFECT_API_URL"):
        return url if is_up(url) else None
    note = HOME / "server.json"
    if note.exists():
        url = json.loads(note.read_text(encoding="utf-8"))["url"]
        return url if is_up(url) else None
    return None


def free_port() -> int:
    """A free port on the loopback address."""
    with socket.socket() as probe:
        probe.bind((ADDRESS, 0))
        return probe.getsockname()[1]


def check_port(port: int) -> None:
    """Refuse a port that is taken.

    Raises:
        UsageError: with the port and what to do.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((ADDRESS, port))
        except OSError as error:
            raise UsageError(
                f"port {port} on {ADDRESS} is in use ({error.strerror}): choose another with --port"
            ) from error


@contextmanager
def started(port: int | None = None) -> Iterator[str]:
    """A server of our own for as long as the context lasts; its API's URL.

    Raises:
        RuntimeError: it did not come up; the message names its log.
    """
    HOME.mkdir(parents=True, exist_ok=True)
    port = port or free_port()
    url, log = f"http://{ADDRESS}:{port}/api", HOME / "server.log"
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "gristmill.flows.server", str(port)],
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **environment(), "GRISTMILL_LAUNCHER": str(os.getpid())},
            start_new_session=True,  # Ctrl-C is for us: the server must outlive it to be told how the run ended
        )
    try:
        until = time.monotonic() + START_SECONDS
        while not is_up(url):
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"the Prefect server did not start; its log is {log.absolute()}")
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _watch(launcher: int) -> None:
    def look() -> None:
        while True:
            try:
                os.kill(launcher, 0)
            except ProcessLookupError:
                os._exit(75)
            time.sleep(1.0)

    threading.Thread(target=look, daemon=True).start()


def main(port: int) -> None:
    """Serve Prefect's API and UI until told to stop, or until the launcher is gone."""
    if launcher := os.environ.get("GRISTMILL_LAUNCHER"):
        _watch(int(launcher))
    os.environ["PREFECT_SERVER_API_PORT"] = str(port)
    os.environ["PREFECT_UI_API_URL"] = f"http://{ADDRESS}:{port}/api"
    import uvicorn

    uvicorn.run("prefect.server.api.server:create_app", factory=True, host=ADDRESS, port=port, log_level="warning")


if __name__ == "__main__":
    main(int(sys.argv[1]))
