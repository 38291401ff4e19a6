"""The teacher's replies on disk, so that a repeated run or an ablation doesn't pay twice."""

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path

from thinktuning.teaching.teacher import Chat, Reply, ReplyParams, Teacher


class CachedTeacher(Teacher):
    """Asks its teacher only what it hasn't been asked before.

    One JSON file per reply, named by the hash of the teacher's identity, the chat and the
    sampling settings. Files are renamed into place, so that processes may share the folder; one
    that can't be read is asked for again and replaced.

    Args:
        teacher: Whom to ask. A reply that isn't there (a prompt too long, a server down) isn't
            kept.
        folder: Where the replies lie; made where it is missing.
    """

    def __init__(self, teacher: Teacher, folder: Path) -> None:
        self.teacher = teacher
        self.folder = folder
        self.can_continue = teacher.can_continue
        self.damaged = 0  # entries that could not be read

    @property
    def identity(self) -> str:
        """That of the teacher behind it."""
        return self.teacher.identity

    def reply(self, chats: Sequence[Chat], params: ReplyParams) -> list[Reply]:
        """Answer from the disk where possible; see ``Teacher``."""
        keys = [self._key(chat, params) for chat in chats]
        known = {key: self._read(key) for key in keys}
        # A question that occurs twice in a step is asked once.
        missing = {k: c for k, c in zip(keys, chats, strict=True) if known[k] is None}
        asked = self.teacher.reply(list(missing.values()), params) if missing else []
        new = dict(zip(missing, asked, strict=True))
        for key, reply in new.items():
            if reply.skipped is None:
                self._write(key, reply)
        return [known[key] or new[key] for key in keys]

    def _key(self, chat: Chat, params: ReplyParams) -> str:
        asked = {"teacher": self.identity, "chat": list(chat), "params": asdict(params)}
        return json.dumps(asked, sort_keys=True, ensure_ascii=False)

    def _path(self, key: str) -> Path:
        digest = sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
        return self.folder / digest[:2] / f"{digest}.json"

    def _read(self, key: str) -> Reply | None:
        path = self._path(key)
        try:
            entry = json.loads(path.read_text(encoding="utf-8"))
            text, cut_off = entry["text"], entry["cut_off"]
            if entry["key"] != key or not isinstance(text, str) or not isinstance(cut_off, bool):
                raise ValueError("another entry")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError):
            self.damaged += 1
            return None
        return Reply(text, cut_off, cached=True)

    def _write(self, key: str, reply: Reply) -> None:
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        entry = {"key": key, "text": reply.text, "cut_off": reply.cut_off}
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, suffix=".tmp", delete=False, encoding="utf-8"
        ) as file:
            json.dump(entry, file)
        os.replace(file.name, path)
