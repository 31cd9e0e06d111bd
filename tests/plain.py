"""The independent reference: transformers, PEFT and torch only, written the way a notebook would.

It shares no engine code with the project: whole model, `labels` with -100, the library's own loss, clipping,
scheduler and AdamW. From the project it takes the batches and the starting values of the adapter.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaForCausalLM, get_constant_schedule, get_linear_schedule_with_warmup

from hpc.config import Config
from hpc.data.collate import Batch
from hpc.data.dataset import load_client_data
from hpc.model.build import ModelBuilder
from hpc.model.source import load_tokenizer


def plain_model(config: Config, builder: ModelBuilder) -> Any:
    """The Hugging Face model with PEFT's own adapter, starting from the project's values."""
    from peft import LoraConfig, PrefixTuningConfig, get_peft_model

    model = LlamaForCausalLM.from_pretrained(builder.resolver.name_or_path)
    start = builder.part("whole").trainable()
    adapter = config.adapter
    if adapter.method == "lora":
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        settings = LoraConfig(
            r=adapter.lora_r, lora_alpha=adapter.lora_alpha, target_modules=targets, task_type="CAUSAL_LM"
        )
        peft_model = get_peft_model(model, settings)
        parameters = dict(peft_model.named_parameters())
        with torch.no_grad():
            for name, value in start.items():
                parameters[f"base_model.{name}"].copy_(value)
        return peft_model
    peft_model = get_peft_model(
        model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=adapter.num_virtual_tokens)
    )
    tables = [start[f"prefix.encoders.{kind}.embedding.weight"] for kind in ("head", "trunk", "tail")]
    with torch.no_grad():
        peft_model.prompt_encoder["default"].embedding.weight.copy_(torch.cat(tables, 1))
    return peft_model


def labelled(batch: Batch) -> dict[str, torch.Tensor]:
    """The batch as a notebook would have it: mask and labels of the ids' shape."""
    labels_BT = torch.full_like(batch.ids_BT, -100)
    labels_BT[batch.label_rows_L, batch.label_positions_L + 1] = batch.label_ids_L
    mask_BT = torch.arange(batch.ids_BT.shape[1])[None] < torch.tensor(batch.lengths)[:, None]
    return {"input_ids": batch.ids_BT, "attention_mask": mask_BT.long(), "labels": labels_BT}


def plain_losses(config: Config, batches_of_step: list[list[int]]) -> list[float]:
    """Train; `batches_of_step[s]` lists the clients whose next batches make up step `s`, as one mean over tokens."""
    builder = ModelBuilder.of(config)
    tokenizer = load_tokenizer(builder.resolver)
    train = config.train
    data = [load_client_data(config, k, tokenizer) for k in range(train.clients)]
    model = plain_model(config, builder)
    learning = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(learning, lr=train.learning_rate, weight_decay=train.weight_decay)
    if train.lr_scheduler == "linear":
        scheduler = get_linear_schedule_with_warmup(optimiser, 0, len(batches_of_step))
    else:
        scheduler = get_constant_schedule(optimiser)
    used = [0] * train.clients
    losses = []
    for clients in batches_of_step:
        batches = []
        for client in clients:
            batches.append(data[client].train_batch(used[client]))
            used[client] += 1
        tokens = sum(batch.label_tokens for batch in batches)
        optimiser.zero_grad()
        total = 0.0
        for batch in batches:  # one client after another, accumulated: no padding shared between clients
            loss = model(**labelled(batch)).loss * (batch.label_tokens / tokens)
            loss.backward()
            total += float(loss)
        if train.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(learning, train.max_grad_norm)
        optimiser.step()
        scheduler.step()
        losses.append(total)
    return losses
