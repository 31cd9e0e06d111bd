"""Rows and batches: the same loss as labels with -100, and a truncation that spares the question."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hpc.data.collate import collate, union
from hpc.data.rows import Encoder, Row
from hpc.data.tasks import FORMATS, Example, make_example
from hpc.errors import DataError
from hpc.source.tiny import tiny_llama_folder


def encoder(tokenizer: Any, source: int = 512, target: int = 16) -> Encoder:
    return Encoder(tokenizer=tokenizer, max_source_length=source, max_target_length=target)


@pytest.fixture(scope="module")
def bytewise() -> Any:
    return AutoTokenizer.from_pretrained(tiny_llama_folder(seed=0))


def with_special(*, bos: bool, eos: bool) -> Any:
    """A word tokenizer that puts special tokens around a text by default."""
    words = ["<s>", "</s>", "<unk>", "Blue", ".", "Question", ":", "is", "it", "?", "Answer", "Yes", "No", "x"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    around = f"{'<s> ' if bos else ''}$A{' </s>' if eos else ''}"
    tokenizer.post_processor = processors.TemplateProcessing(single=around, special_tokens=[("<s>", 0), ("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def example(passage: str = "Blue", question: str = "is it", label: bool = True) -> Example:
    return make_example(FORMATS["boolq"], {"passage": passage, "question": question, "label": label}, "here")


ROWS = st.lists(
    st.tuples(st.integers(1, 12), st.integers(1, 4)).map(
        lambda sizes: Row(ids=[(7 * i + sizes[0]) % 50 for i in range(sum(sizes))], prompt_len=sizes[0])
    ),
    min_size=1,
    max_size=6,
)


def plain_labels(rows: list[Row]) -> torch.Tensor:
    """What a notebook would write: the ids, with -100 on prompts and padding."""
    longest = max(len(row.ids) for row in rows)
    return torch.tensor([[-100] * r.prompt_len + r.ids[r.prompt_len :] + [-100] * (longest - len(r.ids)) for r in rows])


@settings(deadline=None)  # the cores are shared
@given(rows=ROWS)
def test_the_loss_equals_that_of_labels_with_minus_100(rows: list[Row]) -> None:
    batch = collate(rows)
    labels_BT = plain_labels(rows)
    logits_BTV = torch.randn(*batch.ids_BT.shape, 50, generator=torch.Generator().manual_seed(0))
    expected = F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), labels_BT[:, 1:].flatten())
    actual = F.cross_entropy(logits_BTV[batch.label_rows_L, batch.label_positions_L], batch.label_ids_L)
    torch.testing.assert_close(actual, expected)
    assert batch.label_tokens == int((labels_BT != -100).sum())


@settings(deadline=None)  # the cores are shared
@given(rows=ROWS, pad_id=st.integers(0, 49))
def test_rows_are_whole_and_padded_on_the_right(rows: list[Row], pad_id: int) -> None:
    batch = collate(rows, pad_id)
    assert batch.lengths == tuple(len(row.ids) for row in rows)
    assert batch.ids_BT.shape == (len(rows), max(batch.lengths))
    for ids_T, row in zip(batch.ids_BT.tolist(), rows, strict=True):
        assert ids_T == row.ids + [pad_id] * (len(ids_T) - len(row.ids))


@settings(deadline=None)  # the cores are shared
@given(rows=ROWS, cut=st.integers(0, 6))
def test_a_union_of_batches_is_the_batch_of_all_rows(rows: list[Row], cut: int) -> None:
    pieces = [piece for piece in (rows[:cut], rows[cut:]) if piece]
    joined, whole = union([collate(piece) for piece in pieces]), collate(rows)
    assert joined.lengths == whole.lengths
    for name in ("ids_BT", "label_rows_L", "label_positions_L", "label_ids_L"):
        assert torch.equal(getattr(joined, name), getattr(whole, name))


def test_a_row_is_the_prompt_and_the_answer(bytewise: Any) -> None:
    row = encoder(bytewise).row(example())
    assert bytewise.decode(row.ids[: row.prompt_len]) == "Blue. Question: is it? Answer:"
    assert bytewise.decode(row.ids[row.prompt_len :]) == " Yes"


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("eos", [True, False])
def test_bos_is_there_if_the_tokenizer_adds_it_and_eos_never(bos: bool, eos: bool) -> None:
    tokenizer = with_special(bos=bos, eos=eos)
    words = tokenizer.convert_ids_to_tokens(encoder(tokenizer).row(example(label=False)).ids)
    assert words == ["<s>"] * bos + ["Blue", ".", "Question", ":", "is", "it", "?", "Answer", ":", "No"]


@pytest.mark.parametrize("limit", [35, 40, 60, 77, 78, 79, 80])
def test_truncation_shortens_the_passage_only(bytewise: Any, limit: int) -> None:
    passage = "".join(f"{number:03d} " for number in range(12)).strip()
    ids = encoder(bytewise, limit).prompt(example(passage=passage))
    before, _, after = bytewise.decode(ids).partition(".")
    assert after == " Question: is it? Answer:"
    assert passage.startswith(before)
    whole = len(passage) + 26
    # As long as it may be, but for spaces taken off the passage's end.
    assert min(limit, whole) - 1 <= len(ids) <= limit


def test_truncation_keeps_bos() -> None:
    tokenizer = with_special(bos=True, eos=True)
    ids = encoder(tokenizer, 12).prompt(example(passage="x x x x x x x x x"))
    assert tokenizer.convert_ids_to_tokens(ids)[:6] == ["<s>", "x", "x", "x", ".", "Question"]
    assert len(ids) == 12


def test_a_question_that_does_not_fit_is_refused(bytewise: Any) -> None:
    with pytest.raises(DataError, match=r"26 tokens with an empty passage.*max_source_length 25"):
        encoder(bytewise, 25).prompt(example(passage="long " * 20))


def test_an_answer_that_does_not_fit_is_refused(bytewise: Any) -> None:
    with pytest.raises(DataError, match=r"' Yes' has 4 tokens.*max_target_length 3"):
        encoder(bytewise, target=3).answer(example(), " Yes")
