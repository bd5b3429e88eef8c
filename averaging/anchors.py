"""A reference model that is held at an average of the policy: what the KL term of RLHF and of DPO compares with."""

from __future__ import annotations

import copy
import sys
from typing import TYPE_CHECKING, Any

from averaging.apply import load_into
from averaging.randomness import random_state
from averaging.shards import is_flat, is_sharded
from averaging.weights import every_name, named_weights, unwrap

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

    `averaging.transformers.EMAAnchor` does all this for TRL's trainers. To resume, restore the averager's state, begin
    again, and call `write`.

    Args:
        averager: which average, such as `EMAAnchor` or `BEMA`. Until there is one the reference stays as it is.
        policy: the model being trained, wrapped or not.
        reference: a model with the same weights under the same names, or None for an adapter of ``policy``.

    Raises:
        ValueError: no reference is possible: ``reference`` is the policy or another kind of model, or it is None and
            the policy is no PEFT model with one active adapter that holds all that is trained; or DeepSpeed ZeRO.
    """

    def __init__(self, averager: Averager, policy: nn.Module, reference: nn.Module | None = None) -> None:
        self.averager = averager
        self.policy = policy
        self.model = policy if reference is None else reference
        if any(is_flat(parameter) for parameter in (*policy.parameters(), *self.model.parameters())):
            raise ValueError(
                "under DeepSpeed ZeRO each process trains slices of the weights, which a reference does not have: use "
                "FSDP2 (fully_shard) for both models, or DDP"
            )
        trained = named_weights(policy, frozen=averager.frozen, buffers=averager.buffers)
        if reference is None:
            self._names = _adapter_names(unwrap(policy), trained)
        elif unwrap(reference) is unwrap(policy):
            raise ValueError("the reference is the policy itself: give a copy of it")
        else:
            self._names = {name: name for name in trained}
        targets = dict(every_name(self.model))
        for name, counterpart in self._names.items():
            if counterpart not in targets or targets[counterpart].shape != trained[name].shape:
                raise ValueError(
                    f"the policy trains {name!r} {tuple(trained[name].shape)}, which has no counterpart in the "
                    "reference: give a reference model with the policy's own weights (for a PEFT policy none at all: "
                    "an adapter of it will be the reference)"
                )
        own = {name: targets[counterpart].detach() for name, counterpart in self._names.items()}
        if not averager.absorbed:
            averager.update(
                {name: tensor.to(trained[name].device, trained[name].dtype) for name, tensor in own.items()},
                averager.step,
                epoch=averager.epoch,
            )

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
            average = self.averager.average()
            load_into(self.model, {self._names[name]: tensor for name, tensor in average.items()})


def _adapter_names(policy: nn.Module, trained: dict[str, Tensor]) -> dict[str, str]:
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
