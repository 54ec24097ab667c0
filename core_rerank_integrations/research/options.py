"""Options of the functions that find, fit and evaluate heads.

The command line offers the same options, with these names, defaults and descriptions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from core_rerank_integrations.errors import InvalidInputError
from core_rerank_integrations.heads.formats import PUBLISHED_CORE_HEADS
from core_rerank_integrations.heads.head_set import HeadSet
from core_rerank_integrations.heads.scoring_config import (
    Count,
    Index,
    NotNegative,
    Positive,
    Probability,
    Whole,
)
from core_rerank_integrations.method.templates import PromptTemplate
from core_rerank_integrations.research.methods import Method
from core_rerank_integrations.research.sources import JudgedRun, WeightedRun
from core_rerank_integrations.settings import Backend, CheckedModel, RerankerSettings

Detection = Literal["core", "qr"]
"""Score of a head: SCoRe, or the calibrated attention on the relevant document."""

TEMPERATURES = [0.001, 0.1]
"""The paper's: the first for Mistral and Granite, the second for Llama 3.1 and Phi-4."""
L1_STRENGTHS = [0.003, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05]

JudgedRuns = list[
    Annotated[
        JudgedRun,
        BeforeValidator(lambda value: JudgedRun.parse(value) if isinstance(value, str) else value),
    ]
]
"""Judged runs; strings are parsed."""
WeightedRuns = list[
    Annotated[
        WeightedRun,
        BeforeValidator(
            lambda value: WeightedRun.parse(value) if isinstance(value, str) else value
        ),
    ]
]
"""Judged runs with weights; strings are parsed."""


def _split_at_commas(methods: Any) -> Any:
    if not isinstance(methods, list | tuple):
        methods = [methods]
    return [
        part
        for method in methods
        for part in (
            [name.strip() for name in method.split(",")] if isinstance(method, str) else [method]
        )
    ]


def _setting(name: str) -> Any:
    """Return a field like that of `RerankerSettings`."""
    field = RerankerSettings.model_fields[name]
    return Field(default=field.default, description=field.description)


class ModelOptions(CheckedModel):
    """Options of the model."""

    model: str | Path = _setting("model")
    backend: Backend = _setting("backend")
    dtype: str = _setting("dtype")
    device: str | None = _setting("device")

    @property
    def runtime(self) -> dict[str, Any]:
        """Backend, dtype and device, as arguments of `CoReReranker`."""
        return {"backend": self.backend, "dtype": self.dtype, "device": self.device}


class SampleOptions(ModelOptions):
    """Options of the model and of the sample."""

    seed: Whole = Field(default=0, description="Seed of the sample of questions.")


class ReaderOptions(ModelOptions):
    """Options of the heads that are read."""

    template: str | PromptTemplate | None = Field(
        default=None, description="Prompt template; by default the model's."
    )
    max_layer: Index | None = Field(
        default=None, description="Highest layer to read, counted from 0; by default the last."
    )
    prune: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="Share of the model's layers to leave out at its top, instead of max_layer.",
    )
    cache: Path | None = Field(
        default=None,
        description="Folder for the attention that was computed; an interrupted run continues "
        "from it. By default 'features' in the package's cache.",
    )

    @model_validator(mode="after")
    def _check_layers(self) -> Self:
        if self.prune is not None and self.max_layer is not None:
            raise InvalidInputError("give a highest layer or a share to prune, not both")
        return self


class HeadSetOptions(ReaderOptions, SampleOptions):
    """Options of a new head set."""

    best_last: bool = Field(
        default=False,
        description="Whether prompts of several documents show them in reverse order, so that "
        "the first stage's best are nearest to the query.",
    )
    name: str | None = Field(
        default=None, description="Name of the head set; by default that of the file."
    )


