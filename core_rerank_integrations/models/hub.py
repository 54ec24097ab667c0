"""Files of the Hugging Face hub."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from pathlib import Path

from core_rerank_integrations.errors import InvalidInputError, ModelError, StorageError

STORAGE_ERRORS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)


def hub_folder(
    hub_id: str,
    files: Sequence[str],
    missing: Callable[[Path], str | None],
    *,
    otherwise: str,
    revision: str | None = None,
    token: str | None = None,
    local_files_only: bool = False,
) -> Path:
    """Return the folder of a repository's files; fetch them if they are not on this machine.

    Args:
        hub_id: Id of the repository.
        files: Patterns of the files.
        missing: Says what a folder lacks; ``None`` if it is complete.
        otherwise: What else ``hub_id`` is not, for the errors.
        revision: Branch, tag or commit.
        token: Access token of the hub; by default the one that is stored on this machine.
        local_files_only: Whether nothing may be downloaded.

    Raises:
        InvalidInputError: ``hub_id`` is not an id of the hub, or ``token`` cannot be sent.
        ModelError: The files cannot be found or downloaded.
        StorageError: The hub's cache cannot be written.
    """
    # A folder on this machine does not need this slow import.
    import httpx  # The hub's library requires it, and lets some of its errors pass.
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HFValidationError

    if constants.HF_HUB_CACHE.startswith("~"):
        raise StorageError(
            "this user has no home folder for models of the Hugging Face hub: set the environment "
            "variable HF_HOME to a folder"
        )

    def snapshot(local_only: bool) -> Path:
        folder = Path(
            snapshot_download(
                hub_id,
                revision=revision,
                token=token,
                allow_patterns=list(files),
                ignore_patterns=["original/*", "consolidated*"],
                local_files_only=local_only,
            )
        )
        if lacking := missing(folder):
            raise FileNotFoundError(f"{hub_id} has no {lacking}")
        return folder

    failure: OSError | httpx.RequestError | None = None
    # Most of the time nothing has to be fetched, and then nothing is asked.
    for local_only in (True,) if local_files_only else (True, False):
        try:
            return snapshot(local_only)
        except HFValidationError as error:
            raise InvalidInputError(f"{hub_id!r} is no hub id, and it is {otherwise}") from error
        except (httpx.LocalProtocolError, UnicodeEncodeError):
            # The error shows the token.
            raise InvalidInputError(
                "the access token of the Hugging Face hub holds characters that cannot be sent: "
                "remove line breaks and the like from token= or HF_TOKEN"
            ) from None
        except (OSError, httpx.RequestError) as error:
            failure = error
    assert failure is not None
    if isinstance(failure, OSError) and failure.errno in STORAGE_ERRORS:
        raise StorageError(
            f"cannot store {hub_id} in the cache of the Hugging Face hub: {failure}. Free space "
            "there, or set the environment variable HF_HOME to another folder"
        ) from failure
    raise ModelError(
        f"cannot get {hub_id} from the Hugging Face hub, and it is {otherwise}: {_reason(failure)}"
    ) from failure


def _reason(failure: Exception) -> str:
    """Return why nothing was downloaded, and the remedy."""
    import httpx
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError

    # The library wraps most answers of the hub in an error that blames the connection.
    errors = (failure, failure.__cause__)
    error = next((error for error in errors if isinstance(error, httpx.HTTPError)), failure)
    if isinstance(error, httpx.RequestError):
        return (
            f"{constants.ENDPOINT} cannot be reached ({type(error).__name__}: {error}). Check the "
            "connection, or name a folder that holds the files"
        )
    if not isinstance(error, HfHubHTTPError):
        return str(failure)
    status = error.response.status_code
    answer = f"{error.response.url} answered {status}"
    if error.server_message:
        answer += f" ({error.server_message})"
    if isinstance(error, RevisionNotFoundError):
        return f"{answer}. Check the revision: there is no such branch, tag or commit"
    if status in (401, 403, 404):
        return (
            f"{answer}. Check the id; if the repository is private or gated, set token= or "
            "HF_TOKEN to the token of an account that may read it"
        )
    return f"{answer}. Try again later"
