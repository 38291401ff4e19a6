"""Talking to a server: what its clients share."""

import logging
import math
import os
import re
import textwrap
import time
from collections.abc import Iterator
from ipaddress import ip_address
from urllib.parse import urlsplit

import httpx2
import openai

log = logging.getLogger(__name__)

_USUAL_NAME = re.compile("[A-Z][A-Z0-9_]*")  # which keys hardly look like
_THIS_MACHINE = ("127.0.0.1", "localhost", "[::1]")
_NO_KEY = "none"


def connect(
    base_url: str, key: str, timeout: float | openai.Timeout, max_retries: int
) -> openai.OpenAI:
    """A client that asks again, ever later, where a server is busy or away.

    Args:
        base_url: Of the server.
        key: Its API key, of ``api_key``.
        timeout: Seconds that it may be silent for, and that an answer may take once it has begun.
        max_retries: After the first failure.
    """
    if key != _NO_KEY and in_clear_text(base_url):
        log.warning(
            "the API key goes to %s in clear text, where others on the way can read it; use https",
            base_url,
        )
    return openai.OpenAI(
        base_url=base_url,
        api_key=key,
        timeout=timeout,
        max_retries=max_retries,
        # A proxy of the environment's can't reach this machine; None: not by it.
        http_client=openai.DefaultHttpxClient(
            mounts={f"all://{host}": None for host in _THIS_MACHINE},
            event_hooks={"response": [_bound]},
        ),
    )


class _InTime(httpx2.SyncByteStream):
    """What a server sends, up to a deadline: the client's own timeout bounds its silences only.

    Some servers and proxies send blanks while they compute, or when they will never answer.
    """

    def __init__(self, stream: httpx2.SyncByteStream, seconds: float) -> None:
        self._stream = stream
        self._deadline = time.monotonic() + seconds

    def __iter__(self) -> Iterator[bytes]:
        for part in self._stream:
            if time.monotonic() > self._deadline:
                raise httpx2.ReadTimeout("the answer goes on for too long")
            yield part

    def close(self) -> None:
        self._stream.close()


def _bound(response: httpx2.Response) -> None:
    """Give the body of a response as long as the server may be silent for."""
    assert isinstance(response.stream, httpx2.SyncByteStream)
    response.stream = _InTime(response.stream, response.request.extensions["timeout"]["read"])


def in_clear_text(url: str) -> bool:
    """Whether others can read what is sent to a good address: without TLS, to another machine."""
    parts = urlsplit(url)
    return parts.scheme == "http" and not _is_this_machine(parts.hostname or "")


def _is_this_machine(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:  # a name
        return host == "localhost"


def client_faults(concurrency: int, timeout: float, api_key_env: str | None) -> list[str]:
    """What is wrong with the settings of a client."""
    faults = []
    if concurrency < 1:
        faults.append(f"concurrency must be at least 1, got {concurrency}")
    if not 0 < timeout < math.inf:
        faults.append(f"timeout must be positive and finite, got {timeout}")
    if api_key(api_key_env):
        return faults
    if _USUAL_NAME.fullmatch(str(api_key_env)):
        faults.append(f"the environment variable {api_key_env} with the key isn't set")
    else:
        faults.append(
            "api_key_env must be the name of an environment variable that is set to the key; what "
            "it is isn't shown, since it may be the key itself"
        )
    return faults


def api_key(api_key_env: str | None) -> str:
    """The key in an environment variable, empty if it isn't set; some text where none is wanted."""
    # A dict, since os.environ itself can't be asked for what no system can encode.
    return _NO_KEY if api_key_env is None else dict(os.environ).get(api_key_env, "")


def url_fault(url: str, name: str, example: str) -> str | None:
    """What is wrong with the address of a server; None if nothing.

    Args:
        url: The address.
        name: Of the setting.
        example: Of a good address.
    """
    # First, and without a parser, which may take a secret for something else or fail over it.
    if any(sign in url for sign in "@?#"):
        return (
            f"{name} may have no name, password, query or fragment in it (@, ?, #), which would be "
            f"in logs and configurations: put the key into an environment variable and name that "
            f"in api_key_env"
        )
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # of its port
        good = False
    return None if good else f"{name} must be like {example}, got {url!r}"


def in_short(error: Exception, key: str) -> str:
    """An error in one line, since some servers send a page, and without the key, which some repeat.

    Args:
        error: What the client raised.
        key: That was sent, of ``api_key``.
    """
    said = str(error)
    if key != _NO_KEY:
        said = said.replace(key, "[the key]")
    return textwrap.shorten(said, 400, placeholder=" …")