class FindOptions(HeadSetOptions):
    """Options of finding heads."""

    data: JudgedRuns = Field(
        description="Questions, as FOLDER:SPLIT:RUN[:N]: a folder in the layout of BEIR, its "
        "judgments, the TREC run that hard negatives are taken from (or its name in the folder's "
        "runs/), and the number of questions to draw. Give several to cover several domains."
    )
    method: Detection = Field(
        default="core", description="Score that ranks the heads: core (SCoRe) or qr (QRHead)."
    )
    temperature: list[Positive] = Field(
        default=TEMPERATURES,
        min_length=1,
        description="Temperatures of SCoRe. All are computed at once; the first ranks the heads.",
    )
    num_heads: Count = Field(
        default=PUBLISHED_CORE_HEADS, description="Number of heads in the head set."
    )
    questions: Count | None = Field(
        default=200, description="Number of questions to draw where the data names none."
    )
    negatives: Count = Field(default=19, description="Number of hard negatives in a prompt.")
    positions: Count = Field(
        default=2,
        description="Prompts per question. The relevant document moves evenly through the list.",
    )
    documents_per_prompt: Count | None = Field(
        default=None, description="Maximum documents in a prompt of the head set; by default all."
    )


class FitOptions(HeadSetOptions):
    """Options of fitting heads."""

    train: JudgedRuns = Field(
        description="Lists to fit on, as FOLDER:SPLIT:RUN, optionally with :N, :KIND or :N:KIND. "
        "RUN is a TREC run, or its name in the folder's runs/; N is the number of questions to "
        "draw; KIND is bm25, dense or, if the order has no meaning, unordered. Give several to "
        "cover several domains."
    )
    dev: JudgedRuns = Field(
        description="Lists to choose by, likewise; all sources count alike. A question is fitted "
        "on or chosen by, never both."
    )
    documents_per_prompt: Count = Field(
        default=1,
        description="Maximum documents in a prompt. With 1 a score depends on question and "
        "document alone, and is calibrated as a probability on the lists to choose by.",
    )
    passage_tokens: Count | None = Field(
        default=None,
        description="For the head set: longer documents are ranked by their best passage of this "
        "length, which should be that of the documents to fit on.",
    )
    candidates: Whole = Field(default=20, ge=2, description="Candidates per question to fit on.")
    dev_candidates: Whole = Field(
        default=20, ge=2, description="Candidates per question to choose by."
    )
    l1: list[NotNegative] = Field(
        default=L1_STRENGTHS, min_length=1, description="Strengths of the L1 penalty to try."
    )
    max_heads: Count | None = Field(
        default=None, description="Maximum number of heads; fits with more are not chosen."
    )


