"""The model, cut into client head, trunk and client tail.

Importing this package makes transformers' Auto classes know the models that are written here.
"""

from __future__ import annotations

from hpc.model.chatglm import register as register_chatglm

register_chatglm()
