"""Elastic Reset: now and then the model goes back to its EMA, and the EMA to the initial weights.

    e ← β e + (1 − β) θ    after every optimizer step, e₀ = θ₀
    θ ← e, then e ← θ₀     at each multiple of every

Noukhovitch, Lavoie, Strub and Courville 2023, "Language Model Alignment with Elastic Reset" (arXiv:2312.07551): against
drift and reward hacking when a model is fine-tuned with reinforcement learning. The authors' code for LLaMA-7B: LoRA
weights, β = .995, a reset every 260 batches, a KL coefficient of .02, and an optimizer that resets leave alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from averaging import kernels
from averaging.averager import Averager, Moments
from averaging.memory import memory as open_memory
from averaging.schedule import Length, Span

if TYPE_CHECKING:
    import os
    from pathlib import Path

    from torch import Tensor

    from averaging.averager import Average
    from averaging.weights import Weights

INITIAL = "initial"


class ElasticReset(Averager):
    """Resets the model to its EMA, and the EMA to the initial weights, every so many optimizer steps.

    The trainers' callbacks write the reset weights into the model, between two optimizer steps and never while
    gradients are being accumulated; in your own loop `update` returns them, for `load_into`. Generation engines that
    are fed from the policy's weights, as by TRL's trainers, see them with the next weights they are given.

    The initial weights θ₀ are the first ones offered from ``start`` on. The trainers' callbacks offer the weights
    before the first step, too; in your own loop call ``update(model, 0)`` before it, so that θ₀ is where training
    began.

    It leads nothing: after a reset `average` is the initial weights, so evaluations measure the online weights, and the
    model keeps its trained weights when training ends. For the average of a policy put an `EMA` beside it, named
    after it to absorb the weights it wrote.

    Costs one float32 copy of the weights where they are, the EMA, and in ``memory`` one copy in their own dtype, θ₀,
    whose file saved states share.

    Args:
        every: optimizer steps between resets, ``"epoch"``, or a fraction of the run.
        decay: β, per optimizer step, between 0 and 1.
        moments: what becomes of the optimizer's state (the moments of Adam) at a reset: ``"kept"``, as in the authors'
            code, or ``"reset"`` by the trainers' callbacks; in your own loop, ``optimizer.state.clear()``.
        memory: where θ₀ is kept: ``"cpu"``, ``"pinned"``, ``"device"`` (with the weights), or a folder.
        start, name, frozen, buffers: as in `Averager`.

    Raises:
        ValueError: ``every`` not positive, ``decay`` outside [0, 1], or another ``moments``.
    """

    def __init__(
        self,
        every: Span,
        decay: float = 0.995,
        *,
        moments: Moments = "kept",
        memory: str | os.PathLike[str] = "cpu",
        start: Span = 0,
        name: str | None = None,
        frozen: bool = False,
        buffers: bool = False,
    ) -> None:
        self.write_backs = Length.parse(every, "every")
        if not self.write_backs.amount:
            raise ValueError(f"every={every!r}: must be positive")
        if not 0 <= decay <= 1:
            raise ValueError(f"decay={decay!r}: must be between 0 (the model itself) and 1 (the initial weights)")
        if moments not in ("kept", "reset"):
            raise ValueError(f"moments={moments!r}: give 'kept' or 'reset'")
        self.decay = decay
        self.moments = moments
        self._ema: dict[str, Tensor] = {}
        self._memory = open_memory(memory)
        super().__init__(start=start, name=name, frozen=frozen, buffers=buffers)

    def describe(self, weights: Weights) -> str:
        assert self.write_backs is not None
        cost = f"{self._cost(weights)}, and {self._memory.cost(weights)}"
        return f"back to the EMA of decay {self.decay:g} every {self.write_backs.text(self.run)}; {cost}"

    def due(self, last: tuple[int, float], now: tuple[int, float | None]) -> bool:
        assert self._schedule is not None
        return self._schedule.started(self.run, now) if not self.absorbed else super().due(last, now)

    def absorb(self, weights: Weights, step: int) -> None:
        if not self.absorbed:
            self._ema = kernels.accumulators(weights)
            self._memory.store(INITIAL, weights)
        else:
            kernels.lerp_(self._ema, weights, 1 - self.decay ** (step - self.absorbed_step))

    def write_back(self) -> Weights:
        weights = self.average(rounded=True)
        self._ema = kernels.accumulators(self._memory[INITIAL])
        return weights

    def average(self, *, rounded: bool = False) -> Weights:
        return self._wide_or_rounded(self._ema, rounded)

    def views(self) -> Mapping[str, Average]:
        return {}

    def tensors(self) -> Mapping[str, Weights]:
        return {"ema": self._ema, INITIAL: self._memory[INITIAL]} if self._ema else {}

    def immutable(self, group: str) -> bool:
        return group == INITIAL

    def write_group(self, group: str, file: Path) -> None:
        if group == INITIAL:
            self._memory.save(group, file)
        else:
            super().write_group(group, file)

    def restore(self, tensors: Mapping[str, Weights], numbers: Mapping[str, Any]) -> None:
        self._ema = kernels.accumulators(tensors.get("ema", {}))
        self._memory.restore({key: weights for key, weights in tensors.items() if key == INITIAL})
