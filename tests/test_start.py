"""What a run says when it starts: what each averager will keep, and settings that cannot work."""

from __future__ import annotations

import logging
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

from averaging import BEMA, EMA, LAWA, SWA, SWAD, ElasticReset, EMAAnchor, PostHocEMA, Trajectory


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    return nn.Linear(1000, 900, dtype=dtype)  # 0.9 million weights


LINES = [
    (
        lambda _: LAWA(k=5, every=20),
        "lawa: mean of the latest 5 snapshots; 5 × 3.6 MB in CPU memory; every 20 steps; first average at step 20",
    ),
    (
        lambda folder: LAWA(k=2, every=0.1, start=150, memory=folder, name="late"),
        "late: mean of the latest 2 snapshots; 2 × 3.6 MB in {folder}; every 100 steps; first average at step 200",
    ),
    (
        lambda _: LAWA(k=(5, 20), every=2, memory="device"),
        "lawa: mean of the latest 5 and 20 snapshots; 20 × 3.6 MB in CPU memory; every 2 steps; "
        "first average at step 2",
    ),
    (
        lambda _: ElasticReset(every=0.1),
        "elasticreset: back to the EMA of decay 0.995 every 100 steps; 3.6 MB in CPU memory, and 3.6 MB in CPU memory; "
        "every step; first at step 1",
    ),
    (
        lambda _: EMAAnchor(0.6, every=512),
        "anchor: the reference, 0.6 of the way to the policy each time; 3.6 MB in CPU memory; every 512 steps; "
        "first average at step 512",
    ),
    (
        lambda _: SWAD(),
        "swad: mean along a valley of the validation loss; up to 3 × 3.6 MB in CPU memory; every step",
    ),
    (
        lambda _: EMA(0.99),
        "ema: EMA with a decay of 0.99 per step; 3.6 MB in CPU memory; every step; first average at step 1",
    ),
    (
        lambda _: EMA(window=0.1, every=4, compensated=True),
        "ema: EMA with a decay of 0.98019802 per step; 7.2 MB in CPU memory; every 4 steps; first average at step 4",
    ),
    (
        lambda _: SWA(),
        "swa: running mean of the snapshots; 3.6 MB in CPU memory; every epoch; first average at step 750",
    ),
    (
        lambda _: SWA(start="4.5 epochs", every="2 epochs"),
        "swa: running mean of the snapshots; 3.6 MB in CPU memory; every 2 epochs; first average at step 750",
    ),
    (
        lambda _: BEMA(every=50, start=100),
        "bema: EMA with its lag corrected; 3.6 MB in CPU memory, and 2 × 3.6 MB in CPU memory; every 50 steps; "
        "first average at step 150",
    ),
    (
        lambda folder: PostHocEMA(folder),
        "posthocema: power-function EMAs of widths 0.05, 0.1; 2 × 3.6 MB in CPU memory, as much in {folder} "
        "every 10 steps; every step; first average at step 1",
    ),
    (
        lambda folder: Trajectory(folder, every="epoch", dtype="bfloat16"),
        "trajectory: snapshots of 1.8 MB in {folder}; every epoch; first at step 125",
    ),
]


@pytest.mark.parametrize(("build", "line"), LINES, ids=[line.split(";")[0] for _, line in LINES])
def test_every_averager_describes_itself(build, line, tmp_path):
    averager, model = build(tmp_path).prepare(total_steps=1000, steps_per_epoch=125), network()
    assert averager.announcement(averager.bind(model)) == line.format(folder=tmp_path)


def test_the_line_of_bf16_weights_of_unknown_epochs_and_of_a_resumed_run():
    averager, model = SWA(0, every="epoch").prepare(), network(torch.bfloat16)
    assert averager.announcement(averager.bind(model)) == (
        "swa: running mean of the snapshots; 3.6 MB in CPU memory; every epoch"
    )
    lawa = LAWA(k=2, every=2, memory="device").prepare()
    for step in range(1, 6):
        lawa.update(model, step)
    assert lawa.announcement(lawa.bind(model)) == (
        "lawa: mean of the latest 2 snapshots; 2 × 1.8 MB in CPU memory; every 2 steps; resumed at step 5"
    )


@pytest.mark.parametrize("every", [1, 4, 0.05, "epoch", "1.5 epochs", "0.3 epochs"])
@pytest.mark.parametrize("start", [0, 1, 7, 8, 0.2, "epoch", "1.2 epochs"])
@pytest.mark.parametrize("build", [LAWA, BEMA])
def test_the_first_average_is_there_when_it_is_said_to_be(build, every, start):
    weights = {"w": torch.zeros(1)}
    averager = build(every=every, start=start).prepare(total_steps=100, steps_per_epoch=10)
    averager.update(weights, 0, epoch=0.0)
    expected = averager.first_average()
    step = 0
    while not averager.ready:
        step += 1
        averager.update(weights, step, epoch=step / 10)
    assert step == expected