class TuneOptions(SampleOptions):
    """Options of tuning heads."""

    train: WeightedRuns = Field(
        description="Lists to train on, each with an optional *WEIGHT: judged runs as "
        "FOLDER:SPLIT:RUN[:N], or files of lists, FILE.jsonl[:N]. A line of such a file is a JSON "
        "object with question, right (a text or several; an empty list if nothing answers the "
        "question) and wrong (texts). A source with weight 2 is drawn twice as often as one with "
        "weight 1, the default."
    )
    dev: JudgedRuns = Field(
        description="Lists to choose by, likewise without weights; all sources count alike. A "
        "question is trained on or chosen by, never both."
    )
    start: HeadSet | str | Path | None = Field(
        default=None,
        description="Head set, shipped or a file, whose weights are trained further, with its "
        "adapter if it has one; by default the first weights are fitted.",
    )
    average: Probability = Field(
        default=0.0,
        description="Share of the head set to start from in the result: its adapter and weights "
        "are averaged with the trained ones, which often ranks better than either.",
    )
    adapter: Path | None = Field(
        default=None,
        description="Folder of the adapter to write; by default beside the head set.",
    )
    layers: Count | None = Field(
        default=None,
        description="Number of layers that run; those above are dropped. By default a third, or "
        "those of the head set to start from. With fewer than its adapter has, the first weights "
        "are fitted.",
    )
    template: str | PromptTemplate | None = Field(
        default=None, description="Prompt template; by default the model's."
    )
    name: str | None = Field(
        default=None, description="Name of the head set; by default that of the file."
    )
    rank: Count = Field(default=16, description="Rank of a new adapter.")
    steps: Count = Field(default=600, description="Number of steps.")
    lists_per_step: Count = Field(default=4, description="Number of lists in a step.")
    documents: Whole = Field(
        default=8, ge=2, description="Maximum documents of a list in a step; wrong ones are drawn."
    )
    candidates: Count = Field(
        default=20, description="Candidates per question, to draw wrong ones from and to choose by."
    )
    learning_rate: Positive = Field(default=2e-3, description="Learning rate of the adapter.")
    probability_weight: NotNegative = Field(
        default=1.0, description="Weight of the loss of probabilities, beside that of the ranking."
    )
    passage_tokens: Count = Field(
        default=400, description="Longer documents are read as passages; the best one counts."
    )
    max_document_tokens: Count = Field(
        default=1200, description="Longer documents are truncated in training, with a warning."
    )
    evaluate_every: Count = Field(
        default=100, description="Number of steps after which the dev lists are ranked."
    )
    dev_questions: Count = Field(
        default=40, description="Number of questions of each dev source that are ranked then."
    )
    patience: Count = Field(
        default=3,
        description="The training ends after this number of evaluations that are not better.",
    )
    training_dtype: str = Field(
        default="auto", description="Precision of the frozen weights: auto, float32 or bfloat16."
    )
    evidence: Path | None = Field(
        default=None,
        description="Folder in the layout of BEIR, with 'answers' in queries.jsonl, to fit "
        "evidence weights on.",
    )
    max_false_abstentions: Probability = Field(
        default=0.01, description="Share of the lists with a relevant document that may be lost."
    )
    checkpoints: Path | None = Field(
        default=None,
        description="Folder of the checkpoint; an interrupted run continues from it. By default "
        "'tuning' in the package's cache.",
    )


class EvidenceOptions(SampleOptions):
    """Options of fitting evidence weights."""

    heads: HeadSet | str | Path = Field(description="Shipped head set or head set file.")
    data: Path = Field(description="Folder in the layout of BEIR, with 'answers' in queries.jsonl.")
    split: str = Field(default="train", description="Judgments to use.")
    questions: Count | None = Field(
        default=None, description="Number of relevant documents to draw; by default all."
    )


class AbstentionOptions(SampleOptions):
    """Options of fitting an abstention."""

    heads: HeadSet | str | Path = Field(
        description="Shipped head set or head set file; it must be calibrated."
    )
    lists: JudgedRuns = Field(
        description="Judged lists, as FOLDER:SPLIT:RUN[:N]; all sources count alike."
    )
    candidates: Whole = Field(default=20, ge=2, description="Candidates per question.")
    max_false_abstentions: Probability = Field(
        default=0.01, description="Share of the lists with a relevant document that may be lost."
    )


class EvaluationOptions(ModelOptions):
    """Options of an evaluation."""

    data: Path = Field(description="Folder in the layout of BEIR.")
    run: Path = Field(description="TREC run of the first stage: the candidates.")
    methods: Annotated[list[str | Method], BeforeValidator(_split_at_commas)] = Field(
        default=["first-stage", "default", "default+first-stage"],
        description="Methods, comma-separated: first-stage; default, the model's default head set; "
        "icr (all heads); a kind of shipped head set (core, tuned, fit, ...), its name or a file. "
        "NAME@8 takes the best 8 of its ranking. NAME+first-stage lets the first stage's order "
        "count; so do NAME+bm25 and NAME+dense, for a first stage of that kind.",
    )
    split: str = Field(default="test", description="Judgments to use.")
    candidates: Count = Field(default=20, description="Candidates per query.")
    queries: Count | None = Field(
        default=None, description="Number of queries, from the first; by default all."
    )
    documents_per_prompt: Count | None = Field(
        default=None, description="Maximum documents in a prompt; by default each head set's."
    )
    curve: str | None = Field(
        default=None, description="Head set whose ranking is tried at 1, 2, 4, ... heads."
    )
    timed: Index = Field(
        default=5, description="Number of queries by which each method is timed by itself."
    )
