"""Talking to a server: what its clients share."""

import os
import re
import textwrap
from urllib.parse import urlsplit

import openai

_VARIABLE = re.compile("[A-Za-z_][A-Za-z0-9_]*")
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
    if timeout <= 0:
        faults.append(f"timeout must be positive, got {timeout}")
    if api_key_env is not None and not _VARIABLE.fullmatch(api_key_env):
        faults.append(
            "api_key_env must be the name of an environment variable that has the key; what it is "
            "isn't shown, since it may be the key itself"
        )
    elif not api_key(api_key_env):
        faults.append(f"the environment variable {api_key_env} with the key isn't set")
    return faults


def api_key(api_key_env: str | None) -> str:
    """The key in an environment variable, empty if it isn't set; some text where none is wanted."""
    return "none" if api_key_env is None else os.environ.get(api_key_env, "")


def url_fault(url: str, name: str, example: str) -> str | None:
    """What is wrong with the address of a server; None if nothing.

    Args:
        url: The address.
        name: Of the setting.
        example: Of a good address.
    """
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        secret = parts.username is not None
    except ValueError:  # of its port
        good = secret = False
    if secret:
        return (
            f"{name} has a name or a password in it, which would be in logs and configurations: "
            f"put the key into an environment variable and name that in api_key_env"
        )
    return None if good else f"{name} must be like {example}, got {url!r}"


def in_short(error: Exception) -> str:
    """An error in one line: some servers send a page."""
    return textwrap.shorten(str(error), 400, placeholder=" …")
