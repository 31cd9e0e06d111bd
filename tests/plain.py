"""The independent reference: transformers, PEFT and torch only, written the way a notebook would.

It shares no engine code with the project: whole model, `labels` with -100, the library's own loss, clipping,
scheduler and AdamW. From the project it takes the batches and the starting values of the adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

import torch
from transformers import AutoModelForCausalLM, get_constant_schedule, get_linear_schedule_with_warmup

from hpc.config import Config
from hpc.data.collate import Batch
from hpc.data.dataset import load_client_data
from hpc.model.build import ModelBuilder
from hpc.model.pretrained import load_tokenizer

PARTS = ("head", "trunk", "tail")


def plain_model(config: Config, builder: ModelBuilder) -> Any:
    """The Hugging Face model with PEFT's own adapter, starting from the project's values."""
    from peft import LoraConfig, PrefixTuningConfig, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(builder.resolver.name_or_path)
    start = {name: value.detach() for name, value in builder.part("whole").trainable().items()}
    adapter = config.adapter
    if adapter.method == "lora":
        targets = sorted({name.split(".lora_")[0].rpartition(".")[2] for name in start})
        settings = LoraConfig(
            r=adapter.lora_r, lora_alpha=adapter.lora_alpha, target_modules=targets, task_type="CAUSAL_LM"
        )
        peft_model = get_peft_model(model, settings)
        for name, parameter in peft_model.named_parameters():  # in a frozen part PEFT's factors stay at B = 0
            parameter.requires_grad_(name.removeprefix("base_model.") in start)
    else:
        peft_model = get_peft_model(
            model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=adapter.num_virtual_tokens)
        )
    put_values(config, peft_model, start)
    return peft_model


def by_project_name(
    config: Config, model: Any, pick: Callable[[Any], torch.Tensor] = lambda parameter: parameter.detach()
) -> dict[str, torch.Tensor]:
    """What learns, by the project's names (or what `pick` takes of it, such as its gradient). Views, not copies."""
    if config.adapter.method == "lora":
        learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
        return {name.removeprefix("base_model."): pick(p) for name, p in learning.items()}
    table = pick(model.prompt_encoder["default"].embedding.weight)  # each block's columns in turn
    blocks = model.config.num_hidden_layers
    head, tail = config.model.head_blocks, config.model.tail_blocks
    widths = [n * table.shape[1] // blocks for n in (head, blocks - head - tail, tail)]
    tables = zip(PARTS, table.split(widths, 1), strict=True)
    return {f"prefix.encoders.{part}.embedding.weight": columns for part, columns in tables if columns.numel()}


def put_values(config: Config, model: Any, values: dict[str, torch.Tensor]) -> None:
    """The inverse of `by_project_name`."""
    targets = by_project_name(config, model)
    assert targets.keys() == values.keys()
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(values[name])


def labelled(batch: Batch) -> dict[str, torch.Tensor]:
    """The batch as a notebook would have it: mask and labels of the ids' shape."""
    labels_BT = torch.full_like(batch.ids_BT, -100)
    labels_BT[batch.label_rows_L, batch.label_positions_L + 1] = batch.label_ids_L
    mask_BT = torch.arange(batch.ids_BT.shape[1])[None] < torch.tensor(batch.lengths)[:, None]
    return {"input_ids": batch.ids_BT, "attention_mask": mask_BT.long(), "labels": labels_BT}


def plain_losses(config: Config, batches_of_step: Sequence[Sequence[int]]) -> list[float]:
    """The losses of `plain_run`."""
    return plain_run(config, batches_of_step)[0]


def plain_run(
    config: Config, batches_of_step: Sequence[Sequence[int]], absent: Mapping[int, Set[int]] | None = None
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Train one model; returns the loss of each step and the trained values by the project's names.

    `batches_of_step[s]` lists the clients whose next batches make up step `s`, as one mean over tokens. The batches of
    those in `absent[s]` are passed over.
    """
    builder = ModelBuilder.of(config)
    tokenizer = load_tokenizer(builder.resolver)
    train = config.train
    data = [load_client_data(config, k, tokenizer) for k in range(train.clients)]
    model = plain_model(config, builder)
    learning = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(
        learning,
        lr=train.learning_rate,
        betas=(train.adam_beta1, train.adam_beta2),
        eps=train.adam_epsilon,
        weight_decay=train.weight_decay,
    )
    assert train.warmup_steps == 0, "the library's warm-up begins at 0, the project's does not"
    if train.lr_scheduler == "linear":
        scheduler = get_linear_schedule_with_warmup(optimiser, 0, len(batches_of_step))
    else:
        scheduler = get_constant_schedule(optimiser)
    used = [0] * train.clients
    losses = []
    for clients in batches_of_step:
        batches = []
        for client in clients:
            if client not in (absent or {}).get(len(losses), set()):
                batches.append(data[client].train_batch(used[client]))
            used[client] += 1
        tokens = sum(batch.label_tokens for batch in batches)
        optimiser.zero_grad()
        total = 0.0
        for batch in batches:  # one client after another, accumulated: no padding shared between clients
            loss = model(**labelled(batch)).loss * (batch.label_tokens / tokens)
            loss.backward()
            total += loss.item()
        if train.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(learning, train.max_grad_norm)
        optimiser.step()
        scheduler.step()
        losses.append(total)
    return losses, {name: value.clone() for name, value in by_project_name(config, model).items()}
