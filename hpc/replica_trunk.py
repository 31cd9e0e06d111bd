"""The trunk of split federated training: every client's own trunk, over one base, averaged now and then.

Shape suffixes: B rows, T tokens, D hidden size, N values that one client trains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from hpc.config import Config
from hpc.extensions import load_operator
from hpc.model.memory import Memory
from hpc.model.part import Part
from hpc.model.quantize import count_weights
from hpc.model.replicas import Replicas
from hpc.optim import make_adamw, scale_gradients, set_learning_rate, square_sum
from hpc.quiet import quiet
from hpc.trunk_config import read_deepspeed_json, zero_stage

MOMENTS = ("exp_avg", "exp_avg_sq")


def replica_bytes(trainable: int, clients: int) -> int:
    """Memory of all replicas: values, gradient and AdamW's two moments in float32. The base comes on top, once."""
    return 4 * 4 * trainable * clients


def partition_base(part: Part, settings: dict[str, Any]) -> None:
    """Share the frozen base out over the trunk ranks (ZeRO 3); blocks are gathered for as long as they compute.

    Every rank must then run the same number of passes. The prefix is held out: its values are the replicas'.
    """
    held, part.prefix = part.prefix, None
    # Without these limits the whole base would stay gathered behind an inference.
    limits = {"stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
    zero = {**limits, **settings["zero_optimization"]}
    with quiet():
        import deepspeed

        load_operator()
        # No optimiser: the result is hooks on the part, which is called as before.
        deepspeed.initialize(
            model=part,
            config={"train_micro_batch_size_per_gpu": 1, **settings, "zero_optimization": zero},
            dist_init_required=False,
        )
    part.prefix = held


class ReplicaTrunk:
    """The middle blocks of one trunk rank, with the values of each of its clients.

    Clients step on their own, so nothing here is collective but `average`, and with a partitioned base the passes:
    there a rank whose clients all sit out runs a row of zeros (`idle_groups`) through the blocks.
    """

    def __init__(self, part: Part, config: Config, *, clients: Sequence[int], device: torch.device) -> None:
        self.part, self.device, self._clients = part, device, tuple(clients)
        self._replicas = Replicas(part, clients, device=device)
        self.learns = bool(self._replicas.names)
        self.trainable = self._replicas.values_KN.numel()
        self.owned = count_weights(part.parameters()) + self.trainable
        self._rows = {client: self._replicas.row(client) for client in clients} if self.learns else {}
        self._optimisers = {client: make_adamw([row], config.train) for client, row in self._rows.items()}
        self._out: torch.Tensor | None = None
        self._smashed: torch.Tensor | None = None
        if config.trunk.activation_checkpointing:
            self._replicas.checkpoint_activations()
        settings = read_deepspeed_json(config.trunk.deepspeed)
        self.partitioned = zero_stage(settings) == 3
        if self.partitioned:
            partition_base(part, settings)

    def forward(
        self,
        smashed_BTD: torch.Tensor,
        groups: Sequence[tuple[int, int]],
        *,
        input_learns: bool,
        layout_B2: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`trunk_out_BTD`, detached. `groups` are (client id, number of rows) in the order of the rows.

        With `input_learns`, `backward` also gives the gradient of the input. Raises as `Replicas.forward` does.
        """
        self._smashed = smashed_BTD.detach().requires_grad_(input_learns)
        self._out = self._replicas.forward(self._smashed, groups, layout_B2)
        return self._out.detach()

    def idle_groups(self) -> list[tuple[int, int]]:
        """The groups of one row that stands for nobody, where every rank must take part; else none."""
        return [(self._clients[0], 1)] if self.partitioned else []

    @torch.no_grad()
    def infer(
        self, smashed_BTD: torch.Tensor, groups: Sequence[tuple[int, int]], layout_B2: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`trunk_out_BTD` for evaluation; keeps nothing for a backward pass."""
        return self._replicas.forward(smashed_BTD, groups, layout_B2)

    def remember(self, client: int, rows: int, layout_B2: torch.Tensor | None = None) -> Memory:
        """An empty memory for a client's rows, with the prefixes of its replica: generation."""
        return self._replicas.remember(client, rows, layout_B2)

    def extend(self, client: int, smashed_BTD: torch.Tensor, memory: Memory, mask_BT: torch.Tensor) -> torch.Tensor:
        """Continue a client's rows with its replica. Not collective, so not with a partitioned base."""
        return self._replicas.extend(client, smashed_BTD, memory, mask_BT)

    def backward(self, grad_trunk_out_BTD: torch.Tensor) -> torch.Tensor | None:
        """From the received gradients to `grad_smashed_BTD` (None unless the input learns)."""
        out, smashed = self._out, self._smashed
        assert out is not None, "backward follows forward"
        assert smashed is not None, "backward follows forward"
        self._out = self._smashed = None
        if out.requires_grad:
            out.backward(grad_trunk_out_BTD)
        return smashed.grad

    def square_sum(self, client: int) -> float:
        """Square sum of one client's gradient, tensor by tensor, as an ordinary trunk has it."""
        return square_sum(self._replicas.split(self._gradient(client)).values()) if self.learns else 0.0

    def step(self, client: int, *, factor: float, rate: float) -> None:
        """One AdamW step of this client, with its gradient times `factor` (clipping and loss scale)."""
        if not self.learns:
            return
        scale_gradients([self._gradient(client)], factor)
        set_learning_rate(self._optimisers[client], rate)
        self._optimisers[client].step()
        self.skip(client)

    def skip(self, client: int) -> None:
        """Drop this client's gradient."""
        if self.learns:
            self._gradient(client).zero_()

    def _gradient(self, client: int) -> torch.Tensor:
        gradient = self._rows[client].grad
        assert gradient is not None, "a row's gradient is a view that nothing takes away"
        return gradient

    @torch.no_grad()
    def average(
        self, weights: Mapping[int, float], total: float, sum_tensor: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        """FedAvg (McMahan et al., 2017): all clients go on from the mean of the clients in `weights`.

        `weights` may name clients of other ranks; `total` is the sum over all ranks, and `sum_tensor` adds up a float64
        tensor on the CPU over the ranks. Collective, also for a rank without a client. AdamW's moments stay.
        """
        if not self.learns:
            return
        values_KN = self._replicas.values_KN
        mean_N = torch.zeros(values_KN.shape[1], dtype=torch.float64, device=self.device)
        for client in sorted(self._rows.keys() & weights.keys()):
            mean_N.add_(self._rows[client].double(), alpha=weights[client] / total)
        values_KN.copy_(sum_tensor(mean_N.cpu()))

    @property
    def names(self) -> list[str]:
        """What learns, by its name in the uncut model."""
        return self._replicas.names

    def values(self, client: int) -> Iterator[tuple[str, torch.Tensor]]:
        """One client's own values, one by one, in float32."""
        return iter(self._replicas.named(client).items())

    def state(self) -> dict[str, torch.Tensor]:
        """Every client's values and AdamW state (none before its first step) by name, in float32."""
        state: dict[str, torch.Tensor] = {}
        for client, row in self._rows.items():
            moments = self._optimisers[client].state.get(row, {})
            flat = {"parameter": row.detach(), **{key: moments[key] for key in MOMENTS if key in moments}}
            for key, flat_N in flat.items():
                for name, tensor in self._replicas.split(flat_N).items():
                    state[f"replica-{client}/{key}/{name}"] = tensor.clone()
            if moments:
                state[f"replica-{client}/step"] = moments["step"].clone()
        return state

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """The inverse of `state`; other ranks' clients in it are ignored. Raises `KeyError` where an own one lacks."""
        for client, row in self._rows.items():
            own = f"replica-{client}"
            names = self._replicas.names
            self._replicas.load(client, {name: state[f"{own}/parameter/{name}"] for name in names})
            self._optimisers[client].state.pop(row, None)
            if f"{own}/step" in state:
                moments = {key: torch.empty_like(row, requires_grad=False) for key in MOMENTS}
                for key, flat_N in moments.items():
                    for name, tensor in self._replicas.split(flat_N).items():
                        tensor.copy_(state[f"{own}/{key}/{name}"])
                self._optimisers[client].state[row] = {"step": state[f"{own}/step"].clone(), **moments}
