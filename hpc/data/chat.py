"""Prompts in the chat template that a model's tokenizer brings, and answers as it writes them."""

from __future__ import annotations

from typing import Any

from hpc.errors import DataError


def require_chat_template(tokenizer: Any) -> None:
    """Raise `DataError` if the tokenizer has no chat template."""
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            "--data.chat_template true: this model's tokenizer brings no chat template; leave it off, or use the "
            "model's chat (or instruct) variant"
        )


def in_chat(tokenizer: Any, prompt: str) -> str:
    """The prompt as the user's turn, up to where the model's begins."""
    return str(tokenizer.apply_chat_template([_turn("user", prompt)], tokenize=False, add_generation_prompt=True))


def answer_in_chat(tokenizer: Any, prompt: str, answer: str) -> str:
    """The answer as it stands in the model's turn: with the space before it, if the template puts one."""
    turns, answer = [_turn("user", prompt), _turn("assistant", answer.strip())], answer.strip()
    opened, whole = in_chat(tokenizer, prompt), str(tokenizer.apply_chat_template(turns, tokenize=False))
    place = whole.find(answer, len(opened))
    return whole[len(opened) : place + len(answer)] if whole.startswith(opened) and place >= 0 else answer


def _turn(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}
