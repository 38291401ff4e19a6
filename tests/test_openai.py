"""A teacher behind a server: every way in which a server fails, and a real one that is killed."""

import json
import math
import os
import ssl
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import tiny
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from running import audit, checkpoint, fit_arguments
from serving import VllmServer, answering, wait_until

from thinktuning.cli import main
from thinktuning.engines import OpenAIEngine
from thinktuning.errors import InputError
from thinktuning.teaching import (
    Chat,
    FeedbackForm,
    Reply,
    ReplyParams,
    ask_in_form,
    load_behaviors,
    parse_feedback,
    teacher_chat,
)

pytestmark = pytest.mark.faults

HERE = Path(__file__).parent
PARAMS = ReplyParams(max_new_tokens=20, max_prompt_tokens=100)
UNAVAILABLE = Reply(skipped="unavailable")


def chat(text: str) -> Chat:
    return [{"role": "user", "content": text}]


def says(text: str | None, finish_reason: str = "stop") -> dict[str, Any]:
    """A completion as servers send it."""
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": finish_reason}
    return {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}


def fault(message: str, **more: Any) -> dict[str, Any]:
    return {"error": {"message": message, "type": "a type", **more}}


# What a server sends: a status and a body, piece by piece if it is an iterator; None: it hangs up.
Sent = tuple[int, dict[str, Any] | list[Any] | str | Iterator[str]] | None


def echo(body: dict[str, Any]) -> Sent:
    return 200, says(body["messages"][-1]["content"])


class Server(ThreadingHTTPServer):
    """Answers with ``answer`` and keeps what it was asked."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.base_url = f"http://127.0.0.1:{self.server_port}/v1"
        self.answer: Callable[[dict[str, Any]], Sent] = echo
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.paths: list[str] = []
        self.most_at_once = 0
        self._at_once = 0
        self._lock = threading.Lock()

    def asked(self, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> Sent:
        with self._lock:
            self.bodies.append(body)
            self.keys.append(handler.headers["Authorization"])
            self.paths.append(handler.path)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            return self.answer(body)
        finally:
            with self._lock:
                self._at_once -= 1

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has given up is no fault of the server's."""


class _Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body at once: else the client's acknowledgement takes 40 ms

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        sent = self.server.asked(self, body)
        if sent is None:
            self.close_connection = True
            return
        status, content = sent
        if isinstance(content, Iterator):
            self._send_in_pieces(status, content)
            return
        text = content if isinstance(content, str) else json.dumps(content)
        self.send_response(status)
        kind = "text/html" if text.startswith("<") else "application/json"
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(text.encode())))
        self.send_header("Retry-After-Ms", "1")  # else the client would pause for half a second
        self.end_headers()
        self.wfile.write(text.encode())

    def _send_in_pieces(self, status: int, pieces: Iterator[str]) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Connection", "close")  # it ends with the body
        self.end_headers()
        for piece in pieces:
            self.wfile.write(piece.encode())
            self.wfile.flush()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with answering(Server()) as made:
        yield made


@pytest.fixture
def engine(server):
    """A function that makes an engine; one request at a time and no retry unless told otherwise."""
    made = []

    def make(**options: Any) -> OpenAIEngine:
        usual = {"base_url": server.base_url, "model": "m", "concurrency": 1, "max_retries": 0}
        made.append(OpenAIEngine(**{**usual, **options}))
        return made[-1]

    yield make
    for one in made:
        one.close()


# ---------------------------------------------------------------- requests


@pytest.mark.parametrize(
    ("usage", "tokens"),
    [({"completion_tokens": 5}, 5), ({"completion_tokens": "5"}, 0), ({}, 0), (None, 0), ("5", 0)],
)
def test_tokens_are_those_that_the_server_counts(server, engine, usage, tokens):
    server.answer = lambda body: (200, says("yes") | {"usage": usage})
    assert engine().reply([chat("a")], PARAMS) == [Reply("yes", tokens=tokens)]


