from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from support import tiny_models
from support.cli import failed, run
from transformers import AutoModel, LlamaConfig

from core_rerank_integrations import CoReReranker
from core_rerank_integrations.backends.transformers.backend import TransformersBackend
from core_rerank_integrations.backends.transformers.packing import ATTENTION_NAME
from core_rerank_integrations.errors import InvalidInputError, StorageError
from core_rerank_integrations.heads.head_set import HeadSet
from core_rerank_integrations.method.list_scores import WindowAttention
from core_rerank_integrations.method.prompt import SharedPrefix, Span
from core_rerank_integrations.method.windows import Window
from core_rerank_integrations.models.adapter import ADAPTER_FILES
from core_rerank_integrations.models.local_model import LocalModel, model_shape
from core_rerank_integrations.research.options import TuneOptions
from core_rerank_integrations.research.sources import JudgedRun, WeightedRun, draw_samples
from core_rerank_integrations.research.tuning import training, tune
from core_rerank_integrations.research.tuning.lists import Mixture, TuningList, tuning_lists
from core_rerank_integrations.research.tuning.low_rank import fuse_adapters
from core_rerank_integrations.research.tuning.ranker import Ranker
from core_rerank_integrations.research.tuning.reading import calibrated_masses
from core_rerank_integrations.research.tuning.tune import tune_heads

LAYERS = 4


def windows() -> list[Window]:
    """Return prompts of one document that begin alike, of several lengths."""
    draw = np.random.default_rng(0)

    def tokens(count: int) -> np.ndarray[Any, Any]:
        return draw.integers(3, tiny_models.VOCABULARY, count)

    first, baseline = tokens(6), tokens(3)
    found = []
    for document, instruction, question in ((20, 4, 7), (5, 4, 9), (33, 0, 5), (9, 4, 1)):
        ids = np.concatenate((first, tokens(document), tokens(instruction)))
        prefix = SharedPrefix(
            ids, instruction, (Span(6, 6 + document + bool(instruction)),), (), baseline
        )
        found.append(Window([0], [Span(0, 1)], [""], prefix, tokens(question)))
    return found


@pytest.mark.parametrize("family", ["llama", "mistral-sliding", "qwen3", "granite", "gemma3"])
def test_masses_equal_those_of_the_backend(tmp_path: Path, family: str) -> None:
    model = tiny_models.tiny(tmp_path, family)
    heads = HeadSet.every(model_shape(model.config()), LAYERS - 1)
    backend = TransformersBackend(model, heads, dtype="float32", device="cpu")
    prompts = windows()
    groups = [tiny_models.PromptGroup(prompt.prefix, [prompt.question]) for prompt in prompts]
    expected = [
        WindowAttention(prompt, mass.questions[0], mass.baseline).scores(drop_outliers=False)[:, 0]
        for prompt, mass in zip(prompts, backend.attention_mass(groups, None), strict=True)
    ]
    config = model.config()
    config.num_hidden_layers = LAYERS
    tuned = AutoModel.from_pretrained(
        model.path, config=config, dtype=torch.float32, attn_implementation=ATTENTION_NAME
    )
    computed = calibrated_masses(tuned, prompts, LAYERS)
    np.testing.assert_allclose(computed.detach().numpy(), np.stack(expected), atol=1e-5)


def test_masses_have_gradients_up_to_the_first_layer(tmp_path: Path) -> None:
    model = tiny_models.tiny(tmp_path, "llama")
    config = model.config()
    config.num_hidden_layers = 2
    tuned = AutoModel.from_pretrained(
        model.path, config=config, dtype=torch.float32, attn_implementation=ATTENTION_NAME
    )
    calibrated_masses(tuned, windows(), 2).square().sum().backward()
    assert all(
        tuned.layers[0].get_parameter(name).grad.abs().max() > 0
        for name in ("self_attn.k_proj.weight", "mlp.down_proj.weight")
    )


