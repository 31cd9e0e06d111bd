"""ChatGLM's tokenizer on a small sentencepiece model, trained here with the published special pieces."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import sentencepiece
from transformers import AutoTokenizer

from hpc.errors import ModelError
from hpc.model.chatglm import ChatGLMTokenizer
from hpc.model.pretrained import load_tokenizer
from hpc.source.files import FileResolver

WORDS = ["the", "ward", "patient", "fever", "blood", "doctor", "nurse", "morning", "rest", "病人", "发烧", "医生"]
MARKS = ["<n>", "<|tab|>", *(f"<|blank_{length}|>" for length in range(2, 81))]
SPECIAL = ["[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>"]
PUBLISHED = {
    "name_or_path": "THUDM/chatglm-6b",
    "bos_token": "<sop>",
    "eos_token": "<eop>",
    "end_token": "</s>",
    "gmask_token": "[gMASK]",
    "mask_token": "[MASK]",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "remove_space": False,
    "do_lower_case": False,
    "tokenizer_class": "ChatGLMTokenizer",
    "num_image_tokens": 0,
    "auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As published: ice_text.model, tokenizer_config.json and config.json, all naming remote code."""
    path, draw = tmp_path_factory.mktemp("chatglm"), random.Random(0)
    sentences = [" ".join(draw.choices(WORDS, k=8)) for _ in range(300)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_prefix=str(path / "ice_text"), vocab_size=200, hard_vocab_limit=False,
        user_defined_symbols=[*MARKS, *SPECIAL], pad_id=3, pad_piece="<pad>", num_threads=1, minloglevel=2,
    )  # fmt: skip
    (path / "tokenizer_config.json").write_text(json.dumps(PUBLISHED))
    auto_map = {"AutoConfig": "configuration_chatglm.ChatGLMConfig"}
    (path / "config.json").write_text(json.dumps({"model_type": "chatglm", "auto_map": auto_map}))
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> ChatGLMTokenizer:
    loaded = load_tokenizer(FileResolver(str(folder)))
    assert type(loaded) is ChatGLMTokenizer
    return loaded


def plain(folder: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "ice_text.model"))


def test_loads_without_a_question(folder: Path) -> None:
    assert type(AutoTokenizer.from_pretrained(folder)) is ChatGLMTokenizer


def test_ids_are_the_pieces_own(folder: Path, tokenizer: ChatGLMTokenizer) -> None:
    pieces = plain(folder)
    for text in ("the patient rests, 病人 发烧", "doctor", "", "unseen ŵord"):
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == pieces.encode(text)
    named = (tokenizer.mask_token_id, tokenizer.gmask_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert named == tuple(pieces.piece_to_id(piece) for piece in ("[MASK]", "[gMASK]", "<sop>", "<eop>"))
    assert (tokenizer.pad_token_id, tokenizer.end_token_id, len(tokenizer)) == (3, 2, pieces.vocab_size())


def test_whitespace_has_its_own_tokens(tokenizer: ChatGLMTokenizer) -> None:
    text = "ward\n\tfever  blood" + " " * 81 + "rest" + " " * 80 + "nurse\n"
    tokens = tokenizer.tokenize(text)
    assert [token for token in tokens if token.startswith("<")] == [
        "<n>", "<|tab|>", "<|blank_2|>", "<|blank_80|>", "<|blank_80|>", "<n>",
    ]  # fmt: skip
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


@pytest.mark.parametrize(
    ("prompt", "ending"),
    [
        ("the ward", ["[gMASK]", "<sop>"]),
        ("the ward[gMASK]", ["[gMASK]", "<sop>"]),
        ("the [MASK]", ["[MASK]", "<sop>"]),
        ("the [MASK] ward", ["[MASK]", "▁ward", "</s>", "<sop>"]),
    ],
)
def test_prompt_ends_with_a_mask_and_sop(prompt: str, ending: list[str], tokenizer: ChatGLMTokenizer) -> None:
    ids = tokenizer(prompt)["input_ids"]
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert tokens[1:] == ending or tokens[2:] == ending
    special = ("[MASK]", "[gMASK]", "<sop>", "</s>")
    mask = tokenizer.get_special_tokens_mask(ids, already_has_special_tokens=True)
    assert mask == [int(token in special) for token in tokens]


def test_target_ends_with_eop(tokenizer: ChatGLMTokenizer) -> None:
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("the", "fever")["input_ids"])
    assert tokens == ["▁the", "[gMASK]", "<sop>", "▁fever", "<eop>"]


def test_pads_on_the_left_and_decodes_without_padding(tokenizer: ChatGLMTokenizer) -> None:
    batch = tokenizer(["the ward", "the patient fever blood"], padding=True)
    short, long = batch["input_ids"]
    assert short[:2] == [3, 3]
    assert batch["attention_mask"] == [[0, 0] + [1] * (len(long) - 2), [1] * len(long)]
    assert tokenizer.decode(short) == "the ward[gMASK]<sop>"
    assert tokenizer.decode(short, skip_special_tokens=True) == "the ward"


def test_image_tokens_come_first(folder: Path) -> None:
    shifted = ChatGLMTokenizer(str(folder / "ice_text.model"), num_image_tokens=20000)
    pieces = plain(folder)
    ids = shifted("the ward", add_special_tokens=False)["input_ids"]
    assert ids == [20000 + index for index in pieces.encode("the ward")]
    assert shifted.convert_tokens_to_ids("<image_17>") == 17
    assert shifted.convert_ids_to_tokens(19999) == "<image_19999>"
    assert shifted.decode(ids) == "the ward"


def test_lower_case_and_spaces_on_demand(folder: Path) -> None:
    tidy = ChatGLMTokenizer(str(folder / "ice_text.model"), num_image_tokens=0, do_lower_case=True, remove_space=True)
    assert tidy.decode(tidy("  The   WARD ", add_special_tokens=False)["input_ids"]) == "the ward"


def test_id_beyond_the_vocabulary_is_unknown(tokenizer: ChatGLMTokenizer) -> None:
    assert tokenizer.convert_ids_to_tokens(130527) == "<unk>"


def test_saved_and_loaded_again_it_is_the_same(tokenizer: ChatGLMTokenizer, folder: Path, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "ice_text.model").read_bytes() == (folder / "ice_text.model").read_bytes()
    again = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=False)
    assert type(again) is ChatGLMTokenizer
    assert again.get_vocab() == tokenizer.get_vocab()
    text = "the ward\n  [MASK]"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "ice_text.model").write_text("not a model")
    with pytest.raises(ModelError, match=r"ice_text.model is not a sentencepiece model"):
        ChatGLMTokenizer(str(tmp_path / "ice_text.model"))


def test_missing_file_is_named(folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(ModelError, match=r"has no ice_text.model"):
        load_tokenizer(FileResolver(str(tmp_path)))
