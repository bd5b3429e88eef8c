"""Reward against KL divergence: what the averages of RLHF buy at equal drift, where the reward can be hacked.

    python recipes/reward_vs_kl.py                                                     # some five minutes on two cores
    python recipes/reward_vs_kl.py --steps 500 --seeds 3 --betas 5 --pretraining 3000  # about an hour

A byte-level GRU that has read Python's standard library continues its lines and is paid by a reward model fitted to a
few hundred of its own answers. What is wanted, the gold reward, is only measured: the share of the answer that is
distinct known words. Each method is run with several strengths β of the KL term and several seeds, each seed with a
reward model of its own, and compared at equal KL divergence from the initial policy:

- the optimum, which samples of the initial policy give by importance weights where KL is small;
- a fixed reference, the usual RLHF; the EMA of that policy; and the policy drawn back to the initial one (LITI);
- a fixed reference with three times the answers per step, as much computing as a round of WARP with three policies; and
  one with a learning rate that falls to zero;
- an EMA of the policy as the reference (WARP, stage 1: Ramé et al. 2024, arXiv:2406.16768);
- Elastic Reset (Noukhovitch et al. 2023, arXiv:2312.07551);
- WARP: SLERP of three policies with EMA anchors, LITI, and a second round that starts there.

A plain loop around the library's objects, because with TRL's trainers the sweep would take many hours;
`trl_grpo_anchor.py`, `elastic_reset.py` and `warp.py` show the methods there. Results: scripts/bench/RESULTS.md.
Every finished run is in runs/reward_vs_kl/*.json: an interrupted sweep goes on, a finished one only prints and draws.
"""

import copy
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from averaging import EMA, ElasticReset, EMAAnchor, Reference, applied, load_into, named_weights
from averaging.soups import slerp, wise_ft
from common import hacking, report
from common.fronts import Points, by_curve, plot, tables

steps, seeds, betas, pretraining, labels, answers, out = report.arguments(
    __doc__, steps=150, seeds=1, betas=3, pretraining=1000, labels=300, answers=1024
)