@pytest.mark.parametrize("bias", [False, True])
def test_fused_products_equal_those_of_peft(bias: bool) -> None:
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(6, 5, bias=bias), torch.nn.Linear(5, 4, bias=bias))
    model = get_peft_model(
        base, LoraConfig(r=2, lora_alpha=6, target_modules="all-linear")
    ).double()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        torch.nn.init.normal_(parameter)
    states = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)

    def output_and_gradients() -> tuple[torch.Tensor, ...]:
        output = model(states)
        return output, *torch.autograd.grad(output.sin().sum(), (states, *trained))

    expected = output_and_gradients()
    fuse_adapters(model)
    for value, other in zip(output_and_gradients(), expected, strict=True):
        torch.testing.assert_close(value, other)


def lists_file(path: Path, count: int = 6) -> Path:
    lines = [
        {
            "id": f"q{number}",
            "question": f"Where is the key number {number}?",
            "right": [f"The key number {number} lies under stone {number}."] if number else [],
            "wrong": [f"Gate {number} has {other} bars." for other in range(5)],
        }
        for number in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_file_of_lists_is_a_judged_run(tmp_path: Path) -> None:
    path = lists_file(tmp_path / "lists.jsonl")
    (sample,) = draw_samples([JudgedRun.parse(str(path))])
    assert sample.label == "lists.jsonl, 6 lists"
    assert sample.source.first_stage is None
    assert sample.collection.qrels["q0"] == {}
    assert [len(sample.run[query]) for query in ("q0", "q1")] == [5, 6]
    lists = {item.question: item for item in tuning_lists(sample, 20)}
    item = lists["Where is the key number 3?"]
    assert item.right == ("The key number 3 lies under stone 3.",)
    assert len(item.wrong) == 5


def test_documents_of_a_list_are_in_another_order(tmp_path: Path) -> None:
    path = lists_file(tmp_path / "lists.jsonl", count=40)
    (sample,) = draw_samples([JudgedRun.parse(str(path))])
    places = Counter(
        [name for name, _ in sample.run[query]].index(f"{query}-1") for query in sample.queries
    )
    assert len(places) > 3


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"question": "q", "right": "a"}', "line 1: wrong: Field required"),
        ('{"question": "q", "right": "a", "wrong": "b"}', "line 1: wrong"),
        ('{"question": "q", "right": "a", "wrong": ["a"]}', "right and wrong is 'a'"),
        ('{"question": " ", "right": "a", "wrong": ["b"]}', "is empty"),
        ('{"question": "q", "right": [], "wrong": []}', "is empty"),
        ("{", "line 1 is not JSON"),
        ("", "holds no list"),
    ],
)
def test_a_bad_list_is_named(tmp_path: Path, line: str, problem: str) -> None:
    path = tmp_path / "lists.jsonl"
    path.write_text(line)
    with pytest.raises(InvalidInputError, match=problem):
        JudgedRun.parse(str(path)).load()


def test_sources_have_weights() -> None:
    weighted = WeightedRun.parse("lists.jsonl:7*2.5")
    assert weighted.weight == 2.5
    assert weighted.run == JudgedRun(Path("lists.jsonl"), "", Path("lists.jsonl"), 7, None)
    assert WeightedRun.parse("nq:train:bm25").weight == 1
    with pytest.raises(InvalidInputError, match="a number after"):
        WeightedRun.parse("lists.jsonl*two")
    with pytest.raises(InvalidInputError, match="greater than 0"):
        TuneOptions.checked(train=["lists.jsonl*0"], dev=["dev.jsonl"])


def test_a_mixture_draws_by_weight_and_each_list_before_one_again() -> None:
    sources = [
        [TuningList(f"{name}{number}", ("r",), ("w", "x", "y")) for number in range(5)]
        for name in "ab"
    ]
    mixture = Mixture(sources, [3, 1], 3, random.Random(0))
    drawn = [mixture.draw() for _ in range(400)]
    assert all(len(item.documents) == 3 for item in drawn)
    shares = Counter(item.question[0] for item in drawn)
    assert 260 < shares["a"] < 340
    first = [item.question for item in drawn if item.question[0] == "a"][:5]
    assert len(set(first)) == 5


