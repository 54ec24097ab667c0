"""Make judged lists of short, long and mixed documents from questions that come with answers.

From a folder in the layout of BEIR whose ``queries.jsonl`` has ``answers`` (Natural Questions), it
writes five folders of the same layout, with candidates in random order
(``runs/<split>.given.trec``):

    passages    the best ten of both first stages, without unjudged ones that contain an answer
    sentences   the sentence with the answer among others of its passage and of other candidates
    joined      three passages in one document, for the same questions
    mixed       sentences, passages and joined passages in one list; each third question has its
                relevant document in another of these forms
    lengths     for `benchmarks/ranking.py`: four lists per question, of a short or a long
                relevant document among short or long others

The shipped fits are fitted on these lists and chosen by them, beside the collection itself.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import unicodedata
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from core_rerank_integrations.research.collection import Collection, load_run, save_run

SPLITS = ("train", "dev")
OTHERS = 9
JOINED = 3
SENTENCE_CHARACTERS = range(25, 261)
STOP_WORDS = frozenset(
    """
    a an and are as at be been by did do does first for from had has have he her his how in is it
    its most much many of on or she that the their they this to was were what when where which
    who with you
    """.split()  # noqa: SIM905  A list of forty strings would be harder to read.
)


class Question(NamedTuple):
    """A question, and its documents in each form; the relevant one of a form comes first."""

    id: str
    text: str
    sentences: list[str]
    passages: list[str]
    joined: list[str]


class Lists:
    """Make the documents and the lists of one collection.

    Args:
        folder: The collection.
        runs: First stages whose candidates are the irrelevant documents.
        seed: Seed of all samples.
    """

    def __init__(self, folder: Path, runs: Sequence[str], seed: int = 0) -> None:
        self.texts: dict[str, str] = {}
        self._random = random.Random(seed)
        self._collections = {split: Collection.load(folder, split) for split in SPLITS}
        self._runs = {
            split: [load_run(folder / "runs" / f"{split}.{name}.trec", collection) for name in runs]
            for split, collection in self._collections.items()
        }
        self._answers = {
            query: [plain(answer) for answer in answers if plain(answer)]
            for collection in self._collections.values()
            for query, answers in collection.answers.items()
        }
        passages = self._collections[SPLITS[0]].passages
        self.texts |= {name: passage.content for name, passage in passages.items()}
        self._sentences = {name: _sentences(passage.text) for name, passage in passages.items()}
        for name, sentences in self._sentences.items():
            self.texts |= {f"{name}#{index}": text for index, text in enumerate(sentences)}
        self._joined_in: dict[str, str] = {}
        shuffled = sorted(passages)
        self._random.shuffle(shuffled)
        for start in range(0, len(shuffled), JOINED):
            members = shuffled[start : start + JOINED]
            name = "+".join(members)
            self.texts[name] = "\n\n".join(self.texts[member] for member in members)
            self._joined_in |= dict.fromkeys(members, name)

    def passages(self, split: str, count: int) -> dict[str, tuple[str, list[str]]]:
        """Return query text and candidates of ``count`` questions, the judged one first."""
        collection, runs = self._collections[split], self._runs[split]
        names = sorted(collection.queries)
        random.Random(7).shuffle(names)
        lists = {}
        for name in names[:count]:
            best = dict.fromkeys(document for run in runs for document in run.get(name, [])[:10])
            relevant = [
                document for document in best if collection.qrels[name].get(document, 0) > 0
            ]
            others = [
                document
                for document in best
                if document not in relevant and not self._has_answer(name, document)
            ]
            if relevant and others:
                lists[name] = (collection.queries[name], [*relevant[:1], *others])
        return lists

    def questions(self, split: str, count: int) -> list[Question]:
        """Return at most ``count`` questions that a single sentence answers."""
        collection, runs = self._collections[split], self._runs[split]
        names = sorted(collection.queries)
        self._random.shuffle(names)
        questions = (self._question(collection, name, runs) for name in names)
        return list(islice((question for question in questions if question), count))

    def _question(
        self, collection: Collection, name: str, runs: Sequence[Mapping[str, Sequence[str]]]
    ) -> Question | None:
        text = collection.queries[name]
        relevant = [document for document, grade in collection.qrels[name].items() if grade > 0]
        query_words = _words(text)
        answering = [
            document
            for passage in relevant
            for document in self._sentences_of(passage)
            if self._has_answer(name, document)
            and len(_words(self.texts[document]) & query_words) >= max(2, 0.4 * len(query_words))
        ]
        if not answering:
            return None
        near = [run.get(name, [])[:OTHERS] for run in runs]
        candidates = list(
            dict.fromkeys(
                document
                for documents in zip(*near, strict=False)
                for document in documents
                if document not in relevant and not self._has_answer(name, document)
            )
        )
        beside = [
            document for document in self._sentences_of(relevant[0]) if document not in answering
        ]
        elsewhere = [document for passage in candidates for document in self._sentences_of(passage)]
        elsewhere.sort(key=lambda document: -len(_words(self.texts[document]) & query_words))
        sentences = [*beside[:2], *elsewhere]
        joined = dict.fromkeys(self._joined_in[document] for document in candidates)
        others = [
            [document for document in documents if not self._has_answer(name, document)][:OTHERS]
            for documents in (sentences, candidates, joined)
        ]
        if min(map(len, others)) < OTHERS // 2:
            return None
        best = (answering[0], relevant[0], self._joined_in[relevant[0]])
        return Question(
            name, text, *([first, *rest] for first, rest in zip(best, others, strict=True))
        )

    def _sentences_of(self, passage: str) -> list[str]:
        return [f"{passage}#{index}" for index in range(len(self._sentences.get(passage, ())))]

    def _has_answer(self, question: str, document: str) -> bool:
        text = plain(self.texts[document])
        return any(answer in text for answer in self._answers.get(question, ()))


def plain(text: str) -> str:
    """Reduce a text to lower-case letters, digits and single spaces."""
    decomposed = unicodedata.normalize("NFKD", text.lower())
    return " ".join(re.sub(r"[^a-z0-9\s]", "", decomposed).split())


def _words(text: str) -> set[str]:
    return {word for word in plain(text).split() if len(word) > 1} - STOP_WORDS


def _sentences(text: str) -> list[str]:
    pieces = re.split(r"(?<=[.!?])\s+(?=[A-Z\"'(])", text)
    return [piece.strip() for piece in pieces if len(piece.strip()) in SENTENCE_CHARACTERS]


def mixed(number: int, question: Question) -> list[str]:
    """Return three other documents of each form, and the relevant one in one of them."""
    forms = question[2:]
    return [forms[number % len(forms)][0], *(document for form in forms for document in form[1:4])]


def of_two_lengths(question: Question) -> dict[str, list[str]]:
    """Return the lists of a short or a long document among short or long others, by name."""
    forms = {"short": question.sentences, "long": question.joined}
    size = min(map(len, forms.values()))
    return {
        f"{one}-among-{other}": [forms[one][0], *forms[other][1:size]]
        for one in forms
        for other in forms
    }


def write_folder(
    folder: Path,
    texts: Mapping[str, str],
    splits: Mapping[str, Mapping[str, tuple[str, Sequence[str]]]],
    draw: random.Random,
) -> None:
    """Write a folder in the layout of BEIR.

    Args:
        folder: The folder.
        texts: Texts of all documents; only those in a list are written.
        splits: By split and query id, the question and its documents, the relevant one first.
        draw: Shuffles the candidates.
    """
    for name in ("qrels", "runs"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    lists = {query: item for split in splits.values() for query, item in split.items()}
    used = dict.fromkeys(document for _, documents in lists.values() for document in documents)
    _write_lines(folder / "corpus.jsonl", ({"_id": name, "text": texts[name]} for name in used))
    _write_lines(
        folder / "queries.jsonl",
        ({"_id": query, "text": text} for query, (text, _) in lists.items()),
    )
    for split, items in splits.items():
        judgments = [f"{query}\t{documents[0]}\t1" for query, (_, documents) in items.items()]
        header = "query-id\tcorpus-id\tscore"
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join((header, *judgments, "")))
        ranking = {}
        for query, (_, documents) in items.items():
            shuffled = draw.sample(documents, len(documents))
            ranking[query] = [(name, -float(rank)) for rank, name in enumerate(shuffled)]
        save_run(folder / "runs" / f"{split}.given.trec", ranking, "given")


def _write_lines(path: Path, records) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def print_counts(folder: Path, splits: Mapping[str, Mapping[str, object]]) -> None:
    counts = ", ".join(f"{len(items)} {split}" for split, items in splits.items())
    print(f"{folder}: {counts} lists")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="collection with answers")
    parser.add_argument("--output", type=Path, required=True, help="folder for the five folders")
    parser.add_argument("--runs", nargs="+", default=["bm25", "minilm"])
    parser.add_argument("--train", type=int, default=450, help="maximum number of questions")
    parser.add_argument("--dev", type=int, default=150, help="maximum number of questions")
    parser.add_argument("--passages", type=int, default=1200, help="maximum number of questions")
    arguments = parser.parse_args()
    lists = Lists(arguments.data, arguments.runs)
    draw = random.Random(0)
    questions = {split: lists.questions(split, getattr(arguments, split)) for split in SPLITS}
    forms = {
        "sentences": lambda _, question: {question.id: question.sentences},
        "joined": lambda _, question: {question.id: question.joined},
        "mixed": lambda number, question: {question.id: mixed(number, question)},
        "lengths": lambda _, question: {
            f"{question.id}-{name}": documents
            for name, documents in of_two_lengths(question).items()
        },
    }
    folder = arguments.output / "passages"
    splits = {split: lists.passages(split, arguments.passages) for split in SPLITS}
    write_folder(folder, lists.texts, splits, draw)
    print_counts(folder, splits)
    for form, documents_of in forms.items():
        splits = {
            split: {
                query: (question.text, documents)
                for number, question in enumerate(of_split)
                for query, documents in documents_of(number, question).items()
            }
            for split, of_split in questions.items()
        }
        write_folder(arguments.output / form, lists.texts, splits, draw)
        print_counts(arguments.output / form, splits)


if __name__ == "__main__":
    main()