PROMPTS, PER_PROMPT, LEARNING_RATE = 16, 4, 1e-3
RATE = min(1.0, 5 / steps)  # of the EMAs per step: they remember a fifth of the run
EVERY = max(1, steps // 4)  # steps between elastic resets
MEMBERS, ROUNDS, ETA = 3, 2, 0.3  # of WARP; the second round starts at ETA, as in the paper
ETAS = [k / 8 for k in range(9)]


class Task:
    """The reward model of a seed, and what is measured."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.reward = hacking.RewardModel(initial, labels, seed=seed)

    @torch.no_grad()
    def measure(self, policy: hacking.Policy, curve: str, at: float) -> dict[str, float | str]:
        """A point of a curve: KL to the initial policy in nats per answer, and both rewards."""
        randomness = torch.Generator().manual_seed(self.seed)
        prompts = hacking.pieces(hacking.source()[1], answers, hacking.PROMPT, randomness)
        rows = policy.answer(prompts, randomness)
        kl = hacking.divergence(policy, initial, rows)
        values = {"kl": kl, "proxy": self.reward(rows), "gold": self.reward.gold(rows)}
        return {"curve": curve, "at": at, **{name: value.mean().item() for name, value in values.items()}}

    def line(self, policy: hacking.Policy, curve: str, origin: Path, end: Path) -> Points:
        """Points on the line between the initial policy and another, both in files; ``policy`` only lends itself."""
        points = []
        for eta in ETAS:
            with applied(policy, wise_ft(origin, end, alpha=eta)):
                points.append(self.measure(policy, curve, eta))
        return points


def train(
    policy: hacking.Policy,
    task: Task,
    beta: float,
    *,
    anchor: EMAAnchor | None = None,
    reset: ElasticReset | None = None,
    ema: EMA | None = None,
    prompts: int = PROMPTS,
    anneal: bool = False,
    member: int = 0,
    curve: str | None = None,
) -> Points:
    """Align ``policy``, in place, with REINFORCE; points along the run, of the policy and of its ``ema``."""
    randomness = torch.Generator().manual_seed(1000 * task.seed + member)
    optimizer = torch.optim.Adam(policy.parameters(), lr=LEARNING_RATE)
    fixed = copy.deepcopy(policy)
    reference = Reference(anchor, policy, fixed) if anchor else None
    if reset:
        reset.update(policy, 0)
    points = [task.measure(policy, curve, 0)] if curve else []
    for step in range(1, steps + 1):
        starts = hacking.pieces(hacking.source()[0], prompts, hacking.PROMPT, randomness)
        rows = policy.answer(starts.repeat_interleave(PER_PROMPT, 0), randomness).view(prompts, PER_PROMPT, -1)
        rewards = task.reward(rows.flatten(0, 1)).view(prompts, PER_PROMPT)
        hacking.loss(policy, fixed, rows, rewards, beta).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - (step - 1) / steps if anneal else 1)
        optimizer.step()
        optimizer.zero_grad()

        if reference:
            reference.update(step)
        if ema:
            ema.update(policy, step)
        if curve and step % max(1, steps // 10) == 0:
            points.append(task.measure(policy, curve, step))
            if ema:
                with applied(policy, ema):
                    points.append(task.measure(policy, f"{curve}, its EMA", step))
        if reset and (weights := reset.update(policy, step)) is not None and step < steps:
            load_into(policy, weights)
        bar.update(prompts / PROMPTS)
    return points


def optimum(task: Task, beta: float) -> Points:
    """What no method can beat in proxy reward: the initial policy times exp(reward/β), by importance weights.

    Down to the β given; for smaller ones too few of the answers would count.
    """
    randomness = torch.Generator().manual_seed(task.seed)
    prompts = hacking.pieces(hacking.source()[1], max(1, answers // 32), hacking.PROMPT, randomness)
    rows = torch.stack([initial.answer(prompt.expand(4 * answers, -1), randomness) for prompt in prompts])
    proxy, gold = (reward(rows.flatten(0, 1)).view(rows.shape[:2]) for reward in (task.reward, task.reward.gold))
    points: Points = []
    for eta in ETAS:
        share = (proxy * eta / beta).softmax(1)
        kl = (share * (share * share.shape[1]).log()).sum(1).mean().item()
        means = {name: (share * reward).sum(1).mean().item() for name, reward in (("proxy", proxy), ("gold", gold))}
        points.append({"curve": "optimum", "at": eta, "kl": kl, **means})
    return points


def fixed(task: Task, beta: float) -> Points:
    policy = copy.deepcopy(initial)
    points = train(policy, task, beta, ema=EMA(1 - RATE), curve="fixed reference")
    with tempfile.TemporaryDirectory() as folder:
        ends = save(initial, folder, "initial"), save(policy, folder, "policy")
        return points + task.line(policy, "fixed reference, LITI", *ends)


def three_batches(task: Task, beta: float) -> Points:
    return train(
        copy.deepcopy(initial), task, beta, prompts=MEMBERS * PROMPTS, curve=f"fixed reference, {MEMBERS} × batch"
    )


def annealed(task: Task, beta: float) -> Points:
    return train(copy.deepcopy(initial), task, beta, anneal=True, curve="fixed reference, rate to zero")


def anchored(task: Task, beta: float) -> Points:
    return train(copy.deepcopy(initial), task, beta, anchor=EMAAnchor(RATE), curve="EMA anchor")


def elastic(task: Task, beta: float) -> Points:
    return train(copy.deepcopy(initial), task, beta, reset=ElasticReset(EVERY, 1 - RATE), curve="elastic reset")


def warp(task: Task, beta: float) -> Points:
    """Rounds of policies with EMA anchors → SLERP of their task vectors → LITI, where the next round starts."""
    points: Points = []
    start = copy.deepcopy(initial)
    with tempfile.TemporaryDirectory() as folder:
        origin = save(initial, folder, "initial")
        for number in range(1, ROUNDS + 1):
            base, tuned = save(start, folder, f"{number}-start"), []
            for member in range(MEMBERS):
                policy = copy.deepcopy(start)
                train(policy, task, beta, anchor=EMAAnchor(RATE), member=member + MEMBERS * (number - 1))
                tuned.append(save(policy, folder, f"{number}-{member}"))
            if number == 1:
                points += task.line(start, "EMA anchor, LITI", origin, tuned[0])
            merged = Path(folder, f"{number}-merged.safetensors")
            slerp(base, tuned, merged)
            points += task.line(start, f"WARP, round {number}", origin, merged)
            load_into(start, slerp(base, tuned, eta=ETA))
    return points


def save(policy: hacking.Policy, folder: str, name: str) -> Path:
    file = Path(folder, f"{name}.safetensors")
    save_file({name: tensor.detach() for name, tensor in named_weights(policy).items()}, file)
    return file


METHODS: dict[Callable[[Task, float], Points], tuple[tuple[float, ...], int]] = {
    optimum: ((0.35,), 0),
    fixed: ((0.1, 0.2, 0.4, 0.14, 0.28), 1),
    anchored: ((0.8, 1.5, 3.0, 1.1), 1),
    elastic: ((0.06, 0.14), 1),
    annealed: ((0.1, 0.2), 1),
    three_batches: ((0.1, 0.2), MEMBERS),
    warp: ((0.8,), MEMBERS * ROUNDS),
}
"""Strengths of the KL term, of which the first few are run, and how many times the work of a plain run."""


def sweep() -> dict[str, Points]:
    """All runs, those that an earlier call has finished from the file it left: "method β seed" → points."""
    file = out / f"steps{steps}-pretraining{pretraining}-labels{labels}-answers{answers}.json"
    cells: dict[str, Points] = json.loads(file.read_text()) if file.exists() else {}
    found = {}
    for seed in range(seeds):
        task = Task(seed)
        bar.write(f"seed {seed}: the reward model correlates {task.reward.correlation:.2f} with the gold reward")
        for method, (strengths, work) in METHODS.items():
            for beta in strengths[:betas]:
                key = f"{method.__name__} {beta} {seed}"
                bar.set_description(key)
                if key in cells:
                    bar.update(work * steps)
                else:
                    cells[key] = method(task, beta)
                    part = file.with_suffix(".part")
                    part.write_text(json.dumps(cells))
                    part.replace(file)
                found[key] = cells[key]
    return found


torch.set_num_threads(1)
learnt = out / f"pretrained-{pretraining}.safetensors"
initial = hacking.Policy()
if learnt.exists():
    load_into(initial, load_file(learnt))
else:
    initial = hacking.pretrained(pretraining)
    save(initial, str(out), learnt.stem)

total = steps * seeds * sum(work * len(strengths[:betas]) for strengths, work in METHODS.values())
with tqdm(total=total, unit="step", dynamic_ncols=True, mininterval=1) as bar:
    curves = by_curve(sweep())
tables(curves, beside="fixed reference")
plot(curves, out / "reward_vs_kl.png")
