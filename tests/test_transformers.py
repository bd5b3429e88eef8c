"""The callbacks for transformers.Trainer, through real trainers on a tiny Llama."""

from __future__ import annotations

import json
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import averaging
from averaging import load_into, named_weights
from averaging.transformers import EMA, LAWA, SWA, AveragingCallback

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def tiny_model(tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=tied,
        )
    )  # fmt: skip


def sequences(count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    tokens = torch.randint(0, 32, (count, 8), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row} for row in tokens]


def trainer(folder: Path, callbacks, model=None, steps: int = 12, **options) -> Trainer:
    defaults = {
        "output_dir": str(folder), "max_steps": steps, "per_device_train_batch_size": 4, "learning_rate": 1e-2,
        "lr_scheduler_type": "constant", "save_steps": 4, "eval_strategy": "steps", "eval_steps": 4, "seed": 1,
        "logging_steps": 1000, "disable_tqdm": True, "report_to": "none", "use_cpu": True,
    }  # fmt: skip
    return Trainer(
        model=model or tiny_model(),
        args=TrainingArguments(**{**defaults, **options}),
        train_dataset=sequences(40, 1),
        eval_dataset=sequences(8, 2),
        callbacks=callbacks,
    )


class Recorder(TrainerCallback):
    """The online weights after each optimizer step, seen by an ordinary callback."""

    def __init__(self) -> None:
        self.weights: dict[int, dict[str, torch.Tensor]] = {}

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        self.weights[state.global_step] = snapshot(model)


def snapshot(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in named_weights(model).items()}


def mean64(snapshots) -> dict[str, torch.Tensor]:
    return {n: torch.stack([s[n].double() for s in snapshots]).mean(0).float() for n in snapshots[0]}


def assert_equal(one, other) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def loss_of(weights) -> float:
    model = tiny_model().eval()
    load_into(model, weights)
    batch = sequences(8, 2)
    with torch.no_grad():
        ids = torch.stack([b["input_ids"] for b in batch])
        return model(input_ids=ids, labels=ids).loss.item()


def test_is_a_real_callback(tmp_path):
    assert isinstance(LAWA(k=2, every=2), TrainerCallback)
    assert pickle.loads(pickle.dumps(LAWA(k=2, every=2))).averager.k == 2
    recorder = Recorder()
    run = trainer(tmp_path, LAWA(k=2, every=2))  # not in a list
    run.add_callback(recorder)
    run.train()
    assert_equal(snapshot(run.model), mean64([recorder.weights[t] for t in (10, 12)]))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_averages_match_float64(tmp_path, accumulate):
    recorder = Recorder()
    averages = AveragingCallback(averaging.LAWA(k=3, every=2), averaging.EMA(0.8), averaging.SWA(0.5, every=1))
    run = trainer(tmp_path, [averages, recorder], gradient_accumulation_steps=accumulate)
    run.train()
    seen = recorder.weights
    lawa, ema, swa = averages.averagers
    assert_equal(dict(lawa.average()), mean64([seen[t] for t in (8, 10, 12)]))
    expected = {n: w.double() for n, w in seen[1].items()}
    for t in range(2, 13):
        expected = {n: 0.8 * e + 0.2 * seen[t][n].double() for n, e in expected.items()}
    for name, tensor in ema.average().items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-6, atol=1e-7)
    for name, tensor in swa.average().items():
        reference = torch.stack([seen[t][name].double() for t in range(6, 13)]).mean(0)
        torch.testing.assert_close(tensor.double(), reference, rtol=1e-6, atol=1e-7)


def test_evaluation_measures_the_average_and_leaves_training_alone(tmp_path):
    plain, recorder = trainer(tmp_path / "a", []), Recorder()
    plain.train()
    run = trainer(tmp_path / "b", [LAWA(k=2, every=2, evaluate="both"), recorder], eval_on_start=True)
    run.train()
    logged = {entry["step"]: entry for entry in run.state.log_history if "eval_loss" in entry}
    assert logged[0]["eval_loss"] == logged[0]["eval_online_loss"]
    for step in (4, 8, 12):
        average = mean64([recorder.weights[step - 2], recorder.weights[step]])
        assert logged[step]["eval_loss"] == pytest.approx(loss_of(average), rel=1e-5)
        assert logged[step]["eval_online_loss"] == pytest.approx(loss_of(recorder.weights[step]), rel=1e-5)
    assert_equal(recorder.weights[12], snapshot(plain.model))
    assert run.evaluate()["eval_loss"] == logged[12]["eval_loss"]


