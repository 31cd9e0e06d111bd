"""Tiny runs with every adapter: what their own parts compute, and what plain PEFT and transformers make of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open

from hpc.config import AdapterConfig, Config, DataConfig, LinkConfig, ModelConfig, RunConfig, TrainConfig, TrunkConfig
from hpc.export.command import export
from hpc.model.build import ModelBuilder
from hpc.source.resolve import resolve
from tests.loopback import Outcome, run_split

ROOT = Path(__file__).resolve().parents[1]
ADAPTERS = {
    "lora": AdapterConfig(lora_r=4, lora_alpha=12),
    "lora, some layers": AdapterConfig(lora_r=4, target_modules=["q_proj", "down_proj"]),
    "lora, trunk only": AdapterConfig(lora_r=4, parts=["trunk"]),
    "lora, clients only": AdapterConfig(lora_r=4, parts=["head", "tail"]),
    "p_tuning_v2": AdapterConfig(method="p_tuning_v2", num_virtual_tokens=5),
    "p_tuning_v2, projection": AdapterConfig(method="p_tuning_v2", num_virtual_tokens=5, prefix_projection=True),
    "full": AdapterConfig(method="full"),
    "some prefixes": AdapterConfig(method="p_tuning_v2", num_virtual_tokens=5, parts=["trunk"]),
}
IDS_BT = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(3))


def tiny(name: str, *, stage: int = 0, save: bool = True, encryption: Any = "aes-256-gcm", **train: Any) -> Config:
    json_file = str(ROOT / "slurm" / "deepspeed" / f"zero{stage}.json") if stage else None
    values: dict[str, Any] = {"max_steps": 2, "per_client_batch_size": 2, "learning_rate": 2e-2, **train}
    return Config(
        model=ModelConfig(name_or_path="tiny-llama"),
        adapter=ADAPTERS[name],
        data=DataConfig(train_examples=6, val_examples=0),
        train=TrainConfig(**values),
        trunk=TrunkConfig(deepspeed=json_file),
        link=LinkConfig(encryption=encryption),
        run=RunConfig(save_adapter=save),
    )


def own_logits(config: Config, outcome: Outcome, client_id: int = 0) -> torch.Tensor:
    """The run's trained parts one after the other: this client's head, the trunk, this client's tail."""
    trunk = ModelBuilder.of(config).part("trunk").eval()
    prefix = f"replica-{client_id}/" if config.train.schedule == "replica" else ""
    trunk.load_trainable({f"parameter/{name}": outcome.trained[f"{prefix}{name}"] for name in trunk.trainable()})
    client = outcome.clients[client_id]
    with torch.no_grad():
        logits: torch.Tensor = client.tail.eval()(trunk(client.head.eval()(IDS_BT)))
    return logits


def load(folder: Path | str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def base() -> Any:
    return load(resolve(ModelConfig(name_or_path="tiny-llama")).name_or_path)


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model.eval()(input_ids=IDS_BT).logits
    return logits


def peft_logits(folder: Path) -> torch.Tensor:
    """By plain transformers and PEFT; the file has exactly the keys of PEFT's model."""
    from peft import PeftModel, get_peft_model_state_dict

    model = PeftModel.from_pretrained(base(), folder)
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        assert {*file.keys()} == get_peft_model_state_dict(model, save_embedding_layers=False).keys()
    return logits_of(model)


def assert_equal_logits(found: torch.Tensor, due: torch.Tensor, atol: float = 1e-6) -> None:
    assert not torch.allclose(due, logits_of(base()), atol=1e-2), "nothing was learned, so nothing is compared"
    torch.testing.assert_close(found, due, rtol=0, atol=atol)


def save_config(config: Config, folder: Path) -> None:
    """`config.yaml`, which the command line of a run writes."""
    (folder / "config.yaml").write_text(yaml.safe_dump(asdict(config)))


def export_to(run: Path, output: Path, **options: Any) -> Path:
    export(run, output, **{"client": None, "checkpoint": None, "merge": False, "dtype": None, **options})
    return output


def finished_runs(make_folder: Callable[[str], Path]) -> Callable[[str], tuple[Config, Outcome, Path]]:
    """Adapter → a finished run of two clients with it, made on the first call."""
    made: dict[str, tuple[Config, Outcome, Path]] = {}

    def run(name: str) -> tuple[Config, Outcome, Path]:
        if name not in made:
            folder, config = make_folder("run"), tiny(name, save_every=2)
            made[name] = config, run_split(config, folder), folder
            save_config(config, folder)
        return made[name]

    return run
