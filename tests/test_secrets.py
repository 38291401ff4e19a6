"""The teacher's key is nowhere in what a run leaves, and code in a model's folder isn't run."""

import io
import json
import shutil
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from running import audit, fit_arguments, run
from scripted import ScriptedTeacher
from serving import answering

from thinktuning.cli import main
from thinktuning.teaching import ReplyParams

pytestmark = [pytest.mark.slow, pytest.mark.faults]

KEY = "sk-th1s-1s-the-s3cret"


class TalkativeServer(ThreadingHTTPServer):
    """A teacher that fails first and refuses in the end, and repeats the key both times."""

    daemon_threads = True
    refuses_from = 6  # of its requests; those of one step are 4 at most

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.keys: list[str] = []

    def answer(self, authorization: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        self.keys.append(authorization)
        said = {"error": {"message": f"Don't know {authorization}", "sent": authorization}}
        if len(self.keys) == 1:
            return 500, said
        if len(self.keys) >= self.refuses_from:
            return 401, said
        (reply,) = ScriptedTeacher().reply([body["messages"]], ReplyParams(1, 1))
        message = {"role": "assistant", "content": reply.text}
        return 200, {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}


class _Handler(BaseHTTPRequestHandler):
    server: TalkativeServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        status, answer = self.server.answer(self.headers["Authorization"], body)
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[TalkativeServer]:
    with answering(TalkativeServer()) as made:
        yield made


def test_a_run_leaves_the_key_nowhere(student, questions, tmp_path, server):
    root = tmp_path / "runs"
    options = [
        "--guidance.teacher=thinktuning.engines.OpenAIEngine",
        f"--guidance.teacher.base_url=http://127.0.0.1:{server.server_port}/v1",
        "--guidance.teacher.model=teacher",
        "--guidance.teacher.api_key_env=TEACHERS_KEY",
        "--guidance.teacher.max_retries=0",
        "--guidance.teacher.concurrency=1",
        "--data.batch_size=2",
        "--trainer.max_steps=10",
    ]
    fit = fit_arguments(student(), questions, root, *options)
    done = run([sys.executable, "-m", "thinktuning.cli", *fit], timeout=900, TEACHERS_KEY=KEY)
    assert set(server.keys) == {f"Bearer {KEY}"}
    assert done.returncode == 1
    assert "doesn't answer" in done.stderr and "refuses the request" in done.stderr
    assert done.stderr.count("Don't know Bearer [the key]") == 2, "what it said is told"
    assert KEY not in done.stdout + done.stderr

    (version,) = root.iterdir()
    assert any(row["after"] for row in audit(version)), "it was taught"
    assert (version / "checkpoints" / "last.ckpt").exists()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path for path in files if KEY.encode() in path.read_bytes()] == []


def test_code_in_a_models_folder_is_not_run(student, questions, tmp_path, monkeypatch):
    folder, ran = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(student(), folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.MyConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text(f"import pathlib\npathlib.Path({str(ran)!r}).touch()\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))  # Transformers may ask whether to
    with pytest.raises(SystemExit, match="contains custom code"):
        main(fit_arguments(folder, questions, tmp_path / "runs"))
    assert not ran.exists()
