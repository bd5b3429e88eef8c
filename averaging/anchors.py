"""A reference model that is held at an average of the policy: what the KL term of RLHF and of DPO compares with."""

from __future__ import annotations

import copy
import sys
from typing import TYPE_CHECKING, Any

from averaging.apply import load_into
from averaging.randomness import random_state
from averaging.shards import is_sharded, local
from averaging.weights import Binding, Weights, every_tensor, unwrap

if TYPE_CHECKING:
    from torch import Tensor, nn

    from averaging.averager import Averager

ADAPTER = "ref"
"""The adapter that is the reference of a PEFT model; TRL's trainers look for one of this name."""


class Reference:
    """Keeps a reference model at an average of the policy.

        reference = Reference(EMAAnchor(mu=0.01), policy, reference_model)
        for step, batch in enumerate(batches, start=1):
            loss(policy, reference_model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            reference.update(step)

    Begin it before the first optimizer step: where the average has a beginning of its own, as `EMAAnchor` and `BEMA`
    have, that is the reference model as it is then. The reference's trained weights are written in place, rounded once
    from the average in float32; what the policy does not train stays as it is.

    Without a reference model the policy has to be a PEFT model: its adapter ``"ref"``, frozen and without dropout, is
    the reference (``policy.set_adapter("ref")``, or TRL's ``use_adapter``). It is added as a copy of the active adapter
    if it is not there. No second copy of the base model is held.

    Beside a sharded policy, a reference that is sharded alike is written without communication: under FSDP2, and under
    DeepSpeed ZeRO-3 as an engine without an optimizer. For any other, such as a whole model beside a policy under
    ZeRO-1 or ZeRO-2, the average is gathered whenever the reference moves, by all processes together.

    `averaging.transformers.EMAAnchor` does all this for TRL's trainers. To resume, restore the averager's state, begin
    again, and call `write`.

    Args:
        averager: which average, such as `EMAAnchor` or `BEMA`. Until there is one the reference stays as it is.
        policy: the model being trained, wrapped or not.
        reference: a model with the same weights under the same names, or None for an adapter of ``policy``.

    Raises:
        ValueError: no reference is possible: ``reference`` is the policy or another kind of model, or it is None and
            the policy is no PEFT model with one active adapter that holds all that is trained; or an engine of which
            nothing can be averaged.
    """

    def __init__(self, averager: Averager, policy: nn.Module, reference: nn.Module | None = None) -> None:
        self.averager = averager
        self.policy = policy
        self.model = policy if reference is None else reference
        trained = Binding(policy, frozen=averager.frozen, buffers=averager.buffers).tensors
        if reference is None:
            self._names = _adapter_names(unwrap(policy), trained)
        elif unwrap(reference) is unwrap(policy):
            raise ValueError("the reference is the policy itself: give a copy of it")
        else:
            self._names = {name: name for name in trained}
        targets = dict(every_tensor(self.model))
        for name, counterpart in self._names.items():
            if counterpart not in targets or targets[counterpart].shape != trained[name].shape:
                raise ValueError(
                    f"the policy trains {name!r} {tuple(trained[name].shape)}, which has no counterpart in the "
                    "reference: give a reference model with the policy's own weights (for a PEFT policy none at all: "
                    "an adapter of it will be the reference)"
                )
        self._pairs = {name: (trained[name], targets[counterpart]) for name, counterpart in self._names.items()}
        self._apart: set[str] = set()  # of which this process holds other parts of the reference than of the policy
        if is_sharded(policy) or is_sharded(self.model):
            from averaging.shard_files import alike

            self._apart = {
                name for name, same in zip(self._pairs, alike(self._pairs.values()), strict=True) if not same
            }
        if not averager.absorbed:
            begun = {
                name: self._relaid(name, local(target).detach(), target, own)
                for name, (own, target) in self._pairs.items()
            }
            averager.update(
                {name: part.to((own := local(trained[name])).device, own.dtype) for name, part in begun.items()},
                averager.step,
                epoch=averager.epoch,
            )
        averager.bind(policy)  # so that it knows of what its tensors are parts

    def _relaid(self, name: str, part: Tensor, like: Tensor, other: Tensor) -> Tensor:
        if name not in self._apart:
            return part
        from averaging.shard_files import relaid

        return relaid(part, like, other)

    def update(self, step: int | None = None, *, epoch: float | None = None) -> None:
        """Offer the policy's weights after an optimizer step, and move the reference when they are absorbed.

        Arguments and errors are those of `Averager.update`.
        """
        absorbed = self.averager.absorbed
        self.averager.update(self.policy, step, epoch=epoch)
        if self.averager.absorbed > absorbed:
            self.write()

    def write(self) -> None:
        """Copy the average into the reference, if there is one yet."""
        if self.averager.ready:
            moved = {
                self._names[name]: self._relaid(name, part, *self._pairs[name])
                for name, part in self.averager.average().items()
            }
            load_into(self.model, moved)


def _adapter_names(policy: nn.Module, trained: Weights) -> dict[str, str]:
    """Names of the trained weights → those in the reference adapter, which is added to ``policy`` if need be."""
    peft: Any = sys.modules.get("peft")
    if peft is None or not isinstance(policy, peft.PeftModel):
        raise ValueError(f"{type(policy).__name__} is no PEFT model, so its reference has to be a model of its own")
    active = policy.active_adapters
    if len(active) != 1 or active[0] == ADAPTER:
        raise ValueError(f"the active adapters are {active}: train one adapter, not called {ADAPTER!r}")
    names = {}
    for name in trained:
        parts = name.split(".")
        if active[0] not in parts:
            raise ValueError(
                f"{name!r} is trained but belongs to no adapter, so the reference would share it with the policy: "
                "freeze it (LoRA's bias='none'), or name its module in the adapter's modules_to_save"
            )
        last = len(parts) - 1 - parts[::-1].index(active[0])
        names[name] = ".".join([*parts[:last], ADAPTER, *parts[last + 1 :]])
    if ADAPTER not in policy.peft_config:
        if is_sharded(policy):
            raise ValueError(
                f"the policy is sharded, so that no adapter can be added to it any more: add {ADAPTER!r}, a copy of "
                f"{active[0]!r}, before, or give a reference model"
            )
        config = copy.deepcopy(policy.peft_config[active[0]])
        # Other ways to begin would change the base model; and a reference has no dropout.
        for option, value in (("init_lora_weights", True), ("lora_dropout", 0.0)):
            if hasattr(config, option):
                setattr(config, option, value)
        bring_back = random_state()
        policy.add_adapter(ADAPTER, config)
        bring_back()
        load_into(policy, {names[name]: tensor for name, tensor in trained.items()})
    return names
