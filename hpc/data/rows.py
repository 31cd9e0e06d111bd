"""From prompts and answers to rows of token ids."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from hpc.data.chat import answer_in_chat, in_chat
from hpc.data.tasks import Example
from hpc.errors import DataError

INTERPOLATIONS = 6
LEAST_CONTEXT = "."  # what an answer is tokenised behind, where the prompt ends with its passage


@dataclass(kw_only=True, frozen=True)
class Row:
    """Token ids of a prompt and its answer; the first `prompt_len` are the prompt's (BOS included)."""

    ids: list[int]
    prompt_len: int


@dataclass(kw_only=True, frozen=True)
class Encoder:
    """A tokenizer, and how long prompts and answers may be."""

    tokenizer: Any
    max_source_length: int
    max_target_length: int
    chat: bool = False
    """Whether prompts are put into the tokenizer's chat template."""

    def row(self, example: Example) -> Row:
        """The prompt and its right answer. Raises `DataError` if either does not fit."""
        prompt = self.prompt(example)
        return Row(ids=prompt + self.answer(example, example.answer), prompt_len=len(prompt))

    def prompt(self, example: Example) -> list[int]:
        """At most `max_source_length` ids; a longer prompt loses a part of its passage, and nothing else.

        Raises `DataError` if the prompt is too long even without the passage.
        """
        whole = self._encode_prompt(example.prompt())
        if len(whole) <= self.max_source_length:
            return whole
        kept = self._encode_prompt(example.prompt(0)) if example.passage else whole
        if len(kept) > self.max_source_length:
            raise DataError(self._too_long(example, len(kept)))
        return self._longest_that_fits(example, kept, len(whole))

    def _longest_that_fits(self, example: Example, kept: list[int], whole: int) -> list[int]:
        """The prompt with as much of its passage as there is room for, which is less than all of it (`whole` tokens).

        A search over characters works with every tokenizer, and `kept` is only ever a length that was tried. Tokens are
        nearly in proportion to characters, so interpolation comes close at once; bisection ends what it cannot.
        """
        limit, fits, too_long = self.max_source_length, 0, len(example.passage)
        tries = 0
        while too_long - fits > 1 and len(kept) < limit:
            share = (limit - len(kept)) / (whole - len(kept)) if tries < INTERPOLATIONS else 0.5
            middle = min(max(fits + round((too_long - fits) * share), fits + 1), too_long - 1)
            ids, tries = self._encode_prompt(example.prompt(middle)), tries + 1
            if len(ids) <= limit:
                fits, kept = middle, ids
            else:
                too_long, whole = middle, len(ids)
        return kept

    def _too_long(self, example: Example, tokens: int) -> str:
        without = "with an empty passage" if example.passage else "and nothing in it may be shortened"
        remedy = "" if example.passage else ", name a field that may lose its end with --data.template.cut"
        return (
            f"{_at(example)}a question takes {tokens} tokens {without}, more than --data.max_source_length "
            f"{self.max_source_length}: raise it{remedy}, or shorten {example.after.strip()!r:.80}"
        )

    def answer(self, example: Example, answer: str) -> list[int]:
        """Ids of an answer as the continuation of the prompt; a text ends with the tokenizer's end, or is shortened.

        SentencePiece puts a space mark in front of a text that stands alone, so the answer is tokenised behind the
        prompt and the prompt's ids are taken off; where the two merge into each other, it is tokenised alone after all.
        Raises `DataError` if it has no tokens, or if it is a choice of more than `max_target_length`.
        """
        ids = self._continuation(example, answer)
        if example.kind == "text":
            end = self.tokenizer.eos_token_id
            return (ids if end is None else [*ids, int(end)])[: self.max_target_length]
        if not 0 < len(ids) <= self.max_target_length:
            raise DataError(
                f"{_at(example)}the answer {answer!r} has {len(ids)} tokens; it must have 1 to "
                f"--data.max_target_length {self.max_target_length}"
            )
        return ids

    def _continuation(self, example: Example, answer: str) -> list[int]:
        if _ends_prompts(self.tokenizer):
            return self._encode(answer.strip())
        if self.chat:
            return self._encode(answer_in_chat(self.tokenizer, example.after, answer))
        before = example.after or LEAST_CONTEXT
        prompt, both = self._encode(before), self._encode(before + answer)
        return both[len(prompt) :] if both[: len(prompt)] == prompt else self._encode(answer)

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _encode_prompt(self, text: str) -> list[int]:
        """Ids of a text at the start of a row: with BOS where the tokenizer adds one by default, never with EOS."""
        if self.chat:  # the template says where a row begins
            return self._encode(in_chat(self.tokenizer, text))
        ids = self._encode(text)
        if _ends_prompts(self.tokenizer):
            return list(self.tokenizer.build_inputs_with_special_tokens(ids))
        return [self.tokenizer.bos_token_id, *ids] if self._adds_bos else ids

    @cached_property
    def _adds_bos(self) -> bool:
        with_special, plain = (self.tokenizer("a", add_special_tokens=yes)["input_ids"] for yes in (True, False))
        bos = self.tokenizer.bos_token_id
        return bos is not None and with_special[:1] == [bos] and plain[:1] != [bos]


def _at(example: Example) -> str:
    return f"{example.where}: " if example.where else ""


def _ends_prompts(tokenizer: Any) -> bool:
    """Whether tokens of its own stand between a prompt and its answer (ChatGLM)."""
    return bool(getattr(tokenizer, "ends_prompts", False))
