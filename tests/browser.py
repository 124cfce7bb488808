"""A headless Chromium that drives examples/browser, and the server that it talks to; for tests."""

from __future__ import annotations

import json
import os
import queue
import shutil
import signal
import subprocess
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "browser"
DRIVE = Path(__file__).with_name("browser_drive.html")
CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "chrome")
# no GPU, no sandbox (containers), nothing that a browser does on its own over a network
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def chromium() -> str:
    """The browser's command."""
    found = next(filter(None, map(shutil.which, CHROMIUM)), None)
    return found or pytest.skip("there is no Chromium; `apt-get install chromium` brings it")


def build(model: Path, site: Path) -> Path:
    """`npm ci` (once) and `npm run build`, as the example's page says."""
    npm = shutil.which("npm") or pytest.skip("there is no npm; `apt-get install npm` brings it")
    locked = json.loads((EXAMPLE / "package-lock.json").read_text())["packages"]["node_modules/onnxruntime-web"]
    installed = EXAMPLE / "node_modules" / "onnxruntime-web" / "package.json"
    if not installed.is_file() or json.loads(installed.read_text())["version"] != locked["version"]:
        done = subprocess.run([npm, "ci"], cwd=EXAMPLE, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"`npm ci` in {EXAMPLE} failed, as it does without a network: {done.stderr.strip()[-300:]}")
    done = subprocess.run(
        [npm, "run", "build", "--", str(model), str(site)], cwd=EXAMPLE, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return site


class _Handler(SimpleHTTPRequestHandler):
    """A static server of the site, as `python -m http.server` is, and of the files to drop."""

    def __init__(self, *args: Any, files: dict[str, bytes], results: queue.Queue[Any], **options: Any) -> None:
        self.files = files
        self.results = results
        super().__init__(*args, **options)

    def do_GET(self) -> None:
        if self.path == "/drive.html":
            self._send(DRIVE.read_bytes(), "text/html; charset=utf-8")
        elif self.path == "/list.json":
            self._send(json.dumps(list(self.files)).encode(), "application/json")
        elif self.path.startswith("/file/"):
            self._send(self.files[unquote(self.path.removeprefix("/file/"))], "application/octet-stream")
        else:
            super().do_GET()

    def do_POST(self) -> None:
        self.results.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self._send(b"", "text/plain")

    def _send(self, data: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def drive(site: Path, files: dict[str, bytes], profile: Path, *, seconds: float = 120) -> dict[str, Any]:
    """Drop `files` (name -> bytes) on the page one by one; returns its `state`, `about` and `answers`."""
    results: queue.Queue[Any] = queue.Queue()
    handler = partial(_Handler, directory=str(site), files=files, results=results)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        command = [chromium(), *FLAGS, "--remote-debugging-port=0", f"--user-data-dir={profile}"]
        log = profile.with_suffix(".log")
        with log.open("wb") as out:
            browser = subprocess.Popen(
                [*command, f"http://127.0.0.1:{server.server_port}/drive.html"],
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
            try:
                found: dict[str, Any] = results.get(timeout=seconds)
            except queue.Empty:
                pytest.fail(f"Chromium gave no answer in {seconds} s:\n{log.read_text(errors='replace')[-2000:]}")
            finally:
                os.killpg(browser.pid, signal.SIGKILL)
                browser.wait()
                server.shutdown()
    return found
