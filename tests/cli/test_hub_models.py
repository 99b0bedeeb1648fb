"""Models named by hub id: a hub of our own on this machine, with a config first and the weights on demand."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from tests.cli.conftest import Ran, pack_command

HUB_ID, COMMIT = "somebody/tiny-llama", "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Serves one folder as a repository, in the few answers that huggingface_hub asks for. `asked` are the files' paths."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.asked: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.answer(with_body=False)

            def do_GET(self) -> None:
                self.answer(with_body=True)

            def answer(self, *, with_body: bool) -> None:
                path = self.path.split("?")[0]
                if path.startswith("/api/models/"):
                    body = json.dumps(hub.listing(path)).encode()
                    self.reply(200, body, {"Content-Type": "application/json"}, with_body)
                    return
                file = hub.folder / path.rpartition("/")[2]
                if not path.startswith(f"/{HUB_ID}/resolve/") or not file.is_file():
                    self.reply(404, b"", {"X-Error-Code": "EntryNotFound"}, with_body)
                    return
                if with_body:
                    hub.asked.append(file.name)
                body = file.read_bytes()
                etag = hashlib.sha256(body).hexdigest()
                self.reply(200, body, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}, with_body)

            def reply(self, code: int, body: bytes, headers: dict[str, str], with_body: bool) -> None:
                self.send_response(code)
                for name, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                if with_body:
                    self.wfile.write(body)

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def listing(self, path: str) -> object:
        files = [file for file in sorted(self.folder.iterdir()) if file.is_file()]
        if "/tree/" in path:
            return [
                {
                    "type": "file",
                    "path": f.name,
                    "size": f.stat().st_size,
                    "oid": hashlib.sha1(f.name.encode()).hexdigest(),
                }
                for f in files
            ]
        return {"id": HUB_ID, "sha": COMMIT, "private": False, "siblings": [{"rfilename": f.name} for f in files]}


@pytest.fixture
def hub(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    import huggingface_hub.constants as constants

    served = Hub(source)
    endpoint = f"http://127.0.0.1:{served.server.server_port}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    yield served
    served.server.shutdown()
    served.server.server_close()


def test_a_plan_fetches_the_config_alone(cli: Callable[..., Ran], hub: Hub) -> None:
    ran = cli("plan", HUB_ID, "--budget", "8GiB", "--context", "24", "--json")
    assert ran.code == 0 and ran.json["plan"]["model"]["name"] == HUB_ID
    assert hub.asked == ["config.json"]


def test_why_the_hub_gives_nothing(cli: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Said in words, without a class name, and without advice on a variable that nobody set."""
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    cli("plan", HUB_ID, "--budget", "8GiB").refuses("no folder", "HF_HUB_OFFLINE forbids", "unset HF_HUB_OFFLINE")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    unreachable = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", unreachable)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    ran = cli("plan", HUB_ID, "--budget", "8GiB")
    assert ran.code == 2 and "can't be reached; go online" in ran.err and "Error" not in ran.err, ran.err


def test_pack_fetches_the_weights_once_and_packs_them(
    cli: Callable[..., Ran], hub: Hub, calibration_text: Path, tmp_path: Path
) -> None:
    ran = cli(*pack_command(HUB_ID, tmp_path / "packed", calibration_text, "--json", budget="1GiB"))  # type: ignore[arg-type]
    assert ran.code == 0, ran.err
    assert ran.json["plan"]["model"]["source"] == f"{HUB_ID}@{COMMIT}"
    assert hub.asked.count("model.safetensors") == 1
    assert (tmp_path / "packed" / "tokenizer.json").is_file()


def test_nothing_is_fetched_for_a_pack_that_can_not_fit(
    cli: Callable[..., Ran], hub: Hub, calibration_text: Path, tmp_path: Path
) -> None:
    ran = cli(*pack_command(HUB_ID, tmp_path / "packed", calibration_text, budget="1KiB"))  # type: ignore[arg-type]
    ran.refuses("short", "would do", code=1)
    assert hub.asked == ["config.json"]
    assert not (tmp_path / "packed").exists() and not (tmp_path / "packed.partial").exists()


def test_a_repository_without_weights_is_told(
    cli: Callable[..., Ran], hub: Hub, source: Path, calibration_text: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((source / "config.json").read_bytes())
    hub.folder = bare
    ran = cli(*pack_command(HUB_ID, tmp_path / "packed", calibration_text, budget="1GiB"))  # type: ignore[arg-type]
    ran.refuses("no safetensors", code=1)
