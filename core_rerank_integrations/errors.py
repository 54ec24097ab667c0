"""What can go wrong, by name. Every message says what was wrong, with the value, and what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class CoReError(Exception):
    """Base of every error this package raises on purpose."""


class InvalidInputError(CoReError, ValueError):
    """An argument that cannot be ranked or has no meaning; raised before the model runs."""


class ClosedError(CoReError, RuntimeError):
    """A reranker was used after `close`."""


class HeadSetError(CoReError, ValueError):
    """A head set that cannot be read, or that does not belong to the model."""


class ModelError(CoReError, RuntimeError):
    """A model that cannot be found, fetched or converted."""


class UnsupportedModelError(ModelError):
    """A model whose attention this package cannot read exactly; raised when it is loaded."""


class BackendError(CoReError, RuntimeError):
    """What runs the model failed, or gave less than a whole answer."""


class GeneratorError(CoReError, RuntimeError):
    """A model that is to write an answer cannot be reached, or broke off."""


class StorageError(CoReError, OSError):
    """A file cannot be written, or what this package wrote cannot be read back."""


class MissingExtraError(CoReError, ImportError):
    """A library that belongs to one of the package's extras is not installed."""


class DocumentTruncatedWarning(UserWarning):
    """A document did not fit and was cut at a token border; the message names it."""


@contextmanager
def requires_extra(extra: str) -> Iterator[None]:
    """Around imports that one of the package's extras brings: say which, if it is missing.

    Raises:
        MissingExtraError: An import found no such module.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"{error.name!r} is not installed. Install it with: "
            f'pip install "core-rerank-integrations[{extra}]"'
        ) from error