PROBLEMS = [
    (lambda: SWA(start=200, every=1), "swa: the first average would be there after 200 optimizer steps but the run"),
    (lambda: EMA(0.9, every=101), "ema: the first average would be there after 101 .* keeps its trained weights"),
    (lambda: SWA(every="3 epochs"), "swa: the first average would be there after 120 .* ends after 100"),
    (lambda: LAWA(k=5, every=25), "lawa: the window of 5 snapshots would be full after 125 .* ends after 100: give a"),
    (lambda: LAWA(k=(2, 5), every=25), "lawa: the window of 5 snapshots would be full after 125"),
    (lambda: LAWA(k=3, every=10, start=81), "lawa: the window of 3 snapshots would be full after 110"),
    (lambda: EMA(0.999), "ema: with a decay of 0.999 per step, 91% of the average will still be the first"),
]


@pytest.mark.parametrize(("build", "problem"), PROBLEMS)
def test_settings_that_cannot_work_are_said_to(build, problem):
    with pytest.warns(UserWarning, match=problem):
        build().prepare(total_steps=100, steps_per_epoch=40)
    build().prepare()


@pytest.mark.parametrize(
    "build",
    [
        lambda: SWA(start=100, every=1),
        lambda: LAWA(k=4, every=25),
        lambda: LAWA(k=3, every=10, start=80),
        lambda: EMA(0.999, warmup="debias"),
        lambda: EMA(half_life=99),
        lambda: EMA(),
        lambda: LAWA(),
        lambda: BEMA(every=100),
    ],
)
def test_settings_that_just_work_are_quiet(build):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build().prepare(total_steps=500 if not build().every else 100, steps_per_epoch=40)


# ---------------------------------------------------------------------- in the trainers


def test_the_line_is_seen_by_default_and_can_be_hidden():
    code = (
        "import logging, sys; from torch import nn; from averaging import EMA; "
        "from averaging.callbacks import CallbackCore; {}; average = EMA(0.9).prepare(); "
        "[CallbackCore(average).announce(nn.Linear(2, 2)) for _ in range(2)]"
    )
    line = "averaging: ema: EMA with a decay of 0.9 per step; 24 B in CPU memory; every step; first average at step 1\n"
    for setting, seen in (
        ("pass", line * 2),
        ("logging.getLogger('averaging').setLevel('WARNING')", ""),
        ("logging.basicConfig(format='%(name)s: %(message)s')", line * 2),
    ):
        run = subprocess.run([sys.executable, "-c", code.format(setting)], capture_output=True, text=True, check=True)
        assert run.stderr == seen


EXPECTED = [
    "lawa: mean of the latest 2 snapshots; 2 × 12 B in CPU memory; every 2 steps; first average at step 2",
    "ema: EMA with a decay of 0.5 per step; 12 B in CPU memory; every step; first average at step 1",
]


def lines(caplog) -> list[str]:
    found = [record.getMessage() for record in caplog.records if record.name == "averaging"]
    caplog.clear()
    return found


def test_lightning_says_it_once_in_a_run(tmp_path, caplog):
    lightning = pytest.importorskip("lightning.pytorch")
    from averaging.lightning import EMA, LAWA

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(2, 1)

        def training_step(self, batch, index):
            return self.net(torch.ones(1, 2)).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

        def train_dataloader(self):
            return torch.utils.data.DataLoader(range(4))

    def fit(epochs, **options):
        trainer = lightning.Trainer(
            default_root_dir=tmp_path, max_epochs=epochs, callbacks=[LAWA(k=2, every=2), EMA(0.5)], accelerator="cpu",
            logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            warnings.filterwarnings("ignore", "`isinstance.treespec", FutureWarning)
            trainer.fit(Module(), **options)
        return trainer

    with caplog.at_level(logging.INFO):
        fit(1).save_checkpoint(tmp_path / "last.ckpt")
        assert lines(caplog) == EXPECTED
        fit(2, ckpt_path=tmp_path / "last.ckpt")
        assert lines(caplog) == [line.split("first")[0] + "resumed at step 4" for line in EXPECTED]


def test_transformers_says_it_once_in_a_run(tmp_path, caplog):
    transformers = pytest.importorskip("transformers")
    from averaging.transformers import EMA, LAWA

    class Model(transformers.PreTrainedModel):
        config_class = transformers.PretrainedConfig

        def __init__(self) -> None:
            super().__init__(transformers.PretrainedConfig())
            self.net = nn.Linear(2, 1)
            self.post_init()

        def forward(self, x, labels=None):
            return {"loss": self.net(x).sum()}

    def train(steps, **options):
        arguments = transformers.TrainingArguments(
            str(tmp_path), max_steps=steps, save_steps=4, report_to="none", disable_tqdm=True, use_cpu=True
        )
        data = [{"x": torch.ones(2), "labels": 0}] * 8
        trainer = transformers.Trainer(Model(), arguments, train_dataset=data, callbacks=[LAWA(k=2, every=2), EMA(0.5)])
        trainer.train(**options)

    with caplog.at_level(logging.INFO):
        train(4)
        assert lines(caplog) == EXPECTED
        train(8, resume_from_checkpoint=True)
        assert lines(caplog) == [line.split("first")[0] + "resumed at step 4" for line in EXPECTED]
