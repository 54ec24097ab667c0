"""Errors. Every message names the problem, the value and the remedy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class CoReError(Exception):
    """Base of every error this package raises on purpose."""


class InvalidInputError(CoReError, ValueError):
    """An argument is invalid; raised before the model runs."""


class ClosedError(CoReError, RuntimeError):
    """A reranker was used after `close`."""


class HeadSetError(CoReError, ValueError):
    """A head set cannot be read, or belongs to another model."""


class ModelError(CoReError, RuntimeError):
    """A model cannot be found, downloaded or converted."""


class UnsupportedModelError(ModelError):
    """The attention of a model cannot be read exactly; raised when the model is loaded."""


class BackendError(CoReError, RuntimeError):
    """A backend failed, or returned an incomplete result."""


class GeneratorError(CoReError, RuntimeError):
    """A model that writes answers cannot be reached, or stopped early."""


class StorageError(CoReError, OSError):
    """A file of this package cannot be written or read."""


class MissingExtraError(CoReError, ImportError):
    """A library of one of the package's extras is not installed."""


class DocumentTruncatedWarning(UserWarning):
    """A document was truncated; the message names it."""


class LongDocumentWarning(UserWarning):
    """A document takes very long to read; the message names it."""


@contextmanager
def requires_extra(extra: str) -> Iterator[None]:
    """Name the extra to install if an import in the ``with`` block fails.

    Raises:
        MissingExtraError: A module is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"{error.name!r} is not installed. Install it with: "
            f'pip install "core-rerank-integrations[{extra}]"'
        ) from error
