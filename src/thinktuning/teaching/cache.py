"""The teacher's replies on disk, so that a repeated run or an ablation doesn't pay twice."""

import json
import os
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from uuid import uuid4

from thinktuning.errors import InputError
from thinktuning.teaching.teacher import Chat, Reply, ReplyParams, Teacher


class CachedTeacher(Teacher):
    """Asks its teacher only what it hasn't been asked before.

    One JSON file per reply, named by the hash of the teacher's identity, the chat and the
    sampling settings. Files are renamed into place, so that processes may share the folder; one
    that can't be read is asked for again and replaced. What can't be written (a full disk) is
    counted and not kept, and the run goes on.

    Args:
        teacher: Whom to ask. A reply that isn't there (a prompt too long, a server down) isn't
            kept.
        folder: Where the replies lie; made where it is missing.

    Raises:
        InputError: If the folder can't be made.
    """

    def __init__(self, teacher: Teacher, folder: Path) -> None:
        self.teacher = teacher
        self.folder = folder
        self.can_continue = teacher.can_continue
        self.damaged = 0  # entries that could not be read
        self.unwritten = 0  # entries that could not be written
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"guidance: the cache of replies needs a folder, but {str(folder)!r} can't be one "
                f"({error.strerror}); give another path as guidance.cache"
            ) from error

    @property
    def identity(self) -> str:
        """That of the teacher behind it."""
        return self.teacher.identity

    def reply(self, chats: Sequence[Chat], params: ReplyParams) -> list[Reply]:
        """Answer from the disk where possible; see ``Teacher``."""
        keys = [self._key(chat, params) for chat in chats]
        known = {key: self._read(key) for key in dict.fromkeys(keys)}
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
            # A teacher's text may hold lone surrogates, which strict UTF-8 refuses.
            entry = json.loads(path.read_bytes().decode("utf-8", "surrogatepass"))
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
        scratch = path.with_name(f"{uuid4().hex}.tmp")
        entry = {"key": key, "text": reply.text, "cut_off": reply.cut_off}
        try:
            path.parent.mkdir(exist_ok=True)
            scratch.write_bytes(
                json.dumps(entry, ensure_ascii=False).encode("utf-8", "surrogatepass")
            )
            os.replace(scratch, path)
        except OSError as error:
            self.unwritten += 1
            # Without the entry's name, so that it is shown once.
            warnings.warn(
                f"the teacher's replies can't be kept in {str(self.folder)!r} ({error.strerror}); "
                f"the run goes on, but what isn't kept is asked again",
                stacklevel=2,
            )
        finally:
            with suppress(OSError):
                scratch.unlink()
