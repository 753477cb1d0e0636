"""Adapters pushed to a hub and loaded from it: the real library, and a server here that answers as the hub does."""

import base64
import hashlib
import io
import json
import os
import re
import sys
import threading
from contextlib import redirect_stderr, redirect_stdout
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from distributed import run_apart
from toy import adapted_toy

from lavis_aurora import AuroraError, load_adapter, save_adapter
from lavis_aurora.adapters.card import push_adapter
from lavis_aurora.cli import inspect, truncate
from lavis_aurora_cli import main

pytest.importorskip("huggingface_hub")


class Hub(BaseHTTPRequestHandler):
    """One repository, every commit of which is kept.

    Attributes:
        commits: files by hash, in order.
        seen: method and path of each request.
    """

    commits: dict[str, dict[str, bytes]]
    seen: list[str]

    def reply(self, value: object, status: int = 200, headers: tuple = ()) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for key, text in (*headers, ("Content-Length", str(len(body)))):
            self.send_header(key, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self) -> None:
        self.seen.append(f"POST {self.path}")
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            self.reply({"url": f"http://{self.headers['Host']}/user/toy", "name": "user/toy"})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            modes = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]
            self.reply({"files": modes})
        elif "/commit/" in self.path:
            rows = [json.loads(line) for line in body.splitlines()]
            files = {r["value"]["path"]: base64.b64decode(r["value"]["content"]) for r in rows if r["key"] == "file"}
            commit = hashlib.sha1(body).hexdigest()
            self.commits[commit] = files
            self.reply({"commitUrl": f"http://{self.headers['Host']}/user/toy/commit/{commit}", "commitOid": commit})
        else:
            self.reply({})

    def do_GET(self) -> None:
        self.seen.append(f"{self.command} {self.path}")
        parts = self.path.strip("/").split("/")
        if "user/toy" not in self.path or (parts[0] == "api" and "revision" not in parts):
            self.reply({"error": "Repository not found"}, 404, (("X-Error-Code", "RepoNotFound"),))
            return
        revision = parts[parts.index("revision" if parts[0] == "api" else "resolve") + 1]
        commit = revision if revision in self.commits else list(self.commits)[-1]
        files = {**self.commits[commit], "evil.py": b"raise SystemExit", "pytorch_model.bin": b"pickle"}
        if parts[0] == "api":
            self.reply({"id": "user/toy", "sha": commit, "siblings": [{"rfilename": name} for name in files]})
            return
        content = files[parts[-1]]
        etag = ("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.reply(content, 200, (etag, ("X-Repo-Commit", commit)))

    do_HEAD = do_GET

    def log_message(self, *_args: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The fake hub, to which the environment of a process that is started points."""
    handler = type("OneHub", (Hub,), {"commits": {}, "seen": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    yield handler
    server.shutdown()
    server.server_close()


def push_and_load(rank: int, folder: Path) -> str:
    """What a program says that pushes two adapters and loads them; the library reads its endpoint at import."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]:
        del sys.modules[name]
    (folder / "cwd").mkdir()
    os.chdir(folder / "cwd")
    with redirect_stdout(io.StringIO()) as said, redirect_stderr(said):
        with redirect_stdout(io.StringIO()) as out:
            main(["push", str(folder / "toy1"), "user/toy", "--private"])
        first = re.search("user/toy@([0-9a-f]+) names this adapter", out.getvalue())[1]
        main(["push", str(folder / "toy2"), "user/toy"])
        for source, seed in (("user/toy", 2), (f"user/toy@{first}", 1), ("user/toy", 2)):
            model = adapted_toy(update_seed=9)
            load_adapter(model, source)
            expected = adapted_toy(update_seed=seed).mode_approx.sets["default"].state_dict()
            for key, value in model.mode_approx.sets["default"].state_dict().items():
                assert torch.equal(value, expected[key])
        print(inspect("user/toy"))
        with pytest.raises(AuroraError, match="--out: name the folder to write; user/toy is of the hub"):
            truncate("user/toy", 2)
        print(truncate("user/toy", 2, "cut"))
        for source, words in (
            ("user/none", "is no folder here, and the hub gives no such repository ("),
            ("user/none@v1", "no such repository at v1"),
        ):
            with pytest.raises(AuroraError, match=re.escape(words)) as refused:
                load_adapter(model, source)
            assert "\n" not in str(refused.value)
    return said.getvalue()


def test_what_is_pushed_is_loaded_at_the_commit_that_is_named(hub, tmp_path):
    """Two commits; the first is still to be had by its hash, and nothing but the adapter's two files is fetched."""
    for seed in (1, 2):
        save_adapter(adapted_toy(update_seed=seed), tmp_path / f"toy{seed}")
    (tmp_path / "toy1" / "secret.txt").write_text("mine")
    [said] = run_apart(1, push_and_load, tmp_path)
    first, second = hub.commits
    assert f"user/toy@{second} names this adapter" in said
    files = hub.commits[first]
    assert sorted(files) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert files["adapter_model.safetensors"] == (tmp_path / "toy1" / "adapter_model.safetensors").read_bytes()
    card = files["README.md"].decode()
    assert "library_name: lavis_aurora" in card and "load_adapter(model, 'user/toy')" in card
    assert "| targets | qkv: query, key, value; query, key |" in card
    assert said.count(f"user/toy: fetched from the hub; name user/toy@{second} to have this very one again") == 1
    assert "any nn.Module" in said and "cut: " in said
    names = {path.rpartition("/")[2] for path in hub.seen if "/resolve/" in path}
    assert names == {"adapter_config.json", "adapter_model.safetensors"}


@pytest.fixture
def no_hub(monkeypatch):
    """Fails where anything is fetched."""
    import huggingface_hub

    def fetched(*args: object, **_kwargs: object) -> None:
        raise AssertionError(f"fetched {args}")

    for name in ("snapshot_download", "create_repo", "create_commit"):
        monkeypatch.setattr(huggingface_hub, name, fetched)


def test_nothing_is_fetched_unasked(no_hub, tmp_path, monkeypatch):
    """A folder here, a path, and a path with a typing error in a folder that is there."""
    monkeypatch.chdir(tmp_path)
    model = adapted_toy()
    save_adapter(model, "user/toy")
    load_adapter(adapted_toy(), "user/toy")
    for source in ("user/typo", Path("nobody/typo"), "./nobody/typo", "nobody/run/adapter_best", "../typo", "typo"):
        with pytest.raises(AuroraError, match="typo is no adapter folder|adapter_best is no adapter folder"):
            load_adapter(model, source)
    with pytest.raises(AssertionError, match="fetched .*nobody/toy"):
        load_adapter(model, "nobody/toy")


def test_a_folder_or_name_that_cannot_be_is_not_pushed(no_hub, tmp_path):
    with pytest.raises(AuroraError, match="no adapter folder"):
        push_adapter(tmp_path, "user/toy")
    save_adapter(adapted_toy(), tmp_path / "toy")
    for name in ("toy", "user/toy@main", "a/b/c"):
        with pytest.raises(AuroraError, match="is no name of a repository; write USER/NAME"):
            push_adapter(tmp_path / "toy", name)
    # A pushed adapter is one that is here: what the hub has is not fetched to be pushed.
    with pytest.raises(AuroraError, match="no adapter folder"):
        push_adapter("nobody/toy", "user/toy")


def test_without_the_library_that_is_said(tmp_path, monkeypatch):
    save_adapter(adapted_toy(), tmp_path / "toy")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(AuroraError, match="to push to the hub needs huggingface_hub: pip install huggingface_hub"):
        push_adapter(tmp_path / "toy", "user/toy")
    with pytest.raises(AuroraError, match="nobody/other is no folder here, and to fetch it from the hub needs"):
        load_adapter(adapted_toy(), "nobody/other")
