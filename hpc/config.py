"""The configuration: dataclasses that check themselves when created.

A YAML file and dotted flags fill them (`hpc.cli`). Rules that need only the values are checked here;
rules that need a file or the model's own configuration are checked in `hpc.preflight`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import List, Literal, Optional

from hpc.data_config import DataConfig, TemplateConfig
from hpc.privacy_config import PrivacyConfig
from hpc.rules import require, require_at_least
from hpc.train_config import MAX_ROWS, TrainConfig

__all__ = [
    "MAX_ROWS",
    "AdapterConfig",
    "Config",
    "DataConfig",
    "LinkConfig",
    "ModelConfig",
    "PrivacyConfig",
    "RunConfig",
    "TemplateConfig",
    "TrainConfig",
    "TrunkConfig",
]


@dataclass(kw_only=True, frozen=True)
class ModelConfig:
    """Which model, in which precision, and where it is cut."""

    name_or_path: str = "smollm2-135m"
    """`smollm2-135m` (from its PyPI wheel), `tiny-llama` (random, for tests), a folder (safetensors, .bin or GGUF), a
    Llama's .gguf file, or a hub name. If the folder has a SHA256SUMS, each shard opened is verified (1 s a GB)."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the frozen weights and of what crosses the links. What is trained stays float32."""
    head_blocks: int = 1
    """Transformer blocks in the client head, after the embedding."""
    tail_blocks: int = 1
    """Transformer blocks in the client tail, before the final norm and the LM head."""
    init_seed: int = 0
    """Seed of `tiny-llama`'s random weights."""

    def __post_init__(self) -> None:
        require_at_least("model.head_blocks", self.head_blocks, 0)
        require_at_least("model.tail_blocks", self.tail_blocks, 0)
        require(bool(self.name_or_path), "--model.name_or_path is empty; give a model name or a folder")


PartName = Literal["head", "trunk", "tail"]


@dataclass(kw_only=True, frozen=True)
class AdapterConfig:
    """What is trained. The base model is frozen unless `method` is `full`."""

    method: Literal["lora", "p_tuning_v2", "full"] = "lora"
    """`lora` and `p_tuning_v2` come from PEFT; `full` trains the parts' own weights."""
    parts: List[PartName] = field(default_factory=lambda: ["head", "trunk", "tail"])
    """Parts that learn; the others stay frozen."""
    lora_r: int = 8
    """Rank of the LoRA factors."""
    lora_alpha: int = 16
    """LoRA scale: the update is multiplied by lora_alpha / lora_r."""
    lora_dropout: float = 0.0
    """Dropout in front of the LoRA factors (probability)."""
    target_modules: Optional[List[str]] = None
    """Linear layers that get LoRA, by the end of their names; none: every linear layer of the blocks."""
    num_virtual_tokens: int = 128
    """Prefix length of p-tuning v2 (tokens)."""
    prefix_projection: bool = False
    """Compute the prefixes with a small MLP (one for each part) instead of storing them."""

    def __post_init__(self) -> None:
        require_at_least("adapter.lora_r", self.lora_r, 1)
        require_at_least("adapter.num_virtual_tokens", self.num_virtual_tokens, 1)
        require(self.lora_alpha > 0, f"--adapter.lora_alpha is {self.lora_alpha}; it must be above 0")
        require(0 <= self.lora_dropout < 1, f"--adapter.lora_dropout is {self.lora_dropout}; it must be in [0, 1)")
        require(bool(self.parts), "--adapter.parts is empty, so nothing would learn; name head, trunk or tail")
        require(len(set(self.parts)) == len(self.parts), f"--adapter.parts {self.parts} names a part twice")


@dataclass(kw_only=True, frozen=True)
class LinkConfig:
    """The sealed channel between a client and its trunk rank."""

    transport: Literal["auto", "gloo", "mpi", "nccl"] = "auto"
    """`auto`: MPI when launched under MPI, NCCL when both ends have distinct GPUs, else Gloo."""
    encryption: Literal["aes-256-gcm", "off"] = "aes-256-gcm"
    """`off` sends plaintext; it is for measurements only and is logged loudly."""
    cipher_library: Literal["openssl", "pycryptodome"] = "openssl"
    """Who seals the bulk data; the bytes are the same."""
    chunk_mib: float = 1.0
    """Size of a sealed chunk (MiB)."""
    timeout_s: float = 300.0
    """Longest wait for a peer's next frame (seconds)."""
    start_timeout_s: float = 300.0
    """Longest wait for a peer to load its part and get ready, before the first step (seconds; `timeout_s` if that is
    more)."""
    keys_dir: str = "keys"
    """Folder of the identities: own private key, server.pem, authorized_clients/, revoked/."""
    port: int = 0
    """TCP port of the rendezvous store; 0: a free one, or the launcher's."""
    interface: str = ""
    """Network interface of the links (such as `ib0`), or an address of this machine. Empty: the one that leads
    to trunk rank 0."""
    rendezvous: str = ""
    """A folder that all roles share, to find each other through a file in it instead of a TCP store, where the port of
    trunk rank 0's machine cannot be reached. Empty: a TCP store."""

    def __post_init__(self) -> None:
        require(1 / 256 <= self.chunk_mib <= 1024, f"--link.chunk_mib is {self.chunk_mib}; it must be 0.004 to 1024")
        for name in ("timeout_s", "start_timeout_s"):
            value = getattr(self, name)
            require(value > 0, f"--link.{name} is {value}; it must be above 0")
        require(0 <= self.port < 65536, f"--link.port is {self.port}; it must be 0 to 65535")

    @property
    def start_patience_s(self) -> float:
        """Longest wait for a peer to get ready (seconds)."""
        return max(self.timeout_s, self.start_timeout_s)

    @property
    def chunk_bytes(self) -> int:
        return int(self.chunk_mib * 2**20)


