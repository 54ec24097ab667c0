"""Adapters of head sets: the merged folder is the model with its changed weights."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.adapters import ALPHA, RANK, adapted, write_adapter
from support.head_sets import CALIBRATED
from support.tiny_models import HEADS, assert_close, expected_masses, groups, masses, tiny
from transformers import AutoModel, AutoModelForCausalLM

from core_rerank_integrations import CoReReranker, HeadSet
from core_rerank_integrations.backends.loading import load_backend
from core_rerank_integrations.backends.openvino.backend import OpenVINOBackend
from core_rerank_integrations.backends.transformers.backend import TransformersBackend
from core_rerank_integrations.errors import (
    HeadSetError,
    InvalidInputError,
    ModelError,
    StorageError,
    UnsupportedModelError,
)
from core_rerank_integrations.models.adapter import with_adapter
from core_rerank_integrations.models.local_model import LocalModel
from core_rerank_integrations.settings import RerankerSettings

LAYERS = 4
LAYER = re.compile(r"\.layers\.(\d+)\.")


def in_dtype(model: LocalModel, dtype: torch.dtype, shard: str = "1GB") -> LocalModel:
    """Save a model again, in another precision or in several files."""
    loaded = AutoModelForCausalLM.from_pretrained(model.path, dtype=dtype)
    (model.path / "model.safetensors").unlink()
    loaded.save_pretrained(model.path, max_shard_size=shard)
    return model


def changed_by_hand(
    model: LocalModel, products: dict[str, np.ndarray], scale: float, folder: Path
) -> LocalModel:
    """Write the whole model with the product of each pair, by PyTorch."""
    shutil.copytree(model.path, folder)
    weights = load_file(folder / "model.safetensors")
    for name, product in products.items():
        full = weights[name].float() + scale * torch.from_numpy(product)
        weights[name] = full.to(weights[name].dtype)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return LocalModel(folder, None)


@pytest.fixture
def llama(tmp_path: Path) -> LocalModel:
    return tiny(tmp_path / "base", "llama")


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("settings", "scale"),
    [({}, ALPHA / RANK), ({"use_rslora": True}, ALPHA / RANK**0.5), ({"lora_alpha": 0.5}, 0.25)],
)
def test_merged_weights_are_those_of_the_base_plus_the_scaled_product(
    dtype: torch.dtype, settings: dict[str, Any], scale: float, llama: LocalModel, tmp_path: Path
) -> None:
    in_dtype(llama, dtype)
    products = write_adapter(tmp_path / "adapter", llama, **settings)
    merged = with_adapter(llama, adapted(HEADS, tmp_path / "adapter", llama, LAYERS))
    by_hand = changed_by_hand(llama, products, scale, tmp_path / "by-hand")
    found = load_file(merged.path / "model.safetensors")
    expected = {
        name: tensor
        for name, tensor in load_file(by_hand.path / "model.safetensors").items()
        if name != "lm_head.weight"
        and not ((layer := LAYER.search(name)) and int(layer[1]) >= LAYERS)
    }
    assert found.keys() == expected.keys()
    changed = 0
    for name, tensor in expected.items():
        assert found[name].dtype == dtype
        # The sum may be rounded to the neighbour where the products differ in their last bit.
        torch.testing.assert_close(found[name], tensor, rtol=torch.finfo(dtype).eps, atol=1e-7)
        changed += not torch.equal(tensor, load_file(llama.path / "model.safetensors")[name])
    assert changed == LAYERS * 7
    assert merged.config().num_hidden_layers == LAYERS
    assert merged.model_id == llama.model_id
    assert llama.config().num_hidden_layers == 5


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("family", ["llama", "qwen2-sliding", "phi3", "gemma3"])
def test_attention_is_that_of_the_model_changed_by_hand(family: str, tmp_path: Path) -> None:
    base = tiny(tmp_path / "base", family)
    products = write_adapter(tmp_path / "adapter", base)
    by_hand = changed_by_hand(base, products, ALPHA / RANK, tmp_path / "by-hand")
    expected = expected_masses(by_hand, groups())
    merged = with_adapter(base, adapted(HEADS, tmp_path / "adapter", base, LAYERS))
    assert_close(masses(TransformersBackend(merged, HEADS, dtype="float32"), groups()), expected)
    if family != "phi3":
        found = masses(OpenVINOBackend(merged, HEADS, dtype="float32"), groups())
        assert_close(found, expected, 1e-5)
    unchanged = masses(TransformersBackend(base, HEADS, dtype="float32"), groups())
    assert max(np.abs(a - b).max() for a, b in zip(unchanged, expected, strict=True)) > 1e-3


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForCausalLM])
def test_peft_merges_the_same(auto_class: Any, llama: LocalModel, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    lora = peft.LoraConfig(r=3, lora_alpha=5, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(auto_class.from_pretrained(llama.path), lora)
    model.save_pretrained(tmp_path / "adapter")
    merged = with_adapter(llama, adapted(HEADS, tmp_path / "adapter", llama, LAYERS))
    expected = model.merge_and_unload().state_dict()
    for name, tensor in load_file(merged.path / "model.safetensors").items():
        inner = name.removeprefix("model.") if auto_class is AutoModel else name
        torch.testing.assert_close(tensor, expected[inner], rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("cache")
def test_sharded_checkpoints_and_models_without_a_head_merge_alike(
    llama: LocalModel, tmp_path: Path
) -> None:
    write_adapter(tmp_path / "adapter", llama)
    heads = adapted(HEADS, tmp_path / "adapter", llama, LAYERS)
    content = (with_adapter(llama, heads).path / "model.safetensors").read_bytes()
    checksum = llama.weights_checksum()
    in_dtype(llama, torch.float32, shard="20KB")
    assert len(list(llama.path.glob("*.safetensors"))) > 5
    assert llama.weights_checksum() == checksum, "the layout of files does not count"
    sharded = load_file(with_adapter(llama, heads).path / "model.safetensors")
    (tmp_path / "one").write_bytes(content)
    one = load_file(tmp_path / "one")
    assert all(torch.equal(one[name], sharded[name]) for name in one)

    AutoModel.from_pretrained(llama.path).save_pretrained(tmp_path / "inner")
    inner = LocalModel(tmp_path / "inner", None)
    write_adapter(tmp_path / "adapter", inner, module="")
    headless = with_adapter(inner, adapted(HEADS, tmp_path / "adapter", inner, LAYERS))
    assert load_file(headless.path / "model.safetensors").keys() == one.keys()


@pytest.mark.usefixtures("cache")
def test_large_weights_are_sampled_in_every_tensor(
    llama: LocalModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = llama.weights_checksum()
    monkeypatch.setattr("core_rerank_integrations.models.local_model.MAX_HASHED_BYTES", 10_000)
    monkeypatch.setattr("core_rerank_integrations.models.local_model.HASHED_BLOCK", 64)
    sampled = llama.weights_checksum()
    assert sampled != whole
    for name in ("model.norm.weight", "model.layers.4.mlp.up_proj.weight"):
        weights = load_file(llama.path / "model.safetensors")
        weights[name].flatten()[-1] += 1
        save_file(weights, llama.path / "model.safetensors")
        assert llama.weights_checksum() != sampled
        sampled = llama.weights_checksum()


@pytest.mark.usefixtures("cache")
def test_what_changes_the_result_makes_another_folder(llama: LocalModel, tmp_path: Path) -> None:
    (llama.path / "tokenizer.json").write_text("{}")
    write_adapter(tmp_path / "adapter", llama)

    def folder(layers: int = LAYERS) -> Path:
        return with_adapter(llama, adapted(HEADS, tmp_path / "adapter", llama, layers)).path

    first = folder()
    times = {path: path.stat().st_mtime_ns for path in first.iterdir()}
    assert {path.name for path in times} == {
        "config.json",
        "files.json",
        "model.safetensors",
        "tokenizer.json",
    }
    assert folder() == first
    assert times == {path: path.stat().st_mtime_ns for path in first.iterdir()}
    found = {first, folder(5)}
    write_adapter(tmp_path / "adapter", llama, lora_alpha=1)
    found.add(folder())
    write_adapter(tmp_path / "adapter", llama, size=0.2, lora_alpha=1)
    found.add(folder())
    (llama.path / "tokenizer.json").write_text("{ }")
    found.add(folder())
    config = json.loads((llama.path / "config.json").read_text())
    (llama.path / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    found.add(folder())
    in_dtype(llama, torch.bfloat16)
    found.add(folder())
    assert len(found) == 7


def without(folder: Path, name: str) -> None:
    (folder / name).unlink()


def with_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
DAMAGE: list[tuple[Callable[[Path], Any], str]] = [
    (shutil.rmtree, r"cannot read the adapter in .*adapter: .*No such file"),
    (lambda folder: without(folder, "adapter_config.json"), r"adapter_config\.json"),
    (
        lambda folder: without(folder, "adapter_model.safetensors"),
        "adapter_model.safetensors: .*No",
    ),
    (lambda folder: (folder / "adapter_config.json").write_text("{"), "Invalid JSON"),
    (lambda folder: (folder / "adapter_config.json").write_text("[]"), "cannot be merged"),
    (lambda folder: (folder / "adapter_config.json").write_text("{}"), "peft_type: Field required"),
    (
        lambda folder: os.truncate(folder / "adapter_model.safetensors", 999),
        r"adapter_model\.safetensors is damaged",
    ),
    (lambda folder: with_tensors(folder, lambda t: t.pop(Q_PROJ)), "one of the two matrices of"),
    (lambda folder: with_tensors(folder, lambda t: t[Q_PROJ].fill_(float("nan"))), "not finite"),
    (
        lambda folder: with_tensors(folder, lambda t: t.update(x=torch.ones(1))),
        "it holds x, of type F32",
    ),
    (
        lambda folder: with_tensors(folder, lambda t: t.update({Q_PROJ: t[Q_PROJ].int()})),
        "q_proj.lora_A.weight, of type I32",
    ),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE)
def test_damaged_adapters_are_named(
    damage: Callable[[Path], Any], message: str, llama: LocalModel, cache: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "adapter"
    write_adapter(folder, llama)
    damage(folder)
    with pytest.raises(ModelError, match=message) as error:
        with_adapter(llama, adapted(HEADS, folder, llama, LAYERS))
    assert str(folder) in str(error.value)
    assert not cache.exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "IA3"}, r"peft_type: Input should be 'LORA' \('IA3'\)"),
        ({"use_dora": True}, "use_dora is True"),
        ({"bias": "all"}, r"bias: Input should be 'none' \('all'\)"),
        ({"modules_to_save": ["embed_tokens"]}, r"modules_to_save is \['embed_tokens'\]"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is True"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern is {'q_proj': 4}"),
        ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern is"),
        ({"init_lora_weights": "pissa"}, r"init_lora_weights: .* \('pissa'\)"),
        ({"a_setting_of_the_future": 1}, "a_setting_of_the_future is 1"),
        ({"r": 0}, r"r: .* \(0\)"),
        ({"lora_alpha": None}, r"lora_alpha: .* \(None\)"),
    ],
)
def test_adapters_of_other_kinds_are_refused(
    settings: dict[str, Any], message: str, llama: LocalModel, cache: Path, tmp_path: Path
) -> None:
    write_adapter(tmp_path / "adapter", llama, **settings)
    with pytest.raises(ModelError, match=rf"cannot be merged: {message}.*\. Use plain LoRA"):
        with_adapter(llama, adapted(HEADS, tmp_path / "adapter", llama, LAYERS))
    assert not cache.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 64}, r"by matrices of shapes .*, and there its shape is "),
        ({"num_hidden_layers": 4}, r"layers\.4\..* and there is none"),
    ],
)
def test_adapters_of_other_models_are_refused(
    changes: dict[str, int], message: str, llama: LocalModel, cache: Path, tmp_path: Path
) -> None:
    write_adapter(tmp_path / "adapter", llama)
    config = llama.config()
    for name, value in changes.items():
        setattr(config, name, value)
    AutoModel.from_config(config).save_pretrained(tmp_path / "other")
    other = LocalModel(tmp_path / "other", None)
    with pytest.raises(
        HeadSetError, match=f"was trained on another model than .*other: .*{message}"
    ):
        with_adapter(other, adapted(HEADS, tmp_path / "adapter", other, LAYERS))
    write_adapter(tmp_path / "adapter", llama, r=4)
    with pytest.raises(HeadSetError, match=r"another model .* \(rank 4\)"):
        with_adapter(llama, adapted(HEADS, tmp_path / "adapter", llama, LAYERS))
    assert not cache.exists()


def test_quantised_models_are_refused(llama: LocalModel, tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapter", llama)
    heads = adapted(HEADS, tmp_path / "adapter", llama, LAYERS)
    weights = load_file(llama.path / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file(
        weights | {name: weights[name].to(torch.float8_e4m3fn)}, llama.path / "model.safetensors"
    )
    with pytest.raises(UnsupportedModelError, match=r"has the type F8_E4M3, .* not quantised"):
        with_adapter(llama, heads)


def test_other_weights_are_an_error_or_a_warning(
    llama: LocalModel, cache: Path, tmp_path: Path
) -> None:
    """A hub id that the head set names may have several copies, which a folder may not."""
    write_adapter(tmp_path / "adapter", llama)
    heads = adapted(HEADS, tmp_path / "adapter", llama, LAYERS)
    heads = heads.model_copy(update={"model": "owner/model", "model_aliases": ("owner/copy",)})
    in_dtype(llama, torch.bfloat16)
    checksum = llama.weights_checksum()
    for model_id in (None, "owner/other"):
        with pytest.raises(HeadSetError, match=f"other weights .*: use owner/model, .*{checksum}"):
            with_adapter(LocalModel(llama.path, model_id), heads)
    assert not cache.exists()
    for model_id in ("owner/model", "owner/copy"):
        with pytest.warns(UserWarning, match=f"another copy of {model_id} .*{checksum}") as caught:
            merged = with_adapter(LocalModel(llama.path, model_id), heads)
        assert caught[0].filename == __file__
        assert merged.model_id == model_id


def test_an_engine_that_generates_keeps_its_weights(llama: LocalModel, tmp_path: Path) -> None:
    heads = adapted(HEADS, tmp_path / "adapter", llama, LAYERS)
    model = LocalModel(llama.path, "HuggingFaceTB/SmolLM2-135M-Instruct")
    with pytest.raises(InvalidInputError, match=r"backend='vllm', .* \(shipped .*core-smollm2"):
        load_backend("vllm-shared", RerankerSettings(), model, heads)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such limits")
def test_a_full_disk_leaves_nothing(llama: LocalModel, cache: Path, tmp_path: Path) -> None:
    import resource

    write_adapter(tmp_path / "adapter", llama)
    heads = adapted(HEADS, tmp_path / "adapter", llama, LAYERS)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(
            StorageError, match=r"cannot store .*merged-.*CORE_RERANK_CACHE"
        ) as error:
            with_adapter(llama, heads)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.__cause__.errno == errno.EFBIG
    assert [path.suffix for path in cache.iterdir()] == [".lock"]
    assert with_adapter(llama, heads).path.exists()


def test_an_interrupted_merge_is_made_again(
    llama: LocalModel, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_adapter(tmp_path / "adapter", llama)
    heads = adapted(HEADS, tmp_path / "adapter", llama, LAYERS)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("core_rerank_integrations.models.adapter.from_float32", interrupted)
        with pytest.raises(KeyboardInterrupt):
            with_adapter(llama, heads)
    assert [path.suffix for path in cache.iterdir()] == [".lock"]
    merged = with_adapter(llama, heads)
    content = (merged.path / "model.safetensors").read_bytes()
    os.truncate(merged.path / "model.safetensors", 1000)
    assert with_adapter(llama, heads) == merged
    assert (merged.path / "model.safetensors").read_bytes() == content


def test_several_loads_at_once_merge_once(
    llama: LocalModel, cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_adapter(tmp_path / "adapter", llama)
    heads = adapted(HEADS, tmp_path / "adapter", llama, LAYERS)
    with caplog.at_level("INFO"), ThreadPoolExecutor(4) as executor:
        (merged,) = set(executor.map(with_adapter, [llama] * 4, [heads] * 4))
    assert caplog.text.count("Merging the adapter") == 1
    assert [path for path in cache.iterdir() if path.suffix != ".lock"] == [merged.path]


@pytest.mark.usefixtures("cache")
def test_a_reranker_ranks_with_the_adapter(smollm2: LocalModel, tmp_path: Path) -> None:
    """The scores are those of a folder whose weights were changed by hand."""
    products = write_adapter(tmp_path / "adapter", smollm2, size=0.05)
    heads = HeadSet.from_pairs([(0, 3), (2, 1)], template="chatml", scoring=CALIBRATED.scoring)
    by_hand = changed_by_hand(smollm2, products, ALPHA / RANK, tmp_path / "by-hand")
    texts = ["Gulls are birds of the sea.", "Bread is made of flour and water."]

    def scores(model: Path, heads: HeadSet, backend: str) -> list[float]:
        with CoReReranker(model, heads, backend=backend, dtype="float32") as reranker:
            return reranker.score("which birds live at the sea?", texts)

    expected = scores(by_hand.path, heads, "transformers")
    tuned = adapted(heads, tmp_path / "adapter", smollm2, 3)
    for backend in ("transformers", "openvino"):
        assert scores(smollm2.path, tuned, backend) == pytest.approx(expected, abs=1e-4)
    assert scores(smollm2.path, heads, "transformers") != pytest.approx(expected, abs=1e-4)
