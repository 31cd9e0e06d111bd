"""The trunk on DeepSpeed: forward, backward from a received gradient, one clipped optimiser step.

Shape suffixes: B rows, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from hpc.acts import Micro
from hpc.config import Config
from hpc.extensions import load_operator
from hpc.model.memory import Memory
from hpc.model.part import Part
from hpc.model.quantize import count_weights
from hpc.optim import make_adamw, scale_gradients, set_learning_rate, square_sum
from hpc.quiet import quiet
from hpc.trunk_config import read_deepspeed_json, zero_stage

MOMENTS = ("exp_avg", "exp_avg_sq")
Batch = tuple[Micro, ...]


class Trunk:
    """The middle blocks of one trunk rank. All trunk ranks call the same methods in the same order."""

    def __init__(self, part: Part, config: Config, *, ranks: int, device: torch.device) -> None:
        self._hidden_size = part.hidden_size
        self._dtype: torch.dtype = getattr(torch, config.model.dtype)
        self.part, self.ranks, self.device = part, ranks, device
        self._train = config.train
        self._accumulates = config.train.schedule == "pipelined"
        self.learns = bool(part.trainable())
        self._engine: Any = None
        self._in_flight: dict[Batch, tuple[torch.Tensor, torch.Tensor]] = {}  # batch → input, output
        self._sums: dict[int, list[torch.Tensor]] = {}  # client → its micro-batches' gradients, in their order
        self._named = part.trainable()
        self.parameters = list(self._named.values())
        if config.trunk.activation_checkpointing:
            part.model.gradient_checkpointing_enable({"use_reentrant": False})
            part.train()
        settings = read_deepspeed_json(config.trunk.deepspeed)
        self.stage = zero_stage(settings)
        # Counted now: ZeRO 3 leaves an empty shell where each partitioned parameter was.
        self.owned = count_weights(part.parameters())
        self.trainable = sum(p.numel() for p in self.parameters)
        if self.learns:
            self._engine = self._initialise(settings)
        else:
            part.to(device)

    def _initialise(self, settings: dict[str, Any]) -> Any:
        full = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 0.0,  # its default is 1.0, on the trunk alone; clipping is by the norm over all parts
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 2**31,
            **settings,
        }
        with quiet():  # it compiles an operator and says so
            import deepspeed

            load_operator()
            engine, *_ = deepspeed.initialize(
                model=self.part,
                optimizer=make_adamw(self.parameters, self._train),
                config=full,
                dist_init_required=False,
            )
        return engine

    def forward(
        self,
        smashed_BTD: torch.Tensor,
        *,
        batch: Batch = (),
        input_learns: bool,
        layout_B2: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`trunk_out_BTD`, detached. With `input_learns`, `backward` also gives the gradient of the input.

        `batch` names this forward pass for its backward pass, as several may be under way.
        """
        smashed_BTD = smashed_BTD.detach().requires_grad_(input_learns)
        # Accumulation does without the engine's hooks, which would reduce gradients after each micro-batch.
        out_BTD = (self.part if self._accumulates else self._engine or self.part)(smashed_BTD, layout_B2=layout_B2)
        self._in_flight[batch] = smashed_BTD, out_BTD
        detached: torch.Tensor = out_BTD.detach()
        return detached

    @torch.no_grad()
    def infer(self, smashed_BTD: torch.Tensor, layout_B2: torch.Tensor | None = None) -> torch.Tensor:
        """`trunk_out_BTD` for evaluation; keeps nothing for a backward pass."""
        out: torch.Tensor = (self._engine or self.part)(smashed_BTD, layout_B2=layout_B2)
        return out

    def remember(self, client: int, rows: int, layout_B2: torch.Tensor | None = None) -> Memory:
        """An empty memory for a client's rows: generation."""
        return self.part.remember(rows, layout_B2)

    def extend(self, client: int, smashed_BTD: torch.Tensor, memory: Memory, mask_BT: torch.Tensor) -> torch.Tensor:
        """Continue a client's rows. Not collective, so not with partitioned parameters (ZeRO 3)."""
        return self.part.extend(smashed_BTD, memory, mask_BT)

    def backward(self, grad_trunk_out_BTD: torch.Tensor, *, batch: Batch = ()) -> torch.Tensor | None:
        """From the received gradient to `grad_smashed_BTD` (None unless the input learns)."""
        smashed, out = self._in_flight.pop(batch)
        if self._accumulates:
            return self._accumulate(out, smashed, grad_trunk_out_BTD, batch[0].client)
        if self._engine is None:
            if out.requires_grad:
                out.backward(grad_trunk_out_BTD)
            return smashed.grad
        if self.stage == 0:
            # DeepSpeed wants a scalar here; the gradient of this one with respect to `out` is the received one.
            self._engine.backward((out * grad_trunk_out_BTD).sum())
        else:
            out.backward(grad_trunk_out_BTD)
        return smashed.grad

    def _accumulate(
        self, out: torch.Tensor, smashed: torch.Tensor, grad: torch.Tensor, client: int
    ) -> torch.Tensor | None:
        """Add to the client's own sum: its micro-batches come in order, so no other client's pace changes a bit."""
        inputs = [smashed] if smashed.requires_grad else []
        if not out.requires_grad:
            return None
        found = torch.autograd.grad(out, [*inputs, *self.parameters], grad, allow_unused=True)
        gradients = [
            torch.zeros_like(p) if g is None else g for p, g in zip(self.parameters, found[len(inputs) :], strict=True)
        ]
        if client not in self._sums:
            self._sums[client] = gradients
        else:
            for total, gradient in zip(self._sums[client], gradients, strict=True):
                total += gradient
        return found[0] if inputs else None

    def finish_accumulation(self, clients: Sequence[int]) -> None:
        """Hand the sum over these clients' micro-batches to DeepSpeed as the step's gradient. Others' are dropped."""
        sums, self._sums = self._sums, {}
        self._in_flight.clear()
        if not self.learns:
            return
        first, *others = [sums[client] for client in sorted(clients) if client in sums] or [
            [torch.zeros_like(p) for p in self.parameters]
        ]
        for other in others:
            for total, gradient in zip(first, other, strict=True):
                total += gradient
        # The gradient of this sum of products is what was accumulated; so DeepSpeed reduces and partitions it once.
        pairs = zip(self.parameters, first, strict=True)
        self._engine.backward(sum((p * g).sum() for p, g in pairs))

    def gradients(self) -> list[torch.Tensor]:
        """Full gradients of this step, summed over trunk ranks, in a fixed order. Collective at ZeRO 1-3."""
        if not self.learns:
            return []
        if self.stage == 0:
            found = [p.grad for p in self.parameters]
        else:
            from deepspeed.utils import safe_get_full_grad

            found = [safe_get_full_grad(p) for p in self.parameters]
        # DeepSpeed averages over ranks, while every client's loss is already divided by all label tokens.
        return [g if self.ranks == 1 else g * self.ranks for g in found if g is not None]

    def square_sum(self) -> float:
        """Partial square sum of the global gradient norm."""
        return square_sum(self.gradients())

    def step(self, *, factor: float, rate: float) -> None:
        """One AdamW step with the gradients times `factor` (clipping and loss scale)."""
        if not self.learns:
            return
        set_learning_rate(self._engine.optimizer, rate)
        factor = factor * self.ranks
        if factor != 1.0:
            self._scale(factor)
        self._engine.step()

    def skip(self) -> None:
        """Drop this step's gradients."""
        if not self.learns:
            return
        if self.stage > 0:  # its own copies; not times 0, as not-a-number would stay
            from deepspeed.utils import safe_set_full_grad

            for parameter in self.parameters:
                whole: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
                safe_set_full_grad(parameter, torch.zeros(whole, device=self.device))
        self._engine.optimizer.zero_grad()

    @property
    def names(self) -> list[str]:
        """What learns, by its name in the uncut model."""
        return list(self._named)

    def values(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What learns, one by one, in float32, whole on every rank. At ZeRO 1-3 all ranks take each one together."""
        return ((name, self._full(parameter, "parameter")) for name, parameter in self._named.items())

    def state(self) -> dict[str, torch.Tensor]:
        """Trainable parameters and AdamW state by name, in float32, whole on every rank. Collective at ZeRO 1-3."""
        if not self.learns:
            return {}
        inner = self._inner_state()
        stepped = bool(inner) and "step" in inner[0]  # before the first step there are no moments
        state: dict[str, torch.Tensor] = {}
        for name, parameter in self._named.items():
            for key in ("parameter", *(MOMENTS if stepped else ())):
                state[f"{key}/{name}"] = self._full(parameter, key)
        if stepped:
            state["step"] = inner[0]["step"].clone()
        return state

    def load_moments(self, state: dict[str, torch.Tensor]) -> None:
        """Take up AdamW's state from `state()`. The parameters must have been loaded before this trunk was made."""
        if not self.learns or "step" not in state:
            return
        self._make_moments()
        for inner in self._inner_state():
            inner["step"].copy_(state["step"])
        for name, parameter in self._named.items():
            for key in MOMENTS:
                if self.stage == 0:
                    self._engine.optimizer.state[parameter][key].copy_(state[f"{key}/{name}"])
                else:
                    from deepspeed.utils import safe_set_full_optimizer_state

                    safe_set_full_optimizer_state(parameter, state[f"{key}/{name}"].to(self.device), key)

    def _make_moments(self) -> None:
        """A step at rate 0 with zero gradients changes no parameter, but makes PyTorch create AdamW's state."""
        if self._accumulates:
            self.finish_accumulation(())
        else:
            zero_BTD = torch.zeros(1, 1, self._hidden_size, dtype=self._dtype, device=self.device)
            self.backward(torch.zeros_like(self.forward(zero_BTD, input_learns=True)))
        set_learning_rate(self._engine.optimizer, 0.0)
        self._engine.step()

    def _inner_state(self) -> list[dict[str, torch.Tensor]]:
        optimiser = self._engine.optimizer
        return list((optimiser if self.stage == 0 else optimiser.optimizer).state.values())

    def _full(self, parameter: torch.nn.Parameter, key: str) -> torch.Tensor:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if key == "parameter":
            found = parameter.detach() if self.stage == 0 else safe_get_full_fp32_param(parameter)
        elif self.stage == 0:
            found = self._engine.optimizer.state[parameter][key]
        else:
            found = safe_get_full_optimizer_state(parameter, key)
        return torch.as_tensor(found).clone()

    def _scale(self, factor: float) -> None:
        if self.stage == 0:
            scale_gradients([p.grad for p in self.parameters], factor)
            return
        from deepspeed.utils import safe_get_full_grad, safe_set_full_grad

        for parameter in self.parameters:
            gradient = safe_get_full_grad(parameter)
            if gradient is not None:
                safe_set_full_grad(parameter, gradient * factor)
