"""Prompts and tokenizers of model folders."""

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("torch")

from tokenizers import Tokenizer, models

from tidesim.engine.tokenizer import Prompt, TextCodec, read_prompts
from tidesim.errors import InputError, ModelError
from tidesim.shipped import shipped_folder

TINY = shipped_folder("models") / "llada2-tiny"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, tmp_path / name)
    return tmp_path


def test_text_survives_the_round_trip() -> None:
    codec = TextCodec(TINY)
    text = 'def f(x):\n    """Grüße, 世界."""\n\treturn x ** 2\n'
    assert codec.decode(codec.encode(Prompt(text=text))) == text
    assert len(codec.encode(Prompt(text=text))) < len(text)


def test_messages_go_through_the_chat_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}!")
    codec = TextCodec(folder)
    prompt = Prompt(messages=({"role": "user", "content": "x = 1"},))
    assert codec.decode(codec.encode(prompt)) == "[user]x = 1!"


def test_a_template_cannot_reach_outside_its_sandbox(folder: Path) -> None:
    escape = "{{ messages.__class__.__base__.__subclasses__() }}"
    (folder / "chat_template.jinja").write_text(escape)
    with pytest.raises(ModelError, match="chat template failed"):
        TextCodec(folder).encode(Prompt(messages=({"role": "user", "content": "x"},)))


def test_a_folder_without_template_takes_plain_text_only(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()
    codec = TextCodec(folder)
    assert codec.encode(Prompt(text="x"))
    with pytest.raises(ModelError, match="no chat template"):
        codec.encode(Prompt(messages=({"role": "user", "content": "x"},)))


def test_unusable_tokenizers_are_refused(folder: Path) -> None:
    Tokenizer(models.BPE()).save(str(folder / "tokenizer.json"))
    with pytest.raises(ModelError, match=r"has no token <\|mask\|>"):
        TextCodec(folder)
    (folder / "tokenizer.json").write_text("{]")
    with pytest.raises(ModelError, match="not a readable tokenizer"):
        TextCodec(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        TextCodec(folder)


def test_prompts_are_read_line_by_line(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    messages = [{"role": "user", "content": "hi"}]
    file.write_text(json.dumps({"prompt": "a"}) + "\n\n" + json.dumps({"messages": messages}) + "\n")
    assert read_prompts(file, None, is_chat=False) == [Prompt(text="a"), Prompt(messages=tuple(messages))]
    assert read_prompts(file, 1, is_chat=True) == [Prompt(messages=({"role": "user", "content": "a"},))]
    assert len(read_prompts(None, None, is_chat=False)) >= 8


@pytest.mark.parametrize(
    "line",
    ["{", "[]", "{}", '{"prompt": 3}', '{"prompt": ""}', '{"messages": []}', '{"messages": [{"role": "user"}]}', '"x"'],
)
def test_a_bad_prompt_names_its_line(tmp_path: Path, line: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "fine"}\n' + line + "\n")
    with pytest.raises(InputError, match="line 2"):
        read_prompts(file, None, is_chat=False)


def test_missing_and_empty_prompt_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_prompts(tmp_path / "none.jsonl", None, is_chat=False)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(InputError, match="holds no prompt"):
        read_prompts(tmp_path / "empty.jsonl", None, is_chat=False)
    with pytest.raises(InputError, match="limit"):
        read_prompts(None, 0, is_chat=False)
