"""Models and adapters of the Hugging Face hub, from a hub on this machine."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from support.adapters import adapted, write_adapter
from support.cli import run
from support.gguf_files import write_tiny_gguf
from support.tiny_models import HEADS, tiny

from core_rerank_integrations import CoReReranker
from core_rerank_integrations.errors import InvalidInputError, ModelError
from core_rerank_integrations.models.adapter import with_adapter
from core_rerank_integrations.models.local_model import LocalModel
from core_rerank_integrations.models.resolve import resolve

TOKEN = "hf_secret"
LAYERS = 4
PATH = re.compile(r"(?:/api/models)?/(owner/\w+)/(revision|tree|resolve)/(\w+)/?([^?]*)")


def commit_of(revision: str) -> str:
    return hashlib.sha1(revision.encode()).hexdigest()


@dataclass
class Hub:
    """A hub with private repositories, which are readable with `TOKEN`.

    Attributes:
        folder: The files of ``owner/model`` at ``main`` are in its folder ``owner/model/main``.
        server: The HTTP server.
        requests: The requests for repositories.
        broken: The kind of requests that the server fails to answer: ``revision`` or ``tree``.
        gated: Whether the token does not suffice for the files.
    """

    folder: Path
    server: ThreadingHTTPServer
    requests: list[str] = field(default_factory=list)
    broken: str | None = None
    gated: bool = False

    @property
    def downloads(self) -> list[str]:
        """Names of the files that were downloaded."""
        gets = (request for request in self.requests if re.match("GET /owner/.*/resolve/", request))
        return sorted(request.rpartition("/")[2] for request in gets)

    def shut_down(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_GET(self) -> None:
        status, headers, content = self.answer()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def do_HEAD(self) -> None:
        self.do_GET()

    def answer(self) -> tuple[int, dict[str, str], bytes]:
        """Return status, headers and content, as the Hugging Face hub does."""
        match = PATH.fullmatch(self.path.partition("?")[0])
        if match is None:  # The library asks for more than repositories.
            return 404, {}, b""
        self.hub.requests.append(f"{self.command} {match[0]}")
        hub_id, kind, revision, name = match.groups()
        if self.hub.broken == kind:
            return 500, {}, b""
        if self.headers["Authorization"] is None:
            return 401, {"X-Error-Code": "RepoNotFound"}, b""
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            return 401, {"X-Error-Message": "Invalid credentials in Authorization header"}, b""
        if not (self.hub.folder / hub_id).is_dir():
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        for folder in (self.hub.folder / hub_id).iterdir():
            commit = commit_of(folder.name)
            if revision in (folder.name, commit):
                break
        else:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        paths = sorted(folder.iterdir())
        if kind == "revision":
            siblings = [{"rfilename": path.name} for path in paths]
            info = {"id": hub_id, "sha": commit, "siblings": siblings}
            return 200, {}, json.dumps(info).encode()
        if kind == "tree":
            files = [
                {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": "0" * 40}
                for path in paths
            ]
            return 200, {}, json.dumps(files).encode()
        if self.hub.gated:
            return 403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Ask for access"}, b""
        content = (folder / name).read_bytes()
        tag = hashlib.sha256(content).hexdigest()
        return 200, {"ETag": f'"{tag}"', "X-Repo-Commit": commit}, content

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    class Own(Handler):
        pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Own) as server:
        Own.hub = Hub(tmp_path / "served", server)
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        # The library has read the environment variables HF_ENDPOINT and HF_HUB_CACHE already.
        constants = "huggingface_hub.constants"
        url = f"http://127.0.0.1:{server.server_port}"
        template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(f"{constants}.ENDPOINT", url)
        monkeypatch.setattr(f"{constants}.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(f"{constants}.HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(f"{constants}.HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_other")
        yield Own.hub
        server.shutdown()


@pytest.fixture
def llama(tmp_path: Path) -> LocalModel:
    return tiny(tmp_path / "base", "llama")


@pytest.fixture
def served(hub: Hub, llama: LocalModel) -> LocalModel:
    """Return the model that is ``owner/model`` on the hub."""
    for revision in ("main", "v2"):
        shutil.copytree(llama.path, hub.folder / "owner/model" / revision)
    return llama


@pytest.mark.usefixtures("cache")
def test_a_model_of_the_hub_is_downloaded_and_ranks(hub: Hub, tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf", adds_bos=False)
    local = resolve(tmp_path / "tiny.gguf").path
    config = json.loads((local / "config.json").read_text())
    (local / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1024}))
    served = hub.folder / "owner/model/v2"
    shutil.copytree(local, served)
    (served / "pytorch_model.bin").write_bytes(b"not needed")

    def scores(model: str | Path, revision: str | None = None) -> list[float]:
        with CoReReranker(
            model,
            [(0, 1)],
            backend="transformers",
            dtype="float32",
            template="plain",
            revision=revision,
            token=TOKEN,
        ) as reranker:
            return reranker.score("which gulls?", ["Grey gulls.", "Bread and flour."])

    assert scores("owner/model", "v2") == pytest.approx(scores(local), abs=1e-6)
    assert hub.requests[0] == "GET /api/models/owner/model/revision/v2"
    assert hub.downloads == sorted(path.name for path in local.iterdir())
    files = [request for request in hub.requests if "/resolve/" in request]
    assert all(f"/owner/model/resolve/{commit_of('v2')}/" in request for request in files)


def test_a_downloaded_model_is_not_asked_for_again(
    hub: Hub, served: LocalModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    model = resolve("owner/model")
    assert model.path.name == commit_of("main")
    assert model.weights_checksum() == served.weights_checksum()
    assert "model.safetensors" in hub.downloads
    hub.requests.clear()
    assert resolve("owner/model") == model
    assert resolve("owner/model", revision=commit_of("main")) == model
    assert hub.requests == []

    weights = model.path / "model.safetensors"
    weights.resolve().unlink()
    weights.unlink(missing_ok=True)
    assert resolve("owner/model") == model
    assert hub.downloads == ["model.safetensors"], "other files are there already"


@pytest.mark.usefixtures("served")
@pytest.mark.parametrize(
    ("hub_id", "revision", "token", "message"),
    [
        ("owner/model", "v2", None, r"revision/v2 answered 401 \(Invalid cred.*set token= or HF_T"),
        ("owner/model", "v2", "hf_no", r"answered 401 \(Invalid cred.*set token= or HF_TOKEN"),
        ("owner/other", None, TOKEN, r"revision/main answered 404\. Check the id"),
        ("owner/model", "v3", TOKEN, r"revision/v3 answered 404\. Check the revision"),
        ("owner/model", "0" * 40, TOKEN, r"answered 404\. Check the revision"),
    ],
)
def test_what_cannot_be_read_is_named_with_the_remedy(
    hub: Hub, hub_id: str, revision: str | None, token: str | None, message: str
) -> None:
    with pytest.raises(ModelError, match=f"cannot get {hub_id} .*{message}") as error:
        resolve(hub_id, revision=revision, token=token)
    assert len(hub.requests) == 1
    assert "hf_" not in str(error.value)


@pytest.mark.usefixtures("served")
def test_a_gated_model_is_named_with_the_remedy(hub: Hub) -> None:
    hub.gated = True
    message = r"cannot get owner/model .* answered 403 \(Ask for access\)\. .*gated, set token="
    with pytest.raises(ModelError, match=message):
        resolve("owner/model", token=TOKEN)
    hub.gated = False
    assert resolve("owner/model", token=TOKEN).path.name == commit_of("main")


@pytest.mark.usefixtures("served")
@pytest.mark.parametrize("broken", ["revision", "tree"])
def test_a_broken_hub_is_named_with_the_remedy(hub: Hub, broken: str) -> None:
    hub.broken = broken
    message = rf"cannot get owner/model .*/{broken}/.* answered 500\. Try again later"
    with pytest.raises(ModelError, match=message):
        resolve("owner/model", token=TOKEN)


@pytest.mark.usefixtures("served")
def test_without_a_connection_only_downloaded_models_are_found(hub: Hub) -> None:
    model = resolve("owner/model", token=TOKEN)
    hub.shut_down()
    assert resolve("owner/model") == model
    assert resolve("owner/model", local_files_only=True) == model
    for revision in ("v2", commit_of("v2")):
        message = (
            r"cannot get owner/model .*: http://127\.0\.0\.1:\d+ cannot be reached "
            r"\(ConnectError: .*\)\. Check the connection, or name a folder"
        )
        with pytest.raises(ModelError, match=message):
            resolve("owner/model", revision=revision)


@pytest.mark.usefixtures("served")
@pytest.mark.parametrize("token", [f"{TOKEN}\n", f"{TOKEN}é"])
def test_a_token_that_cannot_be_sent_is_refused_and_not_shown(hub: Hub, token: str) -> None:
    with pytest.raises(InvalidInputError, match=r"remove line breaks .* HF_TOKEN") as error:
        resolve("owner/model", token=token)
    assert TOKEN not in str(error.value)
    assert hub.requests == []


@pytest.mark.usefixtures("cache")
def test_an_adapter_of_the_hub_is_downloaded_once(
    hub: Hub, llama: LocalModel, tmp_path: Path
) -> None:
    folder = tmp_path / "adapter"
    write_adapter(folder, llama)
    for revision in ("main", "v2"):
        shutil.copytree(folder, hub.folder / "owner/adapter" / revision)
    (hub.folder / "owner/adapter/v2/training_args.bin").write_bytes(b"not needed")
    pinned = adapted(HEADS, Path("owner/adapter@v2"), llama, LAYERS)
    with pytest.raises(ModelError, match=r"cannot get owner/adapter .*no folder with an adapter: "):
        with_adapter(llama, pinned, local_files_only=True)
    assert hub.requests == []
    merged = with_adapter(llama, pinned, token=TOKEN)
    assert hub.requests[0] == "GET /api/models/owner/adapter/revision/v2"
    assert hub.downloads == ["adapter_config.json", "adapter_model.safetensors"]
    assert merged == with_adapter(llama, adapted(HEADS, folder, llama, LAYERS))
    assert merged.config().num_hidden_layers == LAYERS
    hub.requests.clear()
    assert with_adapter(llama, pinned) == merged
    assert hub.requests == []
    with_adapter(llama, adapted(HEADS, Path("owner/adapter"), llama, LAYERS), token=TOKEN)
    assert hub.requests[0] == "GET /api/models/owner/adapter/revision/main"


def test_an_adapter_that_cannot_be_read_is_named_with_the_remedy(
    hub: Hub, llama: LocalModel, cache: Path
) -> None:
    write_adapter(hub.folder / "owner/adapter/main", llama)
    message = r"cannot get owner/adapter .*no folder with an adapter: .*answered 401.*set token="
    with pytest.raises(ModelError, match=message):
        with_adapter(llama, adapted(HEADS, Path("owner/adapter"), llama, LAYERS))
    assert not cache.exists()


def test_a_repository_without_the_files_is_refused(hub: Hub, served: LocalModel) -> None:
    (hub.folder / "owner/model/main/model.safetensors").rename(
        hub.folder / "owner/model/main/pytorch_model.bin"
    )
    with pytest.raises(ModelError, match=r"owner/model has no config\.json with complete safet"):
        resolve("owner/model", token=TOKEN)
    heads = adapted(HEADS, Path("owner/model"), served, LAYERS)
    with pytest.raises(ModelError, match=r"owner/model has no adapter_config\.json"):
        with_adapter(served, heads, token=TOKEN)


def test_fetching_a_model_merges_the_adapter_of_its_default_heads(
    hub: Hub, served: LocalModel, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_adapter(hub.folder / "owner/adapter/v2", served)
    heads = adapted(HEADS, Path("owner/adapter@v2"), served, LAYERS)
    shipped = {"tuned": heads.model_copy(update={"model": "owner/model", "default": True})}
    monkeypatch.setattr("core_rerank_integrations.heads.shipped.shipped_head_sets", lambda: shipped)
    assert run("models", "fetch", str(served.path)).strip() == str(served.path)
    assert not cache.exists(), "a folder has no default heads"
    printed = run("models", "fetch", "owner/model", "--revision", "v2", "--token", TOKEN)
    assert Path(printed.strip()) == resolve("owner/model", revision="v2").path
    assert {"adapter_model.safetensors", "model.safetensors"} <= set(hub.downloads)
    (merged,) = cache.glob("merged-*/config.json")
    assert json.loads(merged.read_text())["num_hidden_layers"] == LAYERS