@dataclass(kw_only=True, frozen=True)
class TrunkConfig:
    """The middle blocks, on DeepSpeed."""

    ranks: int = 1
    """Trunk ranks (data parallel); client k belongs to trunk rank k modulo ranks."""
    deepspeed: Optional[str] = None
    """DeepSpeed JSON file (ZeRO stage, offload); none: stage 0."""
    quantization: Literal["none", "int8", "nf4"] = "none"
    """Hold the trunk's frozen linear layers in 8 bits (LLM.int8()) or 4 (QLoRA's NF4), by bitsandbytes."""
    activation_checkpointing: bool = False
    """Recompute the trunk's activations in the backward pass instead of keeping them."""
    replica_limit_gib: float = 16.0
    """`replica` (and `pipelined`) with `full`: most memory for the clients' copies of what learns (GiB)."""
    smashed_cache_mib: float = 0.0
    """Where nothing in the client heads learns: keep so much of their smashed activations (MiB, all clients together),
    so that from the second epoch on they need not be sent again. 0: keep none. The server sees which examples recur."""

    generation_gib: float = 8.0
    """Most memory for the keys and values of one client's generation (GiB)."""

    def __post_init__(self) -> None:
        require(self.generation_gib > 0, f"--trunk.generation_gib is {self.generation_gib}; it must be above 0")
        require_at_least("trunk.ranks", self.ranks, 1)
        require_at_least("trunk.smashed_cache_mib", self.smashed_cache_mib, 0)
        require(
            self.replica_limit_gib > 0, f"--trunk.replica_limit_gib is {self.replica_limit_gib}; it must be above 0"
        )

    @property
    def generation_bytes(self) -> int:
        return int(self.generation_gib * 2**30)

    @property
    def smashed_cache_bytes(self) -> int:
        return int(self.smashed_cache_mib * 2**20)


@dataclass(kw_only=True, frozen=True)
class RunConfig:
    """Name, output and machine."""

    name: str = ""
    """Name of the run; its output goes to results/runs/<name>. Empty: date, time and schedule."""
    output_dir: Optional[str] = None
    """Output folder instead of results/runs/<name>."""
    resume_from_checkpoint: Optional[str] = None
    """Go on from `latest` or `checkpoint-<step>` in the run's folder, as if it had never stopped."""
    report_to: List[Literal["tensorboard"]] = field(default_factory=lambda: ["tensorboard"])
    """Further sinks beside metrics.jsonl."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: a GPU where there is one."""
    threads: int = 0
    """CPU threads of each process; 0: all cores, or its share where launch/local.py or slurm/train.sh starts it."""
    baseline_steps: int = 0
    """Train so many steps of the uncut model beside the run, step by step in turn, to compare time and loss."""
    outside_clients: int = 0
    """The last so many clients are not started with the other roles; they come from elsewhere (launch/join.py)."""
    client_restarts: int = 0
    """Start a client that died again, so many times at most (launch/local.py and slurm/train.sh; with
    `train.min_clients`, so that the others go on meanwhile)."""
    grace_s: float = 60.0
    """After SIGUSR1 or SIGTERM: longest time for the step under way and a checkpoint (seconds), then the role ends."""
    save_adapter: bool = True
    """At the end, each client gets the trunk's part of the adapter and writes all of it to adapter/client-<k>/."""

    def __post_init__(self) -> None:
        require(
            self.name == "" or re.fullmatch(r"(?!\.)[\w.+-][\w.+ -]*", self.name) is not None,
            f"--run.name {self.name!r} must be one folder name: letters, digits, '.', '_', '+', '-' and spaces",
        )
        require(
            self.resume_from_checkpoint is None or self.folder is not None,
            "--run.resume_from_checkpoint needs to know the run: give its --run.name or --run.output_dir",
        )
        require_at_least("run.threads", self.threads, 0)
        require_at_least("run.baseline_steps", self.baseline_steps, 0)
        require_at_least("run.outside_clients", self.outside_clients, 0)
        require_at_least("run.client_restarts", self.client_restarts, 0)
        require(self.grace_s > 0, f"--run.grace_s is {self.grace_s}; it must be above 0")

    @property
    def folder(self) -> str | None:
        """The output folder, or None where the run has no name yet."""
        return self.output_dir or (f"results/runs/{self.name}" if self.name else None)