def test_dict_of_sets_evaluate_and_predict_inside_training(tmp_path):
    class Asks(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 6:
                self.evaluated = run.evaluate(sequences(8, 2))["eval_loss"]
                self.predicted = run.predict(sequences(8, 2)).metrics["test_loss"]
                self.after = snapshot(run.model)

    asks, recorder = Asks(), Recorder()
    run = trainer(tmp_path, [LAWA(k=2, every=2), recorder, asks])
    run.eval_dataset = {"one": sequences(8, 2), "two": sequences(8, 3)}
    run.train()
    average = loss_of(mean64([recorder.weights[t] for t in (4, 6)]))
    assert asks.evaluated == pytest.approx(average, rel=1e-5)
    assert asks.predicted == pytest.approx(average, rel=1e-5)
    assert_equal(asks.after, recorder.weights[6])
    last = [entry for entry in run.state.log_history if "eval_one_loss" in entry][-1]
    assert last["eval_one_loss"] == pytest.approx(loss_of(mean64([recorder.weights[t] for t in (10, 12)])), rel=1e-5)
    assert any("eval_two_loss" in entry for entry in run.state.log_history)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_in_evaluation_leaves_the_online_weights(tmp_path, error):
    recorder = Recorder()
    run = trainer(tmp_path, [EMA(0.5), recorder])

    def fail(prediction):
        raise error("stop")

    run.compute_metrics = fail
    with pytest.raises(error):
        run.train()
    assert_equal(snapshot(run.model), recorder.weights[4])


@pytest.mark.parametrize("tied", [False, True])
def test_checkpoints_hold_online_weights_and_the_average_beside(tmp_path, tied):
    recorder = Recorder()
    run = trainer(tmp_path, [LAWA(k=2, every=2), recorder], model=tiny_model(tied))
    run.train()
    online = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-8")
    assert_equal(snapshot(online), recorder.weights[8])
    average = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-8" / "lawa")
    assert_equal(snapshot(average), mean64([recorder.weights[t] for t in (6, 8)]))
    assert (tmp_path / "checkpoint-8" / "lawa" / "generation_config.json").exists()


def test_the_other_way_round(tmp_path):
    recorder = Recorder()
    run = trainer(tmp_path, [LAWA(k=2, every=2, checkpoint="average"), recorder])
    run.train()
    average = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-8")
    assert_equal(snapshot(average), mean64([recorder.weights[t] for t in (6, 8)]))
    online = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-8" / "online")
    assert_equal(snapshot(online), recorder.weights[8])


def three(memory="cpu", checkpoint="online"):
    lawa = averaging.LAWA(k=3, every=3, memory=memory)
    return AveragingCallback(
        lawa, averaging.EMA(0.9, warmup="debias"), averaging.SWA(2, every=1), checkpoint=checkpoint
    )


@pytest.mark.parametrize(
    ("checkpoint", "memory", "cut"),
    [
        ("online", "cpu", 4),  # inside the first window
        ("online", "cpu", 12),  # after the run had ended
        ("online", "disk", 8),  # across a full window
        ("average", "device", 8),
    ],
)
def test_resume_is_exact(tmp_path, checkpoint, memory, cut):
    where = str(tmp_path / "ring") if memory == "disk" else memory
    straight, recorder = three(where, checkpoint), Recorder()
    trainer(tmp_path / "a", [straight, recorder], steps=16).train()
    first = trainer(tmp_path / "b", [three(where, checkpoint)], steps=cut if cut == 12 else 16)
    if cut != 12:

        class Stop(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                control.should_training_stop = state.global_step == cut + 1

        first.add_callback(Stop())
    first.train()
    second, resumed = three(where, checkpoint), Recorder()
    trainer(tmp_path / "b", [second, resumed], steps=16).train(
        resume_from_checkpoint=str(tmp_path / "b" / f"checkpoint-{cut}")
    )
    assert_equal(resumed.weights[16], recorder.weights[16])
    for one, other in zip(straight.averagers, second.averagers, strict=True):
        assert_equal(dict(one.average()), dict(other.average()))


def test_resume_without_state(tmp_path):
    trainer(tmp_path, []).train()
    with (
        pytest.warns(UserWarning, match="averaging-manifest.json"),
        pytest.raises(FileNotFoundError, match='missing="start"'),
    ):
        trainer(tmp_path, [EMA(0.9)], steps=16).train(resume_from_checkpoint=True)
    callback = EMA(0.9, missing="start")
    with pytest.warns(UserWarning, match="averaging-manifest.json"):
        trainer(tmp_path, [callback], steps=16).train(resume_from_checkpoint=True)
    assert callback.averager.absorbed == 4


def test_damaged_state_and_another_models_state(tmp_path):
    trainer(tmp_path, [EMA(0.9)]).train()
    file = tmp_path / "checkpoint-12" / "ema" / "ema.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-8])
    with pytest.raises(ValueError, match=r"ema\.safetensors has .* bytes instead of .* resume from .*checkpoint-8"):
        trainer(tmp_path, [EMA(0.9)], steps=16).train(resume_from_checkpoint=str(tmp_path / "checkpoint-12"))
    file.write_bytes(whole)
    state = tmp_path / "checkpoint-12" / "ema" / "averaging.json"
    numbers = json.loads(state.read_text())
    numbers["layout"] = {f"other.{name}": value for name, value in numbers["layout"].items()}
    state.write_text(json.dumps(numbers))
    (tmp_path / "checkpoint-12" / "averaging-manifest.json").unlink()
    with (
        pytest.warns(UserWarning, match="has no averaging-manifest"),
        pytest.raises(ValueError, match=r"damaged|averaged so far"),
    ):
        trainer(tmp_path, [EMA(0.9)], steps=16).train(resume_from_checkpoint=str(tmp_path / "checkpoint-12"))


def test_best_model_is_what_was_measured(tmp_path):
    run = trainer(
        tmp_path, [LAWA(k=2, every=2)], load_best_model_at_end=True, metric_for_best_model="loss", learning_rate=0.1
    )
    run.train()
    assert run.evaluate()["eval_loss"] == run.state.best_metric
    run = trainer(
        tmp_path / "online", [LAWA(k=2, every=2, evaluate="both")], load_best_model_at_end=True,
        metric_for_best_model="online_loss", greater_is_better=False, learning_rate=0.1,
    )  # fmt: skip
    run.train()
    assert run.evaluate()["eval_loss"] == run.state.best_metric


def noisy(prediction) -> dict[str, float]:
    """A metric that depends on all random generators."""
    return {"draw": torch.rand(1).item() + random.random() + float(np.random.rand())}


def dropping_model() -> LlamaForCausalLM:
    model = tiny_model()
    model.config.attention_dropout = model.model.layers[0].self_attn.attention_dropout = 0.3
    return model


def test_all_averages_are_evaluated_and_training_stays_what_it_is(tmp_path):
    plain, recorder = trainer(tmp_path / "a", [], dropping_model()), Recorder()
    plain.compute_metrics = noisy
    plain.train()
    lawa, ema, swa = averaging.LAWA(k=2, every=2), averaging.EMA(0.8, name="slow_ema"), averaging.SWA(9, every=1)
    callbacks = [AveragingCallback(lawa, ema, evaluate="all"), AveragingCallback(swa), recorder]
    run = trainer(tmp_path / "b", callbacks, dropping_model())
    run.compute_metrics = noisy
    run.train()
    assert_equal(recorder.weights[12], snapshot(plain.model))
    before = {entry["step"]: entry for entry in plain.state.log_history if "eval_loss" in entry}
    for entry in run.state.log_history:
        if "eval_loss" not in entry:
            continue
        step, online = entry["step"], recorder.weights[entry["step"]]
        slow = {n: w.double() for n, w in recorder.weights[1].items()}
        for t in range(2, step + 1):
            slow = {n: 0.8 * e + 0.2 * recorder.weights[t][n].double() for n, e in slow.items()}
        late = mean64([recorder.weights[t] for t in range(9, step + 1)]) if step >= 9 else online
        averages = {"": mean64([recorder.weights[t] for t in (step - 2, step)]), "online_": online}
        averages |= {"slow_ema_": {n: w.float() for n, w in slow.items()}, "swa_": late}
        for prefix, weights in averages.items():
            assert entry[f"eval_{prefix}loss"] == pytest.approx(loss_of(weights), rel=1e-5)
            assert entry[f"eval_{prefix}draw"] == before[step]["eval_draw"], "all are measured on the same numbers"


@pytest.mark.parametrize("checkpoint", ["online", "average"])
@pytest.mark.parametrize("metric", ["loss", "eval_online_loss", "swa_loss", "one_ema_loss", "online_online_loss"])
def test_the_best_model_is_chosen_by_any_of_them_and_is_what_was_measured(tmp_path, metric, checkpoint):
    averages = averaging.LAWA(k=2, every=2), averaging.EMA(0.8), averaging.SWA(9, every=1)
    run = trainer(
        tmp_path, AveragingCallback(*averages, evaluate="all", checkpoint=checkpoint), load_best_model_at_end=True,
        metric_for_best_model=metric, greater_is_better=True, learning_rate=0.1,
    )  # fmt: skip
    sets = {"one": sequences(8, 2), "online": sequences(8, 3)}
    if metric.startswith(("one_", "online_online")):
        run.eval_dataset = sets
    run.train()
    data = sets["online"] if metric == "online_online_loss" else sequences(8, 2)
    assert run.state.best_global_step < 12
    assert run.evaluate(data)["eval_loss"] == run.state.best_metric


class Windows(averaging.LAWA):
    """Two averages from one ring: the latest snapshot alone, and the mean of all."""

    def views(self):
        return {"latest": Latest(self), "mean": self}


class Latest:
    def __init__(self, ring: Windows) -> None:
        self.ring = ring

    @property
    def ready(self) -> bool:
        return self.ring.ready

    def average(self, *, rounded: bool = False):
        return list(self.ring.tensors().values())[-1]


def test_an_averager_of_several_averages(tmp_path):
    straight, recorder = Windows(k=3, every=2), Recorder()
    run = trainer(tmp_path / "a", [AveragingCallback(straight, evaluate="all"), recorder], steps=16)
    run.train()
    assert_equal(snapshot(run.model), recorder.weights[16])
    folder = tmp_path / "a" / "checkpoint-8"
    for name, steps in (("latest", [8]), ("mean", [4, 6, 8])):
        weights = mean64([recorder.weights[t] for t in steps])
        assert_equal(snapshot(AutoModelForCausalLM.from_pretrained(folder / name)), weights)
    assert (folder / "latest" / "averaging.json").exists()
    assert not (folder / "mean" / "averaging.json").exists()
    measured = next(entry for entry in run.state.log_history if entry["step"] == 8 and "eval_loss" in entry)
    assert measured["eval_loss"] == measured["eval_online_loss"]
    assert measured["eval_mean_loss"] == pytest.approx(loss_of(weights), rel=1e-5)

    resumed = Windows(k=3, every=2)
    options = {"load_best_model_at_end": True, "metric_for_best_model": "mean_loss", "greater_is_better": False}
    run = trainer(tmp_path / "a", [AveragingCallback(resumed, evaluate="all")], steps=16, **options)
    run.train(resume_from_checkpoint=str(folder))
    assert run.evaluate()["eval_loss"] == run.state.best_metric
    assert run.state.best_global_step < 16
    resumed.load(tmp_path / "a" / "checkpoint-16" / "latest")
    assert_equal(dict(resumed.average()), dict(straight.average()))
    with pytest.raises(ValueError, match="named 'mean'"):
        trainer(tmp_path / "b", [AveragingCallback(straight, averaging.EMA(0.9, name="mean"))]).train()


def test_the_metrics_of_trls_trainers_are_kept_apart(tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(32)}, unk_token="w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w2")
    texts = datasets.Dataset.from_list([{"text": " ".join(f"w{t}" for t in s["input_ids"])} for s in sequences(16, 1)])

    def logged(folder, callbacks):
        config = trl.SFTConfig(
            output_dir=str(folder), max_steps=4, learning_rate=0.1, eval_strategy="steps", eval_steps=2, use_cpu=True,
            save_strategy="no", report_to="none", disable_tqdm=True, bf16=False, gradient_checkpointing=False,
            per_device_train_batch_size=4, seed=1,
        )  # fmt: skip
        run = trl.SFTTrainer(
            tiny_model(), config, train_dataset=texts, eval_dataset=texts, processing_class=tokenizer,
            callbacks=callbacks,
        )  # fmt: skip
        run.train()
        return [entry for entry in run.state.log_history if "eval_loss" in entry]

    plain = logged(tmp_path / "a", [])
    both = logged(tmp_path / "b", [AveragingCallback(averaging.EMA(0.5), evaluate="both")])
    for one, other in zip(plain, both, strict=True):
        for metric in ("loss", "entropy", "mean_token_accuracy"):
            assert other[f"eval_online_{metric}"] == one[f"eval_{metric}"]
        assert other["eval_entropy"] != one["eval_entropy"]


def test_several_callbacks_and_duplicate_names(tmp_path):
    recorder = Recorder()
    run = trainer(tmp_path, [LAWA(k=2, every=2), EMA(0.9), recorder])
    run.train()
    assert_equal(snapshot(run.model), mean64([recorder.weights[t] for t in (10, 12)]))
    assert (tmp_path / "checkpoint-12" / "ema" / "model.safetensors").exists()
    with pytest.raises(ValueError, match="named 'ema'"):
        trainer(tmp_path / "b", [EMA(0.9), EMA(0.99)]).train()


def test_an_average_that_never_starts(tmp_path):
    recorder = Recorder()
    run = trainer(tmp_path, [SWA(start=100, every=1), recorder])
    with pytest.warns(UserWarning, match="trained weights"):
        run.train()
    assert_equal(snapshot(run.model), recorder.weights[12])


def test_wrong_kinds_of_callback(tmp_path):
    with pytest.raises(AttributeError, match=r"averaging\.transformers import EMA"):
        trainer(tmp_path, [averaging.EMA(0.9)])
    lightning = pytest.importorskip("averaging.lightning")
    with pytest.raises(AttributeError, match=r"averaging\.transformers"):
        trainer(tmp_path, [lightning.EMA(0.9)])


def test_default_window_is_one_percent(tmp_path):
    callback = AveragingCallback(averaging.LAWA(k=2), averaging.EMA())
    trainer(tmp_path, [callback], steps=400, save_strategy="no", eval_strategy="no").train()
    assert callback.averagers[0].absorbed == 200
    assert callback.averagers[1].decay_per_step(callback.averagers[1].run) == pytest.approx(1 - 2 / 5)


def test_epochs(tmp_path):
    recorder = Recorder()
    callback = SWA(start=0, every="epoch")
    trainer(tmp_path, [callback, recorder], steps=-1, num_train_epochs=3, gradient_accumulation_steps=3).train()
    assert callback.averager.absorbed == 3
    ends = [recorder.weights[t] for t in (4, 8, 12)]
    for name, tensor in callback.averager.average().items():
        torch.testing.assert_close(tensor, mean64(ends)[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("checkpoint", ["online", "average"])
def test_lora(tmp_path, checkpoint):
    peft = pytest.importorskip("peft")

    def model():
        adapted = peft.get_peft_model(tiny_model(), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
        return adapted.train()

    straight, recorder = LAWA(k=2, every=3, checkpoint=checkpoint), Recorder()
    torch.manual_seed(3)
    trainer(tmp_path / "a", [straight, recorder], model=model()).train()
    torch.manual_seed(3)
    trainer(tmp_path / "b", [LAWA(k=2, every=3, checkpoint=checkpoint)], model=model(), steps=8).train()
    second, resumed = LAWA(k=2, every=3, checkpoint=checkpoint), Recorder()
    torch.manual_seed(4)
    run = trainer(tmp_path / "b", [second, resumed], model=model())
    run.train(resume_from_checkpoint=True)
    assert set(run.model.peft_config) == {"default"}
    assert_equal(resumed.weights[12], recorder.weights[12])
    assert_equal(dict(straight.averager.average()), dict(second.averager.average()))
    folder = tmp_path / "b" / "checkpoint-12" / ("" if checkpoint == "average" else "lawa")
    opened = peft.PeftModel.from_pretrained(tiny_model(), folder, is_trainable=True)
    assert_equal(snapshot(opened), mean64([recorder.weights[t] for t in (9, 12)]))


class Hears(averaging.EMA):
    """Keeps what it observes."""

    def __init__(self) -> None:
        super().__init__(0.9)
        self.heard: list[tuple[int, set[str], float]] = []

    def observe(self, metrics, step) -> None:
        self.heard.append((step, set(metrics), metrics["eval_loss"]))


def test_averagers_observe_every_evaluation_before_the_checkpoint(tmp_path):
    ears = [Hears(), Hears()]
    ears[1].name = "second"

    class Saved(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            assert [averager.heard[-1][0] for averager in ears] == [state.global_step] * 2

    callbacks = [AveragingCallback(ears[0], evaluate="both"), AveragingCallback(ears[1]), Saved()]
    run = trainer(tmp_path, callbacks)
    run.evaluate()
    run.train()
    run.evaluate()
    logged = [entry for entry in run.state.log_history if "eval_loss" in entry][:3]
    for averager in ears:
        assert [(step, loss) for step, _, loss in averager.heard] == [(e["step"], e["eval_loss"]) for e in logged]
        assert all("eval_online_loss" in names for _, names, _ in averager.heard)
