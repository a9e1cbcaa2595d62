"""The few calls of the Hugging Face hub that a download needs, over plain HTTP and nothing but the standard library.

    GET {endpoint}/api/models/{name}/revision/{revision}?blobs=true    commit, files, sizes, checksums
    GET {endpoint}/{name}/resolve/{commit}/{file}                      contents; `Range` continues a broken download

Environment: HF_ENDPOINT (another hub), HF_TOKEN (or the token file that `hf auth login` writes), and the usual proxy variables.
"""

from __future__ import annotations

import http.client
import json
import os
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penstock import __version__
from penstock.core.errors import PenstockError

DEFAULT_ENDPOINT = "https://huggingface.co"
TIMEOUT_S = 30.0
MAX_METADATA_BYTES = 32 * 2**20


class HubError(PenstockError):
    """The hub refused or could not be reached. The message is one line with the fix."""


class HubConnectionError(HubError):
    """The hub could not be reached or the connection broke; worth a retry."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a repository. `sha256` is known for large files only; `size` is in bytes."""

    path: str
    size: int
    sha256: str | None


@dataclass(frozen=True, slots=True)
class Repository:
    name: str
    commit: str
    files: tuple[RemoteFile, ...]


class _NoTokenAcrossHosts(urllib.request.HTTPRedirectHandler):
    """Downloads are redirected to storage hosts with signed URLs: the token must not go there."""

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: http.client.HTTPMessage, newurl: str
    ) -> urllib.request.Request | None:
        redirected = super().redirect_request(req, fp, code, msg, headers, newurl)
        old_host, new_host = urllib.parse.urlsplit(req.full_url).netloc, urllib.parse.urlsplit(newurl).netloc
        if redirected is not None and old_host != new_host:
            redirected.remove_header("Authorization")
        return redirected


class HubClient:
    """Blocking client of one hub."""

    def __init__(self, endpoint: str | None = None, token: str | None = None) -> None:
        self.endpoint = (endpoint or os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")
        self._token = token or find_token()
        self._opener = urllib.request.build_opener(_NoTokenAcrossHosts())

    def repository(self, name: str, revision: str) -> Repository:
        """Commit and files of a repository at a branch, tag or commit. Raises HubError."""
        url = f"{self.endpoint}/api/models/{name}/revision/{urllib.parse.quote(revision, safe='')}?blobs=true"
        with self._open(url, {}, name, revision) as response:
            body = response.read(MAX_METADATA_BYTES)
        try:
            data = json.loads(body)
            files = tuple(_remote_file(entry) for entry in data["siblings"])
            return Repository(name, str(data["sha"]), files)
        except (ValueError, KeyError, TypeError) as error:
            raise HubError(f"{self.endpoint} did not answer like a hub; check HF_ENDPOINT.") from error

    def open_file(self, name: str, commit: str, path: str, offset: int) -> http.client.HTTPResponse:
        """The contents of a file from byte `offset` on (status 206), or whole when the hub ignores ranges (200)."""
        url = f"{self.endpoint}/{name}/resolve/{commit}/{urllib.parse.quote(path)}"
        headers = {"Range": f"bytes={offset}-"} if offset else {}
        return self._open(url, headers, name, commit)

    def _open(self, url: str, headers: dict[str, str], name: str, revision: str) -> http.client.HTTPResponse:
        headers = {"User-Agent": f"penstock/{__version__}", "Accept-Encoding": "identity", **headers}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        if not url.startswith(("https://", "http://")):
            raise HubError(f"HF_ENDPOINT must start with https:// or http://, not {self.endpoint!r}.")
        request = urllib.request.Request(url, headers=headers)  # noqa: S310 - the scheme is checked above
        try:
            response: http.client.HTTPResponse = self._opener.open(request, timeout=TIMEOUT_S)
        except urllib.error.HTTPError as error:
            with error:
                raise self._refusal(error, name, revision) from error
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise HubConnectionError(
                f"Cannot reach {self.endpoint} ({reason}). Check the network, or copy the model folder from another machine."
            ) from error
        return response

    def _refusal(self, error: urllib.error.HTTPError, name: str, revision: str) -> HubError:
        """The hub's status and X-Error-Code as one line with the fix."""
        code = error.headers.get("X-Error-Code", "")
        page = f"{self.endpoint}/{name}"
        if code == "GatedRepo" and not self._token:
            return HubError(f"{name} is gated: accept its terms at {page}, then give a token with --token or HF_TOKEN.")
        if code == "GatedRepo":
            return HubError(
                f"{name} is gated and this token has no access: accept its terms at {page} with the token's account."
            )
        if code == "RevisionNotFound":
            return HubError(f"{name} has no revision {revision!r}; see {page}/tree/main for branches and tags.")
        if error.code in (401, 403, 404):
            private = "" if self._token else " If it is private, give a token with --token or HF_TOKEN."
            return HubError(f"There is no model {name} at {self.endpoint}, or the token has no access to it.{private}")
        if error.code == 429 or error.code >= 500:
            return HubConnectionError(f"{self.endpoint} answered {error.code} for {name}; try again later.")
        return HubError(f"{self.endpoint} answered {error.code} for {name}.")


def find_token() -> str | None:
    """HF_TOKEN, else the token file of the Hugging Face tools."""
    token = os.environ.get("HF_TOKEN", "").strip()
    if token:
        return token
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    path = Path(os.environ.get("HF_TOKEN_PATH") or home / "token")
    try:
        return path.read_text().strip() or None
    except OSError:
        return None


def _remote_file(entry: dict[str, Any]) -> RemoteFile:
    lfs = entry.get("lfs") or {}
    return RemoteFile(str(entry["rfilename"]), int(entry["size"]), lfs.get("sha256"))