@dataclass(kw_only=True, frozen=True)
class Config:
    """Everything a run is told."""

    model: ModelConfig = field(default_factory=ModelConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    link: LinkConfig = field(default_factory=LinkConfig)
    trunk: TrunkConfig = field(default_factory=TrunkConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        require(
            not (self.trunk.activation_checkpointing and self.adapter.method == "p_tuning_v2"),
            "--trunk.activation_checkpointing does not work with --adapter.method p_tuning_v2: "
            "a prefix lives in the key-value cache, which recomputation would fill twice; use lora, or switch it off",
        )
        require(
            self.trunk.quantization == "none" or self.adapter.method != "full" or "trunk" not in self.adapter.parts,
            f"--trunk.quantization {self.trunk.quantization} is for a frozen trunk, but --adapter.method full trains "
            "its weights; use lora or p_tuning_v2, or leave trunk out of --adapter.parts",
        )
        require(
            self.trunk.ranks <= self.train.clients or self.train.schedule == "centralised",
            f"--trunk.ranks {self.trunk.ranks} exceeds --train.clients {self.train.clients}: "
            "a trunk rank without clients would only ever idle; lower --trunk.ranks",
        )
        require(
            self.train.min_clients == 0 or self.link.transport != "mpi",
            "--train.min_clients does not work with --link.transport mpi: an MPI job ends with any of its processes; "
            "use gloo",
        )
        require(
            not self.data.decodes or self.trunk.ranks == 1 or self.train.schedule == "centralised",
            f"--data.evaluate_by generation with --trunk.ranks {self.trunk.ranks}: each rank answers its own clients "
            "for as long as they ask, while the others wait for it; use one trunk rank, or --data.evaluate_by "
            "likelihood",
        )
        require(
            self.run.outside_clients <= self.train.clients,
            f"--run.outside_clients {self.run.outside_clients} exceeds --train.clients {self.train.clients}",
        )
        require(
            self.run.outside_clients == 0 or self.link.transport in ("auto", "gloo"),
            f"--run.outside_clients {self.run.outside_clients} does not work with --link.transport "
            f"{self.link.transport}, which joins only processes of one launch; use gloo",
        )
        require(
            self.run.client_restarts == 0 or self.train.min_clients > 0,
            f"--run.client_restarts {self.run.client_restarts} needs --train.min_clients: without it the run ends with "
            "the first client that dies",
        )
        require(
            self.privacy.record_steps == 0 or self.train.schedule != "centralised",
            f"--privacy.record_steps {self.privacy.record_steps}: in --train.schedule centralised nothing crosses a "
            "link, so there is nothing to record; use another schedule",
        )
        require(
            self.train.early_stopping_patience == 0 or self.data.evaluates,
            "--train.early_stopping_patience needs held-out examples; give --data.val_examples (and a val_file)",
        )
        require(
            self.trunk.smashed_cache_mib == 0 or not self.head_learns,
            "--trunk.smashed_cache_mib: the client heads learn, so their activations change with every step; leave "
            "head out of --adapter.parts, or do without the cache",
        )

        require(
            not self.privacy.defends or self.train.schedule != "centralised",
            "--privacy: with --train.schedule centralised nothing leaves a client, so there is nothing to clip or to "
            "add noise to; use another schedule, or leave clipping, noise and label protection out",
        )

        require(
            self.privacy.detector == "off" or self.head_learns,
            f"--privacy.detector {self.privacy.detector} has nothing to watch: no client head learns, so no gradient "
            "comes back; leave it off",
        )

    @property
    def head_learns(self) -> bool:
        """Whether a gradient goes back to the client head: something in it is trained."""
        if "head" not in self.adapter.parts:
            return False
        return self.adapter.method == "full" or self.model.head_blocks > 0

    @property
    def caches_smashed(self) -> bool:
        """Whether the server keeps smashed activations."""
        return self.trunk.smashed_cache_mib > 0 and self.train.schedule != "centralised"

    @property
    def world_size(self) -> int:
        """Processes of the run: trunk ranks and clients, or the one of `centralised`."""
        return 1 if self.train.schedule == "centralised" else self.trunk.ranks + self.train.clients
