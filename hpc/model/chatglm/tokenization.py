"""ChatGLM-6B's tokenizer: the published sentencepiece model `ice_text.model`, with its own marks for whitespace.

As published, but for what it returns beside the ids: a plain attention mask. The published one also computes the
positions and the two-dimensional mask, which the model here derives from the ids (`hpc.model.chatglm.layout`).
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor
from transformers import PreTrainedTokenizer

from hpc.errors import ModelError

VOCAB_FILE = "ice_text.model"
LONGEST_BLANK = 80  # spaces in one token
NEWLINE, TAB = "<n>", "<|tab|>"


def mark_whitespace(text: str) -> str:
    """Newlines, tabs and runs of 2 to 80 spaces as the marks that the vocabulary has for them."""
    text = text.replace("\n", NEWLINE).replace("\t", TAB)
    return re.sub(f" {{2,{LONGEST_BLANK}}}", lambda run: f"<|blank_{len(run[0])}|>", text)


def unmark_whitespace(text: str) -> str:
    """The opposite of `mark_whitespace`."""
    text = text.replace(NEWLINE, "\n").replace(TAB, "\t")
    return re.sub(r"<\|blank_([2-9]|[1-7]\d|80)\|>", lambda mark: " " * int(mark[1]), text)


class ChatGLMTokenizer(PreTrainedTokenizer):
    """Text to ids and back. A prompt ends with `[gMASK] <sop>`, and a target after it with `<eop>`.

    Ids below `num_image_tokens` are image tokens (20000 in the first release, 0 in the slim one, as its
    tokenizer_config.json says); the sentencepiece model's ids follow. Pads on the left.
    """

    vocab_files_names = {"vocab_file": VOCAB_FILE}  # noqa: RUF012  # the base class's own types
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012
    padding_side = "left"
    ends_prompts = True  # an answer does not simply go on where its prompt ends

    def __init__(
        self,
        vocab_file: str | None,
        do_lower_case: bool = False,
        remove_space: bool = False,
        bos_token: str = "<sop>",
        eos_token: str = "<eop>",
        end_token: str = "</s>",
        mask_token: str = "[MASK]",
        gmask_token: str = "[gMASK]",
        pad_token: str = "<pad>",
        unk_token: str = "<unk>",
        num_image_tokens: int = 20000,
        **kwargs: Any,
    ) -> None:
        """Raises `ModelError` if `vocab_file` is missing or not a sentencepiece model."""
        if vocab_file is None:  # what transformers gives for a folder without it
            raise ModelError(f"{kwargs.get('name_or_path', 'the folder')} has no {VOCAB_FILE}: fetch it too")
        self.vocab_file: str = vocab_file
        self.num_image_tokens = num_image_tokens
        self.do_lower_case, self.remove_space = do_lower_case, remove_space
        try:
            self.pieces = SentencePieceProcessor(model_file=vocab_file)
        except (OSError, RuntimeError) as error:
            raise ModelError(f"{vocab_file} is not a sentencepiece model ({error}); fetch {VOCAB_FILE} again") from None
        super().__init__(
            do_lower_case=do_lower_case,
            remove_space=remove_space,
            bos_token=bos_token,
            eos_token=eos_token,
            end_token=end_token,
            mask_token=mask_token,
            gmask_token=gmask_token,
            pad_token=pad_token,
            unk_token=unk_token,
            num_image_tokens=num_image_tokens,
            **kwargs,
        )

    @property
    def vocab_size(self) -> int:
        """Image tokens and pieces; the model's embedding may be longer."""
        return int(self.num_image_tokens + self.pieces.vocab_size())

    def get_vocab(self) -> dict[str, int]:
        return {self._convert_id_to_token(index): index for index in range(self.vocab_size)} | self.added_tokens_encoder

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        if self.remove_space:
            text = " ".join(text.split())
        if self.do_lower_case:
            text = text.lower()
        pieces: list[str] = self.pieces.encode(mark_whitespace(text), out_type=str)
        return pieces

    def _convert_token_to_id(self, token: str) -> int:
        image = re.fullmatch(r"<image_(\d+)>", token)
        if image is not None and int(image[1]) < self.num_image_tokens:
            return int(image[1])
        return int(self.pieces.piece_to_id(token)) + self.num_image_tokens

    def _convert_id_to_token(self, index: int) -> str:
        if index < self.num_image_tokens:
            return f"<image_{index}>"
        if index >= self.vocab_size:  # a row of the embedding that stands for nothing
            return str(self.unk_token)
        return str(self.pieces.id_to_piece(index - self.num_image_tokens))

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return unmark_whitespace(self.pieces.decode_pieces(tokens))

    def _decode(self, token_ids: int | list[int], *args: Any, **kwargs: Any) -> str:
        """As published, padding never shows."""
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        text: str = super()._decode([index for index in ids if index != self.pad_token_id], *args, **kwargs)
        return text

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """`prompt [gMASK] <sop>`, and `target <eop>` behind it if there is one.

        A prompt that names its own [MASK] or [gMASK] gets no other; text after that mask is closed with `</s>`.
        """
        masks = (self.mask_token_id, self.gmask_token_id)
        prompt = list(token_ids_0)
        if not any(mask in prompt for mask in masks):
            prompt.append(self.gmask_token_id)
        if prompt[-1] not in masks:
            prompt.append(self.end_token_id)
        prompt.append(self.bos_token_id)
        return prompt if token_ids_1 is None else [*prompt, *token_ids_1, self.eos_token_id]

    def get_special_tokens_mask(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None, already_has_special_tokens: bool = False
    ) -> list[int]:
        """1 for a special token, be it added here or named in the text."""
        ids = token_ids_0
        if not already_has_special_tokens:
            ids = self.build_inputs_with_special_tokens(token_ids_0, token_ids_1)
        special = set(self.all_special_ids)
        return [int(index in special) for index in ids]

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """Copies the sentencepiece model, under its published name, into a folder that exists."""
        target = Path(save_directory) / f"{f'{filename_prefix}-' if filename_prefix else ''}{VOCAB_FILE}"
        if target.resolve() != Path(self.vocab_file).resolve():
            shutil.copyfile(self.vocab_file, target)
        return (str(target),)