def self_signed(folder: Path) -> Path:
    """A file with a key and a certificate for this machine that nobody has signed."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    form = serialization.Encoding.PEM
    plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    path = folder / "self-signed.pem"
    path.write_bytes(key.private_bytes(form, *plain) + certificate.public_bytes(form))
    return path


def test_a_server_is_asked_only_if_its_certificate_is_good(server, engine, tmp_path, monkeypatch):
    signed = self_signed(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(signed)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    https = {"base_url": f"https://localhost:{server.server_port}/v1"}
    assert engine(**https).reply([chat("a")], PARAMS) == [UNAVAILABLE]
    assert not server.bodies, "not a word was sent"
    monkeypatch.setenv("SSL_CERT_FILE", str(signed))  # now it is trusted
    assert engine(**https).reply([chat("a")], PARAMS) == [Reply("a")]


def test_halves_of_characters_are_replaced(server, engine):
    server.answer = lambda body: (200, says("a\ud800b \ud83d\ude00"))
    assert engine().reply([chat("a")], PARAMS) == [Reply("a\ufffdb \N{GRINNING FACE}")]


def test_a_request_says_what_to_write_and_nothing_more(server, engine):
    asked = [{"role": "system", "content": "Be."}, *chat("Hé?")]
    assert engine().reply([asked], PARAMS) == [Reply("Hé?")]
    assert server.paths == ["/v1/chat/completions"]
    (body,) = server.bodies
    assert body == {"model": "m", "messages": asked, "max_tokens": 20, "temperature": 0}


@pytest.mark.parametrize(
    "how, expected", [("vllm", {"structured_outputs": {"regex": "a+"}}), ("none", {})]
)
def test_a_pattern_goes_to_a_server_that_takes_it(server, engine, how, expected):
    engine(structured_outputs=how).reply([chat("a")], ReplyParams(20, 100, "a+"))
    (body,) = server.bodies
    assert {k: v for k, v in body.items() if k not in ("model", "messages")} == {
        "max_tokens": 20,
        "temperature": 0,
        **expected,
    }


def test_a_reply_that_is_cut_off_goes_on_from_where_it_was(server, engine):
    begun = "<opinion>correct</opinion>\n<reason>I th"
    server.answer = lambda body: (
        (200, says("ink.</phrase>"))
        if body["messages"][-1]["role"] == "assistant"
        else (200, says(begun, "length"))
    )
    form = FeedbackForm(96)
    (reply,) = ask_in_form(engine(), [chat("a")], form, 100)
    start = f"{begun}</reason>\n<phrase>"
    assert reply == Reply(f"{start}ink.</phrase>", closed=True)
    first, second = server.bodies
    assert "continue_final_message" not in first
    assert second == {
        "model": "m",
        "messages": [*chat("a"), {"role": "assistant", "content": start}],
        "max_tokens": form.closing_tokens,
        "temperature": 0,
        "structured_outputs": {"regex": form.closing_pattern},
        "continue_final_message": True,
        "add_generation_prompt": False,
    }


def test_a_server_without_patterns_is_not_asked_to_go_on(server, engine):
    begun = "<opinion>correct</opinion>\n<reason>I th"
    server.answer = lambda body: (200, says(begun, "length"))
    replies = ask_in_form(engine(structured_outputs="none"), [chat("a")], FeedbackForm(96), 100)
    assert replies == [Reply(begun, cut_off=True)]
    assert len(server.bodies) == 1


def test_the_key_is_sent_and_no_other(server, engine, monkeypatch):
    monkeypatch.setenv("TEACHERS_KEY", "s3cret")
    monkeypatch.setenv("OPENAI_API_KEY", "somebody else's")
    engine(api_key_env="TEACHERS_KEY").reply([chat("a")], PARAMS)
    engine().reply([chat("a")], PARAMS)
    assert server.keys == ["Bearer s3cret", "Bearer none"]


@pytest.mark.parametrize("value", [None, ""])
def test_a_key_that_is_not_set_is_named(monkeypatch, value):
    monkeypatch.delenv("TEACHERS_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("TEACHERS_KEY", value)
    with pytest.raises(InputError, match="variable TEACHERS_KEY with the key isn't set"):
        OpenAIEngine("http://127.0.0.1:1/v1", "m", api_key_env="TEACHERS_KEY")


def test_faults_of_the_arguments_come_together(monkeypatch):
    monkeypatch.delenv("TEACHERS_KEY", raising=False)
    with pytest.raises(InputError) as caught:
        OpenAIEngine("127.0.0.1:8000/v1", "m", "TEACHERS_KEY", 0, 0.0, -1)
    for words in ("base_url", "concurrency", "timeout", "max_retries", "TEACHERS_KEY"):
        assert words in str(caught.value)


@pytest.mark.parametrize("timeout", [0.0, math.nan, math.inf])
def test_a_timeout_is_a_number_above_zero(timeout):
    with pytest.raises(InputError, match="timeout must be positive and finite, got"):
        OpenAIEngine("http://127.0.0.1:1/v1", "m", timeout=timeout)


def test_what_may_be_the_key_itself_is_not_shown(monkeypatch):
    monkeypatch.delenv("hf_AbCs3cret", raising=False)
    for given in ("hf_AbCs3cret", "sk-s3cret", "s3cret", "\ud800s3cret"):
        with pytest.raises(InputError, match="api_key_env must be the name of") as caught:
            OpenAIEngine("http://127.0.0.1:1/v1", "m", api_key_env=given)
        assert "s3cret" not in str(caught.value)


def test_a_variable_may_have_any_name(server, engine, monkeypatch):
    monkeypatch.setenv("teacher_key", "s3cret")
    engine(api_key_env="teacher_key").reply([chat("a")], PARAMS)
    assert server.keys == ["Bearer s3cret"]


@pytest.mark.parametrize(
    "url",
    [
        "https://me:s3cret@host/v1",
        "https://s3cret@host/v1",
        "http://me:s3cret@host:80a/v1",
        "http://me:s3/cret@host/v1",
        "me:s3cret@host/v1",
        "https://host/v1?api_key=s3cret",
        "https://host/v1#s3cret",
        "host?s3cret",
    ],
)
def test_a_key_in_an_address_is_refused_and_not_shown(url):
    with pytest.raises(InputError, match="base_url may have no name, password, query") as caught:
        OpenAIEngine(url, "m")
    assert "cret" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["", "localhost:8000", "http://", "http://host:port/v1", "http://[::1/v1", "ftp://a/v1"]
)
def test_a_url_that_is_none_is_refused_at_once(url):
    # A request to it would fail like one to a server that is down, all run long.
    with pytest.raises(InputError, match="base_url must be like http://"):
        OpenAIEngine(url, "m")


@pytest.mark.parametrize(
    "host, told",
    [
        ("http://teacher.invalid", True),
        ("http://10.0.0.7:8000", True),
        ("http://[2001:db8::1]", True),
        ("http://localhost.invalid", True),
        ("https://teacher.invalid", False),
        ("http://LOCALHOST:8000", False),
        ("http://127.8.0.1", False),
        ("http://[::1]:8000", False),
    ],
)
def test_a_key_in_clear_text_is_told(engine, monkeypatch, caplog, host, told):
    monkeypatch.setenv("TEACHERS_KEY", "s3cret")
    engine(base_url=f"{host}/v1")
    assert not caplog.messages, "no key, nothing to tell"
    engine(base_url=f"{host}/v1", api_key_env="TEACHERS_KEY")
    assert (
        caplog.messages
        == [
            f"the API key goes to {host}/v1 in clear text, where others on the way can read it; "
            "use https"
        ]
        * told
    )
    assert "s3cret" not in caplog.text


PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture
def proxy(monkeypatch) -> Callable[[str], None]:
    """Sets the proxy of the environment."""
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)

    def put(url: str) -> None:
        for name in PROXIES[:3]:
            monkeypatch.setenv(name, url)

    return put


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_proxy_is_not_asked_for_this_machine(server, engine, proxy, host):
    proxy("http://127.0.0.1:1")
    url = server.base_url.replace("127.0.0.1", host)
    assert engine(base_url=url).reply([chat("a")], PARAMS) == [Reply("a")]


def test_a_proxy_is_asked_for_other_machines(server, engine, proxy):
    proxy(server.base_url.removesuffix("/v1"))
    url = "http://teacher.invalid/v1"
    assert engine(base_url=url).reply([chat("a")], PARAMS) == [Reply("a")]
    assert server.paths == [f"{url}/chat/completions"]


# ---------------------------------------------------------------- many chats


def test_replies_come_in_the_order_of_the_chats(server, engine):
    # The server answers the last one first.
    answered = [threading.Event() for _ in range(5)]
    answered[4].set()

    def answer(body: dict[str, Any]) -> Sent:
        number = int(body["messages"][-1]["content"])
        assert answered[number + 1].wait(10), "its successor wasn't asked meanwhile"
        answered[number].set()
        return echo(body)

    server.answer = answer
    replies = engine(concurrency=4).reply([chat(str(i)) for i in range(4)], PARAMS)
    assert replies == [Reply(str(i)) for i in range(4)]


def test_as_many_requests_at_a_time_as_allowed_and_no_more(server, engine):
    four = threading.Barrier(4, timeout=10)

    def answer(body: dict[str, Any]) -> Sent:
        four.wait()  # breaks, and is then a request that fails, unless four come together
        time.sleep(0.05)  # gives a fifth the time to come
        return echo(body)

    server.answer = answer
    replies = engine(concurrency=4).reply([chat(str(i)) for i in range(12)], PARAMS)
    assert replies == [Reply(str(i)) for i in range(12)]
    assert server.most_at_once == 4


@pytest.mark.parametrize("concurrency, retries", [(1, 0), (1, 1), (3, 0)])
def test_after_a_failure_the_rest_of_the_step_is_not_tried(server, engine, concurrency, retries):
    server.answer = lambda body: (500, fault("boom"))
    asks = engine(concurrency=concurrency, max_retries=retries)
    assert asks.reply([chat(str(i)) for i in range(20)], PARAMS) == [UNAVAILABLE] * 20
    assert len(server.bodies) <= concurrency * (1 + retries)
    before = len(server.bodies)
    asks.reply([chat("a")], PARAMS)
    assert len(server.bodies) == before + 1 + retries, "the next step tries again"


def test_what_was_answered_before_a_failure_is_kept(server, engine):
    server.answer = lambda body: (
        (500, fault("boom")) if body["messages"][-1]["content"] == "2" else echo(body)
    )
    replies = engine().reply([chat(str(i)) for i in range(4)], PARAMS)
    assert replies == [Reply("0"), Reply("1"), UNAVAILABLE, UNAVAILABLE]


# ---------------------------------------------------------------- faults that pass


def test_a_request_that_fails_is_tried_again(server, engine, caplog):
    answers = iter([(500, fault("boom")), None, (429, fault("slowly")), (200, says("yes"))])
    server.answer = lambda body: next(answers)
    assert engine(max_retries=3).reply([chat("a")], PARAMS) == [Reply("yes")]
    assert len(server.bodies) == 4
    assert caplog.messages == []


def test_retries_end(server, engine):
    server.answer = lambda body: (503, fault("boom"))
    assert engine(max_retries=3).reply([chat("a")], PARAMS) == [UNAVAILABLE]
    assert len(server.bodies) == 4


FAULTS: dict[str, Sent] = {
    "error": (500, fault("boom")),
    "error page": (502, "<html>" + "<p>Bad gateway</p>\n" * 200),
    "too many requests": (429, fault("slowly")),
    "request timeout": (408, fault("too late")),
    "conflict": (409, fault("locked")),
    "hangs up": None,
    "nothing": (200, ""),
    "no JSON": (200, "{half a comple"),
    "a page": (200, "<html>Welcome!</html>"),
    "null": (200, "null"),
    "a number": (200, "17"),
    "a list": (200, []),
    "an object": (200, {}),
    "an error in disguise": (200, fault("boom")),
    "null choices": (200, {"choices": None}),
    "no choices": (200, {"choices": []}),
    "odd choices": (200, {"choices": {"a": 1}}),
    "empty choice": (200, {"choices": [{}]}),
    "null choice": (200, {"choices": [None]}),
    "null message": (200, {"choices": [{"message": None}]}),
    "parts": (200, {"choices": [{"message": {"content": [{"text": "a"}]}}]}),
}


@pytest.mark.parametrize("sent", FAULTS.values(), ids=FAULTS.keys())
def test_what_is_no_answer_leaves_a_rollout_unguided(server, engine, caplog, sent):
    server.answer = lambda body: sent
    assert engine().reply([chat("a")], PARAMS) == [UNAVAILABLE]
    (warning,) = caplog.messages
    assert f"teacher at {server.base_url} doesn't answer (" in warning
    assert "\n" not in warning and len(warning) < 600


def test_nobody_listens(engine, caplog):
    assert engine(base_url="http://127.0.0.1:1/v1").reply([chat("a")], PARAMS) == [UNAVAILABLE]
    assert "http://127.0.0.1:1/v1 doesn't answer (Connection error.)" in caplog.text


def test_a_server_that_is_silent_is_not_waited_for(server, engine, caplog):
    tested = threading.Event()

    def answer(body: dict[str, Any]) -> Sent:
        tested.wait(10)
        return echo(body)

    server.answer = answer
    replies = engine(timeout=0.3, max_retries=0).reply([chat("a")], PARAMS)
    tested.set()
    assert replies == [UNAVAILABLE]
    assert "doesn't answer (Request timed out.)" in caplog.text


@pytest.mark.parametrize("status", [200, 500])
def test_a_server_that_trickles_is_not_waited_for(server, engine, caplog, status):
    tested = threading.Event()

    def blanks() -> Iterator[str]:
        for _ in range(300):
            yield " "
            if tested.wait(0.05):
                return
        yield json.dumps(says("a"))

    server.answer = lambda body: (status, blanks())
    replies = engine(timeout=0.3, max_retries=1).reply([chat("a")], PARAMS)
    tested.set()
    assert replies == [UNAVAILABLE]
    assert len(server.bodies) == 2
    assert "doesn't answer (Request timed out.)" in caplog.text


def test_one_warning_when_it_goes_and_one_when_it_is_back(server, engine, caplog):
    asks = engine(concurrency=4)
    steps = [False, True, True, True, False, False, True, False]
    for down in steps:
        server.answer = (lambda body: (500, fault("boom"))) if down else echo
        replies = asks.reply([chat(str(i)) for i in range(8)], PARAMS)
        assert all((r.skipped == "unavailable") == down for r in replies)
    what = ["answers again" if "answers again" in m else m.split(" (")[0] for m in caplog.messages]
    away = f"the teacher at {server.base_url} doesn't answer"
    assert what == [away, "answers again", away, "answers again"]


def test_an_answer_without_words_is_an_answer(server, engine):
    server.answer = lambda body: (200, says(None))
    assert engine().reply([chat("a")], PARAMS) == [Reply("")]


# ---------------------------------------------------------------- refusals

TOO_LONG = {
    "vLLM": fault("This model's maximum context length is 8 tokens. However, …", code=400),
    "OpenAI": fault("Too much.", code="context_length_exceeded"),
    "llama.cpp": fault("request (9 tokens) exceeds the available context size (8 tokens)"),
}


@pytest.mark.parametrize("body", TOO_LONG.values(), ids=TOO_LONG.keys())
def test_a_prompt_that_is_too_long_skips_it_alone(server, engine, caplog, body):
    server.answer = lambda asked: (
        (400, body) if asked["messages"][-1]["content"] == "long" else echo(asked)
    )
    replies = engine().reply([chat("a"), chat("long"), chat("b")], PARAMS)
    assert replies == [Reply("a"), Reply(skipped="prompt_too_long"), Reply("b")]
    assert caplog.messages == []


REFUSALS: dict[str, tuple[int, dict[str, Any] | str, str]] = {
    "argument": (400, fault("structured_outputs isn't\nknown"), "structured_outputs isn't known"),
    "key": (401, fault("Wrong key."), "Wrong key.*api_key_env"),
    "rights": (403, fault("Not for you."), "Not for you.*api_key_env"),
    "model": (404, fault("The model `m` does not exist."), "`m` does not exist.*model"),
    "path": (404, "<html>" + "<p>Not found</p>\n" * 200, "404.*base_url"),
    "detail": (404, {"detail": "Not Found"}, "404.*base_url"),
    "long": (422, fault("a very long story\n" * 200), "422.*a very long story"),
}


@pytest.mark.parametrize("status, body, said", REFUSALS.values(), ids=REFUSALS.keys())
def test_a_refusal_ends_the_run_in_few_words(server, engine, status, body, said):
    server.answer = lambda asked: (status, body)
    with pytest.raises(InputError, match=said) as caught:
        engine(max_retries=2).reply([chat("a"), chat("b")], PARAMS)
    message = str(caught.value)
    assert f"the teacher at {server.base_url} refuses" in message
    assert message.count("\n") < 5 and len(message) < 700
    # Another thread may already have asked the next one; nothing is asked a second time.
    texts = [b["messages"][-1]["content"] for b in server.bodies]
    assert sorted(set(texts)) == sorted(texts)


def repeats_the_key(status: int) -> Callable[[dict[str, Any]], Sent]:
    return lambda body: (status, fault("Wrong: Bearer s3cret, and s3cret again"))


def test_a_key_that_a_refusal_repeats_is_not_shown(server, engine, monkeypatch):
    monkeypatch.setenv("TEACHERS_KEY", "s3cret")
    server.answer = repeats_the_key(401)
    with pytest.raises(InputError, match=r"Bearer \[the key\], and \[the key\] again") as caught:
        engine(api_key_env="TEACHERS_KEY").reply([chat("a")], PARAMS)
    assert "s3cret" not in "".join(traceback.format_exception(caught.value))


def test_a_key_that_a_failure_repeats_is_not_shown(server, engine, monkeypatch, caplog):
    monkeypatch.setenv("TEACHERS_KEY", "s3cret")
    server.answer = repeats_the_key(500)
    engine(api_key_env="TEACHERS_KEY").reply([chat("a")], PARAMS)
    assert "Bearer [the key], and [the key] again" in caplog.text
    assert "s3cret" not in caplog.text


def test_without_a_key_an_answer_is_quoted_as_it_is(server, engine):
    server.answer = lambda body: (401, fault("none, none at all"))
    with pytest.raises(InputError, match="none, none at all"):
        engine().reply([chat("a")], PARAMS)


# ---------------------------------------------------------------- the command line


def served(base_url: str) -> list[str]:
    """Options that make a server the teacher."""
    return [
        "--guidance.teacher=thinktuning.engines.OpenAIEngine",
        f"--guidance.teacher.base_url={base_url}",
        "--guidance.teacher.model=teacher",
        "--guidance.teacher.max_retries=0",
        "--guidance.teacher.timeout=60",
        "--guidance.behaviors=[self_agreement]",  # the others' prompts are longer than its context
    ]


@pytest.mark.slow
def test_a_run_that_the_server_refuses_ends_without_a_traceback(
    student, questions, tmp_path, server
):
    server.answer = lambda body: (401, fault("Wrong key."))
    options = served(server.base_url)
    with pytest.raises(SystemExit) as caught:
        main(fit_arguments(student(), questions, tmp_path, *options))
    assert str(caught.value.code).startswith(f"error: the teacher at {server.base_url} refuses")
    assert "Wrong key." in str(caught.value.code)


# ---------------------------------------------------------------- a real server


@pytest.fixture(scope="module")
def vllm(tmp_path_factory) -> Iterator[VllmServer]:
    folder = tmp_path_factory.mktemp("teacher")
    tiny.save(folder / "model", "llama", "own_pad", width=64, heads=2)
    made = VllmServer(folder / "model", folder / "server.log")
    try:
        made.start()
        yield made
    finally:
        made.stop()


def sums() -> list[Chat]:
    behaviors = load_behaviors(["self_agreement"])
    return [
        teacher_chat(behaviors, f"{a} plus {a}?", f"It is \\boxed{{{2 * a}}}.") for a in range(8)
    ]


@pytest.mark.slow
def test_vllm_keeps_every_reply_to_the_form(vllm):
    form = FeedbackForm(96)
    free = OpenAIEngine(vllm.base_url, "teacher", structured_outputs="none")
    assert all(parse_feedback(r.text) is None for r in ask_in_form(free, sums(), form, 2000)), (
        "this model knows nothing of the form"
    )
    replies = ask_in_form(OpenAIEngine(vllm.base_url, "teacher"), sums(), form, 2000)
    assert len(replies) == 8
    assert all(parse_feedback(r.text) is not None for r in replies)
    assert any(r.closed for r in replies), "a random model doesn't close by itself"


@pytest.mark.slow
def test_vllm_skips_a_prompt_that_is_too_long(vllm):
    replies = OpenAIEngine(vllm.base_url, "teacher").reply(
        [chat("a b " * 2000), chat("a")], ReplyParams(8, 10_000)
    )
    assert [r.skipped for r in replies] == ["prompt_too_long", None]


@pytest.mark.slow
def test_vllm_refuses_a_model_that_it_has_not(vllm):
    with pytest.raises(InputError, match="The model `nosuch` does not exist"):
        OpenAIEngine(vllm.base_url, "nosuch").reply([chat("a")], PARAMS)


@pytest.mark.slow
def test_a_run_goes_on_while_its_server_is_down(student, questions, tmp_path, vllm):
    steps = 5
    waits = [
        "--trainer.callbacks+=serving.WaitsBeforeGuidance",
        f"--trainer.callbacks.folder={tmp_path}",
        "--trainer.callbacks.steps=[1,3]",
    ]
    arguments = fit_arguments(
        student(),
        questions,
        tmp_path,
        *served(vllm.base_url),
        *waits,
        f"--trainer.max_steps={steps}",
        "--model.max_new_tokens=224",  # room for what this teacher says
    )
    paths = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    with (tmp_path / "log").open("w") as log:
        run = subprocess.Popen(
            [sys.executable, "-m", "thinktuning.cli", *arguments],
            env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=log,
        )

    def printed() -> str:
        return (tmp_path / "log").read_text()

    def wait_for(step: int) -> None:
        at = tmp_path / f"waits-{step}"
        wait_until(lambda: at.exists() or run.poll() is not None, f"the run is at step {step}")
        assert run.poll() is None, printed()[-3000:]

    try:
        wait_for(1)
        vllm.kill()
        (tmp_path / "leave-1").touch()
        wait_for(3)
        vllm.start()
        (tmp_path / "leave-3").touch()
        assert run.wait(120) == 0, printed()[-3000:]
    finally:
        run.kill()
        run.wait()

    rows = {step: [] for step in range(steps)}
    for row in audit(tmp_path / "version_0"):
        rows[row["step"]].append(row)
    for step in (1, 2):
        assert rows[step]
        assert all(row["skipped"] == "unavailable" for row in rows[step])
        assert all(row["teacher"] == "" and row["after"] is None for row in rows[step])
    for step in (0, 3, 4):
        assert rows[step]
        assert all(parse_feedback(row["teacher"]) for row in rows[step])
        assert any(row["after"] for row in rows[step]), "guided"
    assert checkpoint(tmp_path)["global_step"] == steps
    assert printed().count("doesn't answer (Connection error.); rollouts stay unguided") == 1
    assert printed().count("answers again") == 1
