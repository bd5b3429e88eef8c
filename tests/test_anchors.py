"""Anchors and Elastic Reset against float64, in a loop and over runs of TRL's trainers, full and LoRA."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import averaging
from averaging import BEMA, EMAAnchor, Reference, named_weights

trl = pytest.importorskip("trl")
peft = pytest.importorskip("peft")
datasets = pytest.importorskip("datasets")
tokenizers = pytest.importorskip("tokenizers")
import transformers  # noqa: E402

from averaging.transformers import LAWA, AnchorCallback, AveragingCallback  # noqa: E402
from averaging.transformers import EMAAnchor as Callback  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

WORDS = [f"w{i}" for i in range(24)]


def word_tokenizer():
    vocabulary = {word: i for i, word in enumerate([*WORDS, "<end>", "<pad>"])}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<pad>")


def save_policy(path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=26, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, eos_token_id=24, pad_token_id=25, bos_token_id=None, tie_word_embeddings=True,
        initializer_range=0.5,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(path)


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


@pytest.fixture(scope="module")
def policy_path(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("policy")
    save_policy(path)
    return str(path)


def sentence(i: int, length: int = 4) -> str:
    return " ".join(WORDS[(7 * i + 5 * k * k) % 24] for k in range(length))


def reward(completion_ids, **_) -> list[float]:
    return [sum(t % 3 for t in ids) / len(ids) for ids in completion_ids]


DATA = {
    "dpo": lambda i: {"prompt": sentence(i), "chosen": " " + sentence(i + 3), "rejected": " " + sentence(2 * i + 1)},
    "kto": lambda i: {"prompt": sentence(i), "completion": " " + sentence(i + 3), "label": i % 2 == 0},
    "grpo": lambda i: {"prompt": sentence(i)},
    "rloo": lambda i: {"prompt": sentence(i)},
}


def trainer(kind: str, policy, tokenizer, folder: Path, callbacks, lora: bool = False, **options):
    defaults: dict[str, Any] = {
        "output_dir": str(folder), "max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 2e-2,
        "lr_scheduler_type": "constant", "save_steps": 1, "logging_steps": 1, "disable_tqdm": True, "seed": 1,
        "report_to": "none", "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
    }  # fmt: skip
    if kind in ("grpo", "rloo"):
        defaults |= {"num_generations": 2, "max_completion_length": 4, "beta": 0.1}
    else:
        defaults |= {"gradient_accumulation_steps": 2}
    config, cls, argument = {
        "dpo": (trl.DPOConfig, trl.DPOTrainer, {}),
        "kto": (trl.KTOConfig, trl.KTOTrainer, {}),
        "grpo": (trl.GRPOConfig, trl.GRPOTrainer, {"reward_funcs": reward}),
        "rloo": (trl.RLOOConfig, trl.RLOOTrainer, {"reward_funcs": reward}),
    }[kind]
    reference = {"ref_model": options.pop("ref_model")} if "ref_model" in options else {}
    adapter = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.1) if lora else None
    data = datasets.Dataset.from_list([DATA[kind](i) for i in range(24)])
    return cls(
        model=policy,
        args=config(**{**defaults, **options}),
        train_dataset=data,
        eval_dataset=data.select(range(4)),
        processing_class=tokenizer,
        peft_config=adapter,
        callbacks=callbacks,
        **argument,
        **reference,
    )


class Recorder(transformers.TrainerCallback):
    """The policy's trained weights before the first and after each optimizer step, and the reference's."""

    def __init__(self) -> None:
        self.policy, self.reference = {}, {}
        self.trainer: Any = None

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.note(state.global_step)

    def note(self, step: int) -> None:
        policy = named_weights(self.trainer.model)
        every = dict((self.trainer.ref_model or self.trainer.model).named_parameters())
        self.policy[step] = {name: tensor.clone() for name, tensor in policy.items()}
        self.reference[step] = {
            name: (every.get(name.replace(".default.", ".ref.")) if self.trainer.ref_model is None else every[name])
            for name in policy
        }
        self.reference[step] = {n: t.detach().clone() for n, t in self.reference[step].items() if t is not None}


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def double(weights) -> dict[str, torch.Tensor]:
    return {name: tensor.double() for name, tensor in weights.items()}


def close(weights, expected) -> None:
    assert weights.keys() == expected.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-6, atol=1e-7, msg=lambda m, n=name: n + m)


# ---------------------------------------------------------------------- over runs of TRL's trainers


@pytest.mark.parametrize(
    ("kind", "lora", "resume"),
    [("dpo", False, (2,)), ("dpo", True, (3, 4)), ("grpo", False, (3,)), ("grpo", True, (4,)), ("rloo", True, ()),
     ("kto", False, ())],
)  # fmt: skip
def test_trl(kind, lora, resume, policy_path, tokenizer, tmp_path):
    def run(folder, checkpoint=None):
        before, after = Recorder(), Recorder()
        anchor = Callback(0.3, every=2)
        reset = AveragingCallback(averaging.ElasticReset(3, 0.8))
        run = trainer(kind, policy_path, tokenizer, folder, [before, reset, anchor, after], lora)
        before.trainer = after.trainer = run
        after.note(0)
        run.train(resume_from_checkpoint=checkpoint)
        return before, after, run

    before, after, first = run(tmp_path)
    initial = double(after.policy[0])
    anchor, ema = initial, initial
    for step in range(1, 7):
        ema = {n: 0.8 * ema[n] + 0.2 * w.double() for n, w in before.policy[step].items()}
        assert same(before.policy[step], after.policy[step]) == (step % 3 != 0)
        if step % 3 == 0:
            close(after.policy[step], ema)
            ema = initial
        if step % 2 == 0:
            anchor = {n: 0.7 * anchor[n] + 0.3 * w.double() for n, w in after.policy[step].items()}
        close(after.reference[step], anchor)
        assert not same(after.reference[step], after.policy[step])
    assert not same(after.reference[2], after.reference[6])
    if lora:
        assert first.ref_model is None
        assert set(first.model.peft_config) == {"default", "ref"}
        trained = {name for name, parameter in first.model.named_parameters() if parameter.requires_grad}
        assert trained == set(after.policy[0])
        assert not any(isinstance(m, nn.Dropout) for n, m in first.model.named_modules() if "lora_dropout.ref" in n)
    for cut in resume:
        _, again, _ = run(tmp_path, str(tmp_path / f"checkpoint-{cut}"))
        for step in range(cut + 1, 7):
            assert same(again.policy[step], after.policy[step])
            assert same(again.reference[step], after.reference[step])


@pytest.mark.parametrize(("kind", "lora"), [("dpo", True), ("dpo", False), ("grpo", True), ("grpo", False)])
def test_the_loss_is_computed_with_the_reference(kind, lora, policy_path, tokenizer, tmp_path):
    """A reference that is the policy: DPO's loss is log 2, GRPO's KL is 0; and it is not when the reference stays."""

    def logged(mu):
        options = {"disable_dropout": True, "save_strategy": "no", "max_steps": 4}
        options |= {"gradient_accumulation_steps": 1}
        run = trainer(kind, policy_path, tokenizer, tmp_path, [Callback(mu)], lora, **options)
        run.train()
        metric = "kl" if kind == "grpo" else "loss"
        return [entry[metric] for entry in run.state.log_history if metric in entry][:4]

    expected = [0.0 if kind == "grpo" else 0.6931] * 4
    assert logged(1.0) == pytest.approx(expected, abs=2e-4)
    assert logged(0.0)[1:] != pytest.approx(expected[1:], abs=2e-4)


def test_bema_for_the_reference(policy_path, tokenizer, tmp_path):
    seen = Recorder()
    anchor = AnchorCallback(BEMA(every=2))
    assert pickle.loads(pickle.dumps(anchor)).averager.kappa == 0.5
    run = trainer("dpo", policy_path, tokenizer, tmp_path, [anchor, seen], save_strategy="no")
    seen.trainer = run
    seen.note(0)
    run.train()
    start = ema = double(seen.policy[0])
    for step in range(1, 7):
        theta = double(seen.policy[step])
        if step % 2 == 0:
            beta, alpha = (10 + step) ** -0.5, (10 + step) ** -0.2
            ema = {n: (1 - beta) * ema[n] + beta * theta[n] for n in ema}
            close(seen.reference[step], {n: ema[n] + alpha * (theta[n] - start[n]) for n in ema})
        elif step == 1:
            close(seen.reference[step], start)


def test_a_pretrained_adapter_beside_an_average(policy_path, tokenizer, tmp_path):
    """TRL makes the reference adapter itself; the average of the policy opens as an adapter; and both resume."""

    def run(checkpoint=None):
        torch.manual_seed(1)
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        policy = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(policy_path), config)
        start = double({n: w.clone() for n, w in named_weights(policy).items()})
        seen, average = Recorder(), averaging.EMA(0.5)
        callbacks = [AveragingCallback(average), Callback(0.3), seen]
        seen.trainer = trainer("dpo", policy, tokenizer, tmp_path, callbacks, max_steps=3)
        seen.trainer.train(resume_from_checkpoint=checkpoint)
        assert set(policy.peft_config) == {"default", "ref"}
        return start, seen, average

    start, seen, average = run()
    close(seen.reference[1], {n: 0.7 * start[n] + 0.3 * w.double() for n, w in seen.policy[1].items()})
    assert same(named_weights(seen.trainer.model), average.average(rounded=True))
    base = transformers.AutoModelForCausalLM.from_pretrained(policy_path)
    opened = peft.PeftModel.from_pretrained(base, tmp_path / "checkpoint-3" / "ema", is_trainable=True)
    assert same(named_weights(opened), named_weights(seen.trainer.model))
    _, again, other = run(str(tmp_path / "checkpoint-1"))
    for step in (2, 3):
        assert same(again.policy[step], seen.policy[step])
        assert same(again.reference[step], seen.reference[step])
    assert same(other.average(), average.average())


# ---------------------------------------------------------------------- in a loop


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("mu", "every", "start"), [(0.001, 1, 0), (0.6, 16, 40), (1.0, 16, 0)])
def test_a_loop(dtype, mu, every, start):
    torch.manual_seed(0)
    policy = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1)).to(dtype)
    policy[1].bias.requires_grad_(False)
    model = copy.deepcopy(policy)
    with torch.no_grad():
        model[0].weight.add_(1)  # a reference of its own
    expected = double(named_weights(model))
    reference = Reference(EMAAnchor(mu, every=every, start=start), policy, model)
    for step in range(1, 101):
        with torch.no_grad():
            for parameter in named_weights(policy).values():
                parameter.add_(0.1 * torch.randn(parameter.shape).to(dtype) + 0.05)
        reference.update(step)
        if step >= start and step % every == 0:
            expected = {n: (1 - mu) * expected[n] + mu * w.double() for n, w in named_weights(policy).items()}
        for name, tensor in named_weights(model).items():
            bound = 2.0**-8 if dtype is torch.bfloat16 else 1e-5
            torch.testing.assert_close(tensor.double(), expected[name], rtol=bound, atol=1e-6)
    assert "1.bias" not in named_weights(model)
    assert torch.equal(model[1].bias, policy[1].bias)


def test_an_adapter_as_the_reference_holds_no_second_base():
    policy = peft.get_peft_model(nn.Sequential(nn.Linear(3, 4)), peft.LoraConfig(r=2, target_modules=["0"]))
    base = policy.get_base_model()[0].base_layer.weight
    state = torch.get_rng_state()
    count = sum(p.numel() for p in policy.parameters())
    reference = Reference(EMAAnchor(0.5), policy)
    assert torch.equal(torch.get_rng_state(), state)
    assert sum(p.numel() for p in policy.parameters()) - count == sum(w.numel() for w in named_weights(policy).values())
    start = {n: w.clone() for n, w in named_weights(policy).items()}
    with torch.no_grad():
        for parameter in named_weights(policy).values():
            parameter.add_(1)
    reference.update(1)
    frozen = dict(policy.named_parameters())
    for name, tensor in start.items():
        other = frozen[name.replace(".default.", ".ref.")]
        torch.testing.assert_close(other.detach(), tensor + 0.5)
        assert not other.requires_grad
    assert policy.get_base_model()[0].base_layer.weight is base


# ---------------------------------------------------------------------- what cannot work


@pytest.mark.parametrize(
    ("kind", "lora", "options", "message"),
    [
        ("grpo", False, {"beta": 0.0}, "beta=0"),
        ("grpo", True, {"beta": 0.0}, "beta=0"),
        ("dpo", False, {"precompute_ref_log_probs": True}, "precompute_ref_log_probs"),
        ("dpo", False, {"sync_ref_model": True}, "sync_ref_model"),
        ("dpo", True, {"ref_model": True}, "no counterpart"),
    ],
)
def test_refused(kind, lora, options, message, policy_path, tokenizer, tmp_path):
    if options.get("ref_model"):
        options = {"ref_model": transformers.AutoModelForCausalLM.from_pretrained(policy_path)}
    run = trainer(kind, policy_path, tokenizer, tmp_path, [Callback()], lora, **options)
    with pytest.raises(ValueError, match=message):
        run.train()
    assert run.state.global_step == 0


def test_refused_anywhere(policy_path, tokenizer, tmp_path):
    def attempt(callbacks):
        trainer("dpo", policy_path, tokenizer, tmp_path, callbacks).train()

    class Sharded(transformers.TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            run.is_fsdp_enabled = True

    with pytest.raises(ValueError, match="two of them"):
        attempt([Callback(), Callback(name="other")])
    with pytest.raises(ValueError, match="named 'anchor'"):
        attempt([AveragingCallback(averaging.EMA(0.5, name="anchor")), Callback()])
    run = trainer("dpo", policy_path, tokenizer, tmp_path, [Sharded(), Callback()])
    with pytest.raises(ValueError, match=r"FSDP is not supported.*train with DDP or DeepSpeed"):
        run.train()
    with pytest.raises(TypeError, match="not an averager"):
        AnchorCallback(0.9)
    with pytest.raises(AttributeError, match=r"averaging\.transformers import EMAAnchor"):
        attempt([EMAAnchor()])
    config = trl.SFTConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False)
    texts = datasets.Dataset.from_list([{"text": sentence(i)} for i in range(8)])
    run = trl.SFTTrainer(policy_path, config, train_dataset=texts, processing_class=tokenizer, callbacks=Callback())
    with pytest.raises(ValueError, match="SFTTrainer has no reference"):
        run.train()


def test_a_sharded_policy_gets_no_adapter_as_its_reference(tmp_path):
    policy = peft.get_peft_model(nn.Sequential(nn.Linear(3, 2)), peft.LoraConfig(r=1, target_modules=["0"]))
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        fully_shard(policy, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match="the policy is sharded, so that no adapter can be added"):
            Reference(EMAAnchor(0.5), policy)
    finally:
        distributed.destroy_process_group()
    assert [*policy.peft_config] == ["default"]


def test_resuming_without_the_state_is_an_error(policy_path, tokenizer, tmp_path):
    trainer("dpo", policy_path, tokenizer, tmp_path, [], max_steps=1).train()
    run = trainer("dpo", policy_path, tokenizer, tmp_path, [Callback()], max_steps=2)
    with (
        pytest.warns(UserWarning, match="no averaging-manifest"),
        pytest.raises(FileNotFoundError, match="no state of 'anchor'"),
    ):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_refused_in_a_loop():
    policy = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="policy itself"):
        Reference(EMAAnchor(), policy, policy)
    with pytest.raises(ValueError, match="no PEFT model"):
        Reference(EMAAnchor(), policy)
    with pytest.raises(ValueError, match="'weight'"):
        Reference(EMAAnchor(), policy, nn.Linear(2, 2))
    config = peft.LoraConfig(r=2, target_modules=["0"], bias="all")
    with pytest.raises(ValueError, match="belongs to no adapter"):
        Reference(EMAAnchor(), peft.get_peft_model(nn.Sequential(nn.Linear(3, 2)), config))
    with pytest.raises(ValueError, match="mu=2"):
        EMAAnchor(2)


def test_a_run_says_at_its_start_what_its_anchor_does(policy_path, tokenizer, tmp_path, caplog):
    caplog.set_level("INFO", "averaging")
    trainer("dpo", policy_path, tokenizer, tmp_path, [Callback(0.6, every=2)], max_steps=2).train()
    (line,) = [record.getMessage() for record in caplog.records if record.name == "averaging"]
    assert line.startswith("anchor: the reference, 0.6 of the way")
    assert line.endswith("every 2 steps; first average at step 2")
    run = trainer("dpo", policy_path, tokenizer, tmp_path, [Callback(0.6, every=9)], max_steps=1)
    with pytest.warns(UserWarning, match="first move after 9 optimizer steps but the run ends after 1"):
        run.train()


class Engine:
    """Stands in for vLLM, which TRL gives the policy's weights once per global step."""

    def __init__(self, policy: nn.Module) -> None:
        self.policy = policy
        self.held: dict[str, torch.Tensor] = {}
        self.stale: list[bool] = []

    def _weights(self) -> dict[str, torch.Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.policy.named_parameters()}

    def sync_weights(self) -> None:
        self.held = self._weights()

    def generate(self, prompts, **_):
        self.stale.append(not same(self.held, self._weights()))
        completions = [[(7 * i + 5 * j * i) % 24 for j in range(4)] for i in range(len(prompts))]
        return None, completions, [[[0.0]] * 4 for _ in prompts], None


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_rollouts_of_an_engine_beside_the_model_are_of_the_weights_that_it_holds(
    kind, policy_path, tokenizer, tmp_path
):
    # Two optimizer steps for each batch of rollouts, and evaluations before and in between.
    run = trainer(
        kind, policy_path, tokenizer, tmp_path, [LAWA(k=2, every=1, evaluate="both")], eval_strategy="steps",
        eval_steps=1, eval_on_start=True, save_strategy="no", num_iterations=2, per_device_eval_batch_size=4,
    )  # fmt: skip
    run.use_vllm, run.vllm_mode, run._last_loaded_step = True, "server", -1
    run.vllm_importance_sampling_correction = False
    run.vllm_generation = engine = Engine(run.model)
    run.train()
    run.evaluate()
    assert len(engine.stale) > 12
    assert not any(engine.stale)
