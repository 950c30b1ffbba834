"""Text in, token ids out: the tokenizer and the chat template of a model folder, and files of prompts."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from tidesim.errors import InputError, ModelError
from tidesim.shipped import shipped_folder

MASK_TOKEN = "<|mask|>"
END_TOKEN = "<|endoftext|>"

Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One request: plain text that the model continues, or the messages of a chat."""

    text: str = ""
    messages: tuple[Message, ...] = ()


class TextCodec:
    """Tokenizer and chat template of one model folder.

    Raise ModelError if the folder has no readable tokenizer.json, or one without a mask or an end-of-text token.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise ModelError(f"{folder}: there is no tokenizer.json; copy the one that belongs to the model there.")
        try:
            self._tokenizer = Tokenizer.from_str(file.read_text(encoding="utf-8"))
        # The tokenizers library raises nothing narrower for a file that it cannot parse.
        except Exception as error:
            raise ModelError(f"{file}: not a readable tokenizer ({error}).") from None
        self.mask_id = self._special(MASK_TOKEN)
        self.end_id = self._special(END_TOKEN)
        self._template = _chat_template(folder)

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt; messages go through the chat template first.

        Raise ModelError for messages where the model has no chat template, or one that fails on them.
        """
        text = self._render(prompt.messages) if prompt.messages else prompt.text
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def _special(self, token: str) -> int:
        token_id = self._tokenizer.token_to_id(token)
        if token_id is None:
            raise ModelError(f"{self.folder / 'tokenizer.json'}: has no token {token}, which LLaDA2 decoding needs.")
        return int(token_id)

    def _render(self, messages: Sequence[Message]) -> str:
        if self._template is None:
            raise ModelError(f"{self.folder}: has no chat template; give the prompt as plain text instead.")
        # A template is a program from the model folder, so it runs in a sandbox that reaches nothing but its input.
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        try:
            template = environment.from_string(self._template)
            return template.render(messages=list(messages), add_generation_prompt=True)
        except TemplateError as error:
            raise ModelError(f"{self.folder}: the chat template failed ({error}).") from None


def read_prompts(file: Path | None, limit: int | None, is_chat: bool) -> list[Prompt]:
    """Prompts of a JSONL file, or the built-in ones if `file` is None.

    A line is {"prompt": text} or {"messages": [{"role": ..., "content": ...}]}. `is_chat` turns every plain prompt
    into a chat with one user message; `limit` keeps the first so many.
    Raise InputError naming the line that cannot be used, or if there is none.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit(={limit}) must be >= 1.")
    path = file or shipped_folder("models") / "llada2-tiny" / "prompts.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as text ({error}).") from None
    rows = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()][:limit]
    if not rows:
        raise InputError(f"{path}: holds no prompt; one JSON object a line is expected.")
    return [_parse_prompt(line, f"{path}, line {number}", is_chat) for number, line in rows]


def _parse_prompt(line: str, where: str, is_chat: bool) -> Prompt:
    expected = 'expected {"prompt": text} or {"messages": [{"role": ..., "content": ...}]}'
    try:
        row = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where}: not JSON ({error}); {expected}.") from None
    text = row.get("prompt") if isinstance(row, dict) else None
    messages = row.get("messages") if isinstance(row, dict) else None
    if isinstance(text, str) and text and messages is None:
        return Prompt(messages=({"role": "user", "content": text},)) if is_chat else Prompt(text=text)
    if text is None and isinstance(messages, list) and messages and all(map(_is_message, messages)):
        return Prompt(messages=tuple(messages))
    raise InputError(f"{where}: {expected}.")


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))


def _chat_template(folder: Path) -> str | None:
    """The chat template: a file of its own, or a key of tokenizer_config.json."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    file = folder / "tokenizer_config.json"
    if not file.is_file():
        return None
    try:
        template = json.loads(file.read_text(encoding="utf-8")).get("chat_template")
    except (ValueError, AttributeError):
        raise ModelError(f"{file}: a JSON object is expected.") from None
    return template if isinstance(template, str) else None
