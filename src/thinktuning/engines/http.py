"""Talking to a server: what its clients share."""

import math
import os
import re
import textwrap
from urllib.parse import urlsplit

import openai

_USUAL_NAME = re.compile("[A-Z][A-Z0-9_]*")  # which keys hardly look like
_THIS_MACHINE = ("127.0.0.1", "localhost", "[::1]")


def connect(
    base_url: str, key: str, timeout: float | openai.Timeout, max_retries: int
) -> openai.OpenAI:
    """A client that asks again, ever later, where a server is busy or away.

    Args:
        base_url: Of the server.
        key: Its API key; any text where it has none.
        timeout: Of a request, in seconds.
        max_retries: After the first failure.
    """
    return openai.OpenAI(
        base_url=base_url,
        api_key=key,
        timeout=timeout,
        max_retries=max_retries,
        # A proxy of the environment's can't reach this machine; None: not by it.
        http_client=openai.DefaultHttpxClient(
            mounts={f"all://{host}": None for host in _THIS_MACHINE}
        ),
    )


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
    return "none" if api_key_env is None else dict(os.environ).get(api_key_env, "")


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


def in_short(error: Exception) -> str:
    """An error in one line: some servers send a page."""
    return textwrap.shorten(str(error), 400, placeholder=" …")
