"""Files of documents: read as they are meant, or refused by their line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.cli import failed

from core_rerank_integrations.cli.documents import read_documents
from core_rerank_integrations.errors import InvalidInputError


def read(folder: Path, content: str | bytes) -> tuple[list[str], list[str]]:
    path = folder / "documents"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_documents(path)


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        ("a\r\n\r\nb\rc\n", ["a", "b", "c"]),
        ("\ufeffa\nb", ["a", "b"]),
        ("a\nb é".encode("utf-16"), ["a", "b é"]),
        ('\ufeff{"text": "a"}\r\n{"text": "b"}\r\n', ["a", "b"]),
        ('{"text": "a\u2028b\x85c"}\n"e\u2029"', ["a\u2028b\x85c", "e\u2029"]),
        ("a\u2028b\nc\x0cd", ["a\u2028b", "c\x0cd"]),
        (json.dumps({"text": "a", "title": None}, indent=2), ["a"]),
        (json.dumps([{"text": "a", "title": "T"}, "b"], indent=2), ["T a", "b"]),
        ('{"text": "a", "id": null, "url": 5}\n\n"b"', ["a", "b"]),
        (
            '"Quoted," she said.\n[1] note\n{braces}',
            ['"Quoted," she said.', "[1] note", "{braces}"],
        ),
        ("1\n2\nnull", ["1", "2", "null"]),
        ('"lone \\ud800"', ["lone \ud800"]),
        ("x" * 5_000_000, ["x" * 5_000_000]),
        ("[" * 100_000, ["[" * 100_000]),
    ],
)
def test_texts(tmp_path: Path, content: str | bytes, texts: list[str]) -> None:
    ids, found = read(tmp_path, content)
    assert found == texts
    assert ids == [str(number) for number in range(1, len(texts) + 1)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n\n{"text": "b"', "documents, line 3 is not JSON, and other lines are"),
        ('{"text": "a"\n{"text": "b"}', "line 1 is not JSON, .* delimiter, column 13"),
        ('{"text": "a"}\nplain', "line 2 is not JSON"),
        ('"a"\n"b', "line 2 is not JSON"),
        ('{"text": "a"}\n5', "line 2 must be a string or an object"),
        ('{\n"text": "a"\n}\n{\n"text": "b"\n}', "Extra data, line 4, column 1; write an array"),
        ('[{"text": "a"},\n{"text": "b"}', "is not JSON: .*line 2, column 14"),
        ('["a",\n"b"', "is not JSON: .*line 2"),
        ('{"a":' * 100_000, "nested too deeply"),
        ('[{"text": 5}]', "document 1 of .*: text: Input should be a valid string, got 5"),
        ('["a", {"text": null}]', "document 2 of .*: text: .*, got None"),
        ('[{"text": ["a"]}]', r"text: .*, got \['a'\]"),
        ('[{"title": "T"}]', "text: Field required"),
        ('[{"text": "a", "title": 5}]', "title: .*, got 5"),
        ('[{"text": "a", "_id": [1]}]', "got \\[1\\]"),
        ('{"documents": ["a"]}', "document 1 of .*: text: Field required"),
        ('[["a"]]', "document 1 of .* must be a string or an object"),
        ('{"id": 1, "text": "a"}\n{"_id": "1", "text": "b"}', "line 2 has the id '1' of .*line 1"),
        ("", "holds no documents"),
        ("\ufeff \r\n", "holds no documents"),
        ("[]", "holds no documents"),
        (b"a\n\xe9b", "line 2: bytes that are not UTF-8"),
        (b"\xff\xfea", "line 1: bytes that are not UTF-16"),
        ("a\nb".encode("utf-16-le"), "line 1: a NUL character; save the file as text in UTF-8"),
        (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3", "line 2: bytes that are not UTF-8"),
        (b"PK\x03\x04\x14\x00", "NUL"),
    ],
)
def test_refusals_name_the_line_or_the_document(
    tmp_path: Path, content: str | bytes, message: str
) -> None:
    with pytest.raises(InvalidInputError, match=message) as error:
        read(tmp_path, content)
    assert "documents" in str(error.value)
    assert len(str(error.value)) < 500, "a long value is shortened"


def test_what_cannot_be_opened_is_an_error(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing", tmp_path / ("long" * 100), tmp_path / "nul\0"):
        with pytest.raises(InvalidInputError, match="cannot read documents from"):
            read_documents(path)


def test_standard_input_is_decoded_like_files() -> None:
    arguments = ("rerank", "--query", "q", "--documents", "-")
    assert "-, line 2: bytes that are not UTF-8" in failed(*arguments, typed=b"a\n\xff")
    assert "-, line 2 is not JSON" in failed(*arguments, typed='\ufeff{"text": "a"}\n{')
