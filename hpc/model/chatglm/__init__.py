"""ChatGLM-6B, which transformers does not have: configuration, model and tokenizer under the published names."""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from hpc.model.chatglm.configuration import ChatGLMConfig
from hpc.model.chatglm.modeling import ChatGLMForCausalLM
from hpc.model.chatglm.tokenization import ChatGLMTokenizer


def register() -> None:
    """Make transformers' Auto classes use these for `model_type: chatglm`. Calling it again changes nothing."""
    AutoConfig.register(ChatGLMConfig.model_type, ChatGLMConfig, exist_ok=True)
    AutoModelForCausalLM.register(ChatGLMConfig, ChatGLMForCausalLM, exist_ok=True)
    AutoTokenizer.register(ChatGLMConfig, slow_tokenizer_class=ChatGLMTokenizer, exist_ok=True)