@pytest.fixture(scope="module")
def small(smollm2: LocalModel, tmp_path_factory: pytest.TempPathFactory) -> LocalModel:
    """Return a small random model that can read text."""
    tokenizer = smollm2.tokenizer()
    folder = tmp_path_factory.mktemp("small")
    tokenizer.save_pretrained(folder)
    return tiny_models.saved(
        folder,
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.2,
            tie_word_embeddings=True,
        ),
    )


def options_for(model: LocalModel, tmp_path: Path, **changes: Any) -> TuneOptions:
    lists = lists_file(tmp_path / "lists.jsonl", count=12)
    fields = {
        "model": model.path,
        "train": [f"{lists}:8"],
        "dev": [str(lists) + ":4"],
        "backend": "transformers",
        "template": "chatml",
        "layers": 2,
        "rank": 2,
        "steps": 6,
        "lists_per_step": 2,
        "learning_rate": 2e-3,
        "evaluate_every": 3,
        "training_dtype": "float32",
        "device": "cpu",
        "dtype": "float32",
        "checkpoints": tmp_path / "checkpoints",
        "adapter": tmp_path / "adapter",
        "name": "keys",
    }
    return TuneOptions.checked(**{**fields, **changes})


def test_tuned_heads_rank_as_they_were_trained(small: LocalModel, tmp_path: Path) -> None:
    options = options_for(small, tmp_path)
    tuned = tune_heads(options)
    heads = tuned.head_set
    assert [evaluation.steps for evaluation in tuned.evaluations] == [3, 6]
    assert heads.adapter is not None
    assert heads.adapter.layers == 2
    assert heads.highest_layer <= 2
    assert heads.num_layers == 3
    assert heads.scoring.calibration is not None
    assert heads.scoring.abstention is not None
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == sorted(ADAPTER_FILES)
    assert str(small.path) not in (tmp_path / "adapter" / "adapter_config.json").read_text()

    tuned.save(tmp_path / "keys.json")
    assert not list(tmp_path.glob("checkpoints/*")), "the checkpoint is deleted at the end"
    assert '"adapter"' in (tmp_path / "keys.json").read_text()
    question = "Where is the key number 3?"
    documents = ["The key number 3 lies under stone 3.", "Gate 3 has 2 bars.", "Bread rises."]
    with CoReReranker(small.path, tmp_path / "keys.json", dtype="float32") as reranker:
        scores = reranker.score(question, documents)
    ranker = Ranker(small, options)
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    set_peft_model_state_dict(ranker.model, saved)
    weights = {(head.layer, head.head): head.weight for head in heads.heads}
    ranker.weights.data = torch.tensor(
        [weights.get((index // 4, index % 4), 0.0) for index in range(8)]
    )
    expected = ranker(question, documents)
    np.testing.assert_allclose(scores, expected, atol=2e-2 * float(expected.abs().max()))


@pytest.mark.parametrize(("start", "count"), [(None, 400), (HeadSet.from_pairs([(0, 1)]), 100)])
def test_the_first_weights_see_many_lists(
    small: LocalModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    start: HeadSet | None,
    count: int,
) -> None:
    """Weights that were fitted on 96 lists were noise, which the adapter could not undo."""
    seen: list[int] = []
    begin = Ranker.start

    def spy(ranker: Ranker, lists: Sequence[TuningList]) -> None:
        seen.append(len(lists))
        assert all(item.right and item.wrong for item in lists)
        begin(ranker, lists[:8])

    monkeypatch.setattr(Ranker, "start", spy)
    tune_heads(options_for(small, tmp_path, start=start, steps=1))
    assert seen == [count]


def test_a_long_list_has_the_same_gradients_part_by_part(
    small: LocalModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    item = TuningList("Where is it?", ("It is here.",), ("No.", "Far away " * 90, "Ferry"))
    gradients = []
    for tokens in (10_000, 100):
        monkeypatch.setattr("core_rerank_integrations.research.tuning.ranker.MAX_TOKENS", tokens)
        torch.manual_seed(0)
        ranker = Ranker(small, options_for(small, tmp_path, passage_tokens=60))
        ranker.start([item])
        loss = ranker.add_gradients(item, 0.5, 0.25)
        found = {
            name: parameter.grad
            for name, parameter in ranker.named_parameters()
            if parameter.grad is not None
        }
        gradients.append((loss, found))
    (whole_loss, whole), (loss, parts) = gradients
    assert loss == pytest.approx(whole_loss, rel=1e-5)
    assert whole.keys() == parts.keys()
    assert len(whole) > 10
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, atol=1e-6, rtol=1e-3)


def test_the_same_seed_gives_the_same_heads(small: LocalModel, tmp_path: Path) -> None:
    first, second = (
        tune_heads(
            options_for(small, tmp_path, adapter=tmp_path / name, checkpoints=tmp_path / name)
        ).head_set
        for name in ("one", "two")
    )
    assert first.heads == second.heads
    one, two = (tmp_path / name / "adapter_model.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_an_interrupted_run_goes_on_where_it_was(
    small: LocalModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tune_heads(options_for(small, tmp_path, checkpoints=tmp_path / "whole")).head_set
    monkeypatch.setattr(training, "CHECKPOINT_STEPS", 2)
    options = options_for(small, tmp_path)
    step = training.Training._step
    steps = []

    def interrupted(self: training.Training) -> None:
        steps.append(self)
        if len(steps) == 5:
            raise KeyboardInterrupt
        step(self)

    with monkeypatch.context() as patched:
        patched.setattr(training.Training, "_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tune_heads(options)
        (checkpoint,) = (tmp_path / "checkpoints").iterdir()
        resumed = tune_heads(options).head_set
        assert len(steps) == 5 + 2, "steps 5 and 6 are made again"
        fitted_anew = tune_heads(options).head_set
        assert len(steps) == 5 + 2, "what ended after its training is not trained again"
    assert resumed.heads == fitted_anew.heads == whole.heads

    checkpoint.write_bytes(b"damaged")
    with pytest.raises(StorageError, match="delete it and run again"):
        tune_heads(options)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"layers": 4}, "layers=4, but the model has 3"),
        ({"training_dtype": "int8"}, "dtype must be"),
        ({"learning_rate": 1e30}, "lower learning_rate"),
        ({"train": ["missing.jsonl"]}, "cannot read missing.jsonl"),
        ({"backend": "vllm-shared", "device": None}, "cannot run tuned heads"),
        ({"evidence": Path("missing")}, "cannot read missing"),
    ],
)
def test_bad_options_are_refused(
    small: LocalModel, tmp_path: Path, changes: dict[str, Any], problem: str
) -> None:
    with pytest.raises(InvalidInputError, match=problem):
        tune_heads(options_for(small, tmp_path, **changes))


def test_lists_without_a_relevant_document_cannot_be_chosen_by(
    small: LocalModel, tmp_path: Path
) -> None:
    path = lists_file(tmp_path / "none.jsonl", count=1)
    with pytest.raises(InvalidInputError, match="both relevant and irrelevant"):
        tune_heads(options_for(small, tmp_path, dev=[str(path)]))


def test_something_to_train_on_has_to_be_right(small: LocalModel, tmp_path: Path) -> None:
    path = lists_file(tmp_path / "none.jsonl", count=1)
    with pytest.raises(InvalidInputError, match="no list to train on has a right document"):
        tune_heads(options_for(small, tmp_path, train=[str(path)]))


def test_dev_questions_are_not_trained_on_whatever_file_they_are_in(tmp_path: Path) -> None:
    files = [lists_file(tmp_path / f"{name}.jsonl", count=12) for name in ("train", "dev")]
    files[1].write_text(files[1].read_text().replace("Where is", "where  is"))
    train, dev = (
        JudgedRun.parse(f"{path}{part}") for path, part in zip(files, ("", ":4"), strict=True)
    )
    (held,) = draw_samples([dev])
    (drawn,) = draw_samples([train], apart_from=[held])
    assert len(drawn.queries) == 12 - 4
    assert not set(drawn.questions()) & set(held.questions())


def test_an_adapter_stays_until_its_successor_has_probabilities(
    small: LocalModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = options_for(small, tmp_path, steps=2)
    first = tune_heads(options)
    adapter = tmp_path / "adapter" / ADAPTER_FILES[1]
    before = adapter.read_bytes()

    def fails(*_: Any) -> None:
        raise StorageError("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr("core_rerank_integrations.research.tuning.tune._with_scoring", fails)
        with pytest.raises(StorageError, match="full"):
            tune_heads(options.model_copy(update={"seed": 1}))
    assert adapter.read_bytes() == before
    assert first.head_set.adapter is not None
    assert first.head_set.adapter.path == str(tmp_path / "adapter")


def test_other_heads_or_dev_lists_are_another_training(small: LocalModel, tmp_path: Path) -> None:
    tune_heads(options_for(small, tmp_path, steps=1)).head_set.save(start := tmp_path / "keys.json")
    path = lists_file(tmp_path / "dev.jsonl", count=5)
    options = options_for(small, tmp_path, start=start, dev=[str(path)], layers=None)

    def name() -> str:
        started = tune._to_start_from(start, small)
        return tune._digest(small, options, started, [], draw_samples(options.dev))

    first = name()
    assert name() == first
    path.write_text(path.read_text().replace("bars", "bolts"))
    second = name()
    assert second != first
    weights = tmp_path / "adapter" / ADAPTER_FILES[1]
    save_file({key: 2 * value for key, value in load_file(weights).items()}, weights)
    assert name() != second


def test_the_template_is_that_of_the_heads_to_start_from(small: LocalModel, tmp_path: Path) -> None:
    options = options_for(small, tmp_path, steps=1)
    tune_heads(options).head_set.save(start := tmp_path / "keys.json")
    assert HeadSet.load(start).template == "chatml"
    changes = {"start": start, "template": None, "layers": None, "steps": 1}
    assert tune_heads(options_for(small, tmp_path, **changes)).head_set.template == "chatml"


def test_lists_of_the_repository_can_be_read_and_no_page_is_in_both_splits() -> None:
    passages = {}
    for split in ("train", "dev"):
        files = sorted((Path(__file__).parents[2] / "judged_lists" / split).glob("*.jsonl"))
        assert len(files) == 14
        collections = [JudgedRun.parse(str(path)).load()[0] for path in files]
        passages[split] = {
            passage.text for collection in collections for passage in collection.passages.values()
        }
    assert not passages["train"] & passages["dev"]


def test_the_command_writes_a_head_set_and_its_adapter(
    small: LocalModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lists = lists_file(tmp_path / "lists.jsonl", count=12)
    output = tmp_path / "keys.json"
    caplog.set_level("INFO")
    run(
        *("heads", "tune", "--model", str(small.path), "--backend", "transformers"),
        *("--train", f"{lists}:8*2", "--dev", f"{lists}:4", "--steps", "2", "--rank", "2"),
        *("--template", "chatml", "--checkpoints", str(tmp_path / "ck"), "--output", str(output)),
    )
    assert "2 steps: loss" in caplog.text
    assert not list(tmp_path.glob("ck/*"))
    message = failed(
        *("heads", "tune", "--model", str(small.path), "--train", str(lists), "--dev", str(lists)),
        *("--output", str(tmp_path / "new")),
    )
    assert f"would both be {tmp_path / 'new'}; name the file {tmp_path / 'new.json'}" in message
    heads = HeadSet.load(output)
    assert heads.name == "keys"
    assert heads.adapter is not None
    assert heads.adapter.path == str(tmp_path / "keys")
    assert heads.adapter.layers == 1, "a third of three layers"
    assert "lists.jsonl, 8 lists, weight 2" in heads.provenance.details["train"]

    tune_heads(options_for(small, tmp_path, start=output, layers=None, steps=2))
    with pytest.raises(InvalidInputError, match=r"layers=2, but the adapter of .* 'keys' .* has 1"):
        tune_heads(options_for(small, tmp_path, start=output, layers=2))
    plain = HeadSet.from_pairs([(1, 2)])
    started = tune_heads(options_for(small, tmp_path, start=plain, layers=None, steps=1))
    assert started.head_set.adapter is not None
    assert started.head_set.adapter.layers == 2, "those of the head"
    weights = {(head.layer, head.head): head.weight for head in started.head_set.heads}
    assert max(weights, key=lambda head: abs(weights[head])) == (1, 2)
    with pytest.raises(InvalidInputError, match=r"layers=1, but the heads .* need 2"):
        tune_heads(options_for(small, tmp_path, start=plain, layers=1))
    with pytest.raises(InvalidInputError, match="layers=4, but the model has 3"):
        tune_heads(options_for(small, tmp_path, start=plain, layers=4))


def test_the_result_is_averaged_with_the_heads_to_start_from(
    small: LocalModel, tmp_path: Path
) -> None:
    def tuned(name: str, **options: Any) -> tuple[HeadSet, dict[str, torch.Tensor]]:
        adapter = tmp_path / name
        heads = tune_heads(options_for(small, tmp_path, adapter=adapter, **options)).head_set
        return heads, load_file(adapter / ADAPTER_FILES[1])

    def weights(heads: HeadSet) -> dict[tuple[int, int], float]:
        return {(head.layer, head.head): head.weight for head in heads.heads}

    first, first_adapter = tuned("first", layers=2, rank=2, steps=2)
    first.save(start := tmp_path / "first.json")
    further = {"start": start, "layers": None, "steps": 2, "learning_rate": 0.1}
    last, last_adapter = tuned("last", **further)
    mean, mean_adapter = tuned("mean", average=0.25, **further)
    assert mean.provenance.details["average"] == 0.25
    for name, tensor in mean_adapter.items():
        expected = 0.25 * first_adapter[name].float() + 0.75 * last_adapter[name].float()
        torch.testing.assert_close(tensor.float(), expected, atol=2e-3, rtol=2e-2)
    assert any(not last_adapter[name].equal(tensor) for name, tensor in mean_adapter.items())
    of_first, of_last = weights(first), weights(last)
    for head, weight in weights(mean).items():
        expected = 0.25 * of_first.get(head, 0) + 0.75 * of_last.get(head, 0)
        assert weight == pytest.approx(expected, rel=1e-3, abs=1e-6)

    for options, message in (
        ({"layers": 2}, "average=0.5, but there is no adapter to average with"),
        ({"layers": 1, "start": start}, "average=0.5 needs all 2 layers of the heads"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            tuned("refused", average=0.5, **options)


def test_an_adapter_to_start_from_can_be_cut(small: LocalModel, tmp_path: Path) -> None:
    start = tmp_path / "start.json"
    heads = tune_heads(
        options_for(small, tmp_path, adapter=tmp_path / "three", layers=3, rank=2, steps=2)
    ).head_set
    heads.save(start)
    adapter = tmp_path / "two"
    # So low a learning rate leaves the adapter as it is.
    options = options_for(
        small, tmp_path, adapter=adapter, start=start, layers=2, steps=1, learning_rate=1e-12
    )
    cut = tune_heads(options).head_set
    assert cut.adapter is not None
    assert cut.adapter.layers == 2
    assert cut.highest_layer < 2
    before, after = (
        load_file(folder / ADAPTER_FILES[1]) for folder in (tmp_path / "three", adapter)
    )
    assert after.keys() < before.keys()
    assert not any("layers.1.mlp" in name or "layers.2" in name for name in after)
    for name, tensor in after.items():
        torch.testing.assert_close(tensor, before[name])
