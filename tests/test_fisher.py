"""Fisher information against closed forms, and soups weighted by it against float64."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from averaging import cli, soups
from averaging.checkpoints import Checkpoint, find

# ---------------------------------------------------------------------- the information

INPUTS = torch.randn(12, 5, generator=torch.Generator().manual_seed(1))
LABELS = torch.randint(0, 3, (12,), generator=torch.Generator().manual_seed(2))


def classifier(dropout=0.0):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 3), nn.Dropout(dropout))


def closed_form(model, inputs=INPUTS, labels=None):
    """Softmax regression: (∂/∂W_cj log p_y)² = (δ_cy − p_c)² x_j², whose expectation over y is p_c (1 − p_c) x_j²."""
    x = inputs.double().numpy()
    scores = x @ model[0].weight.detach().double().numpy().T + model[0].bias.detach().double().numpy()
    p = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    size = p * (1 - p) if labels is None else (np.eye(3)[labels.numpy()] - p) ** 2
    return {"0.weight": size.T @ x**2 / len(x), "0.bias": size.mean(0)}


def close(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(found[name].double().numpy(), expected[name], err_msg=name, **tolerance)


@pytest.mark.parametrize("kind", ["tuples", "tensors", "mappings"])
def test_the_expected_fisher_of_softmax_regression(kind):
    model = classifier(dropout=0.5).train()
    model[0].weight.grad = torch.ones(3, 5)
    batches = {
        "tuples": [(INPUTS[:5], LABELS[:5]), (INPUTS[5:], LABELS[5:])],
        "tensors": INPUTS.split(4),
        "mappings": [{"x": INPUTS, "name": "all"}],
    }[kind]
    logits = (lambda model, one: model(one["x"])) if kind == "mappings" else None
    found = soups.fisher_information(model, batches, logits=logits)
    close(found, closed_form(model), rtol=1e-5)
    assert all(tensor.dtype == torch.float32 and not tensor.requires_grad for tensor in found.values())
    assert model.training
    assert torch.equal(model[0].weight.grad, torch.ones(3, 5))


def test_given_labels_make_the_empirical_fisher():
    model = classifier()

    def loss(model, one):
        return nn.functional.cross_entropy(model(one[0]), one[1])

    found = soups.fisher_information(model, [(INPUTS, LABELS)], labels="given", loss=loss)
    close(found, closed_form(model, labels=LABELS), rtol=1e-5)


def test_sampled_labels_approach_the_expectation():
    model = classifier()
    many = INPUTS.repeat(300, 1)
    found = soups.fisher_information(model, [many], labels="sampled", seed=4)
    close(found, closed_form(model), rtol=0.1)
    close(found, {n: t.double().numpy() for n, t in
                  soups.fisher_information(model, [many], labels="sampled", seed=4).items()}, rtol=0)  # fmt: skip


class Tokens(nn.Module):
    """A language model: classifies each token, masked ones included."""

    def __init__(self):
        super().__init__()
        self.net = classifier()

    def forward(self, x, attention_mask):
        return type("Output", (), {"logits": self.net(x)})


def test_tokens_are_sampled_and_masked_ones_left_out():
    model = Tokens()
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    x = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(3))
    batch = {"x": x.repeat(1500, 1, 1), "attention_mask": mask.repeat(1500, 1)}
    found = soups.fisher_information(model, [batch], labels="sampled")
    seen = x[mask.bool()]
    expected = closed_form(model.net, seen)
    close(found, {f"net.{n}": t * len(seen) / 2 for n, t in expected.items()}, rtol=0.15)
    with pytest.raises(ValueError, match="give labels='sampled'"):
        soups.fisher_information(model, [batch])


def test_frozen_parameters_have_none_and_tied_ones_one(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        model.model.norm.weight.requires_grad_(False)
        model.save_pretrained(tmp_path / name)
        ids = torch.arange(12).view(3, 4)
        found = soups.fisher_information(model, [{"input_ids": ids}], tmp_path / name, labels="sampled")
        given = soups.fisher_information(model, [{"input_ids": ids, "labels": ids}], labels="given")
        assert found.keys() == given.keys()
        torch.save(model.state_dict(), tmp_path / f"{name}.pt")
        assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} & found.keys() == {
            "model.embed_tokens.weight"
        }
    fishers = [Checkpoint(tmp_path / name / "fisher.safetensors") for name in "ab"]
    assert fishers[0].ties == {"lm_head.weight": "model.embed_tokens.weight"}
    mixed = soups.fisher([tmp_path / "a", tmp_path / "b"], tmp_path / "out", floor=0)
    assert LlamaForCausalLM.from_pretrained(tmp_path / "out").lm_head.weight.shape == (16, 8)
    # A torch file holds the tied weight twice: both are weighted alike.
    twice = soups.fisher([tmp_path / "a.pt", tmp_path / "b.pt"], fisher=[one.path for one in fishers], floor=0)
    assert torch.equal(twice["lm_head.weight"], twice["model.embed_tokens.weight"])
    assert all(torch.equal(twice[name], mixed[name]) for name in mixed)


def test_what_has_no_fisher(tmp_path):
    model = classifier()
    for arguments, options, says in (
        ([], {}, "there are no examples"),
        ([3], {}, "a batch is a mapping of tensors"),
        ([INPUTS], {"labels": "true"}, "labels='true': one of expected, sampled, given"),
        ([INPUTS], {"labels": "given"}, "under 'labels'"),
        ([INPUTS], {"logits": lambda model, one: 3}, "not int"),
        ([INPUTS], {"logits": lambda model, one: model(one[0])[0]}, r"not \[3\]"),
        ([INPUTS * float("nan")], {}, "'0.weight' is not finite"),
    ):
        with pytest.raises(ValueError, match=says):
            soups.fisher_information(model, arguments, tmp_path, **options)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------- the soup

SHAPES = {"matrix": (90, 33), "vector": (7,), "scalar": (), "empty": (0, 3)}


@pytest.fixture
def family(tmp_path):
    """Make models with Fishers beside them, some elements zero in one or in all; the buffer has none."""

    def make(count, dtype=torch.float32):
        models, fishers, paths = [], [], []
        for i in range(count):
            g = torch.Generator().manual_seed(i)
            model = {n: torch.randn(s, generator=g).to(dtype) for n, s in SHAPES.items()}
            model |= {"buffer": torch.randn(4, generator=g).to(dtype), "ids": torch.arange(3)}
            fisher = {n: torch.rand(s, generator=g) * 10.0 ** torch.randint(-8, 0, s, generator=g)
                      for n, s in SHAPES.items()}  # fmt: skip
            fisher["matrix"][0] = 0.0
            fisher["matrix"][i + 1] = 0.0
            paths.append(tmp_path / f"m{i}.safetensors")
            save_file(model, paths[-1])
            save_file(fisher, tmp_path / f"m{i}.fisher.safetensors", {"fisher": "expected"})
            models.append({n: t.double().numpy() for n, t in model.items()})
            fishers.append({n: t.double().numpy() for n, t in fisher.items()})
        return paths, models, fishers

    return make


def reference(models, fishers, weights, floor):
    count = sum(tensor.size for tensor in fishers[0].values())
    least = floor * np.sqrt(sum((tensor**2).sum() for tensor in fishers[0].values()) / count)
    expected = {}
    for name in models[0]:
        if name in fishers[0]:
            own = [np.maximum(fishers[0][name], least), *(fisher[name] for fisher in fishers[1:])]
            own = [weight * one for weight, one in zip(weights, own, strict=True)]
            total = sum(own)
            mean = sum(f * m[name] for f, m in zip(own, models, strict=True)) / np.where(total == 0, 1, total)
            expected[name] = np.where(total == 0, models[0][name], mean)
        elif name != "ids":
            expected[name] = np.average([model[name] for model in models], axis=0, weights=weights)
    return expected


def near(mixed, expected, dtype=torch.float32):
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
    assert mixed.keys() == {*expected, "ids"}
    for name, wide in expected.items():
        assert mixed[name].dtype == dtype
        np.testing.assert_allclose(mixed[name].double().numpy(), wide, rtol=tolerance, atol=1e-12, err_msg=name)


def soup(*arguments):
    return cli.main([str(argument) for argument in arguments])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("floor", [0.0, 1e-6, 0.1])
def test_the_formula(family, tmp_path, monkeypatch, dtype, floor):
    from averaging.soups import engine

    monkeypatch.setattr(engine, "PIECE", 1024)
    monkeypatch.setattr(engine, "TASK", 2)
    paths, models, fishers = family(3, dtype)
    expected = reference(models, fishers, [1, 1, 1], floor)
    near(soups.fisher(paths, floor=floor), expected, dtype)
    assert soup(*paths, "--method", "fisher", "--floor", floor, "-o", tmp_path / "o.safetensors") == 0
    near(load_file(tmp_path / "o.safetensors"), expected, dtype)
    zero = soups.fisher(paths, floor=floor)["matrix"][0].double().numpy()
    np.testing.assert_allclose(zero, models[0]["matrix"][0], rtol=1e-15)  # where no Fisher speaks


def test_weights_threads_and_a_scale_that_does_not_matter(family, tmp_path):
    paths, models, fishers = family(2)
    expected = reference(models, fishers, [0.3, 2.0], 1e-6)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            near(soups.fisher(paths, weights=[0.3, 2]), expected)
    finally:
        torch.set_num_threads(before)
    scaled = []
    for i, fisher in enumerate(fishers):
        scaled.append(tmp_path / f"scaled-{i}.safetensors")
        save_file({n: torch.from_numpy(np.asarray(t * 1e-9)) for n, t in fisher.items()}, scaled[-1])
    near(soups.fisher(paths, weights=[0.3, 2], fisher=scaled), expected)
    only = soups.fisher(paths, weights=[0, 1], floor=0)
    positive = fishers[1]["matrix"] > 0
    np.testing.assert_array_equal(only["matrix"].double().numpy()[positive], models[1]["matrix"][positive])


def test_equal_fishers_give_the_mean_and_one_that_is_sure_decides(tmp_path):
    models = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([3.0, 6.0, 9.0])]
    sure = [torch.tensor([1.0, 1.0, 0.0]), torch.tensor([1.0, 0.0, 1.0])]
    for i in range(2):
        save_file({"a": models[i]}, tmp_path / f"{i}.safetensors")
        save_file({"a": sure[i]}, tmp_path / f"{i}.fisher.safetensors", {"fisher": "expected"})
    assert [path.path.name for path in find(tmp_path)] == ["0.safetensors", "1.safetensors"]  # and no Fisher
    assert soups.fisher(tmp_path, floor=0)["a"].tolist() == [2.0, 2.0, 9.0]


def test_the_record_and_a_recipe(family, tmp_path):
    paths, models, fishers = family(2)
    text = "method: fisher\ningredients: [m0.safetensors, m1.safetensors]\noutput: out.safetensors\n"
    text += "fisher: [m0.fisher.safetensors, m1.fisher.safetensors]\nlayers: {vector: {weights: [1, 3]}}\n"
    (tmp_path / "soup.yaml").write_text(text)
    assert soup("--recipe", tmp_path / "soup.yaml", "--skip", "scalar") == 0
    expected = reference(models, fishers, [1, 1], 1e-6)
    expected |= {"vector": reference(models, fishers, [1, 3], 1e-6)["vector"], "scalar": models[1]["scalar"]}
    near(load_file(tmp_path / "out.safetensors"), expected)
    record = tmp_path / "out.soup.json"
    assert [one["path"] for one in json.loads(record.read_text())["fisher"]] == [
        str(path.with_suffix(".fisher.safetensors")) for path in paths
    ]
    assert soup("--recipe", record, "-o", tmp_path / "again.safetensors") == 0
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "out.safetensors").read_bytes()


def test_the_record_of_a_fisher_that_has_changed(family, tmp_path, capsys):
    paths, _, fishers = family(2)
    assert soup(*paths, "--method", "fisher", "-o", tmp_path / "out.safetensors") == 0
    save_file(
        {n: torch.from_numpy(np.asarray(t * 2)) for n, t in fishers[0].items()}, tmp_path / "m0.fisher.safetensors"
    )
    assert soup("--recipe", tmp_path / "out.soup.json", "-o", tmp_path / "again.safetensors") == 2
    assert "m0.fisher.safetensors has changed since" in capsys.readouterr().err
    assert not (tmp_path / "again.safetensors").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (None, ["no Fisher information of", "m1.safetensors", "fisher_information(model, batches, PATH)", "--fisher"]),
        (lambda f: {}, ["m1.fisher.safetensors holds no tensors"]),
        (lambda f: {n: t for n, t in f.items() if n != "vector"}, ["only one of", "'vector'"]),
        (lambda f: f | {"more": torch.ones(3)}, ["m1.safetensors does not hold 'more'", "another model's"]),
        (lambda f: f | {"vector": torch.ones(3)}, ["'vector' has shape [3]", "another model's"]),
        (lambda f: f | {"vector": -torch.ones(7)}, ["m1.fisher.safetensors", "'vector' must not be negative"]),
        (lambda f: f | {"vector": torch.full((7,), torch.nan)}, ["m1.fisher.safetensors", "'vector' must not be"]),
        (lambda f: f | {"vector": torch.full((7,), torch.inf)}, ["m1.fisher.safetensors", "'vector' must not be"]),
    ],
)
def test_fishers_that_do_not_fit(family, tmp_path, capsys, change, says):
    paths, _, _ = family(2)
    file = tmp_path / "m1.fisher.safetensors"
    fisher = load_file(file)
    file.unlink()
    if change is not None:
        save_file(change(fisher), file)
    assert soup(*paths, "--method", "fisher", "-o", tmp_path / "out.safetensors") == 2
    error = capsys.readouterr().err
    assert all(words in error for words in says), error
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--floor", "-1"], "floor=-1.0"),
        (["--floor", "nan"], "floor=nan"),
        (["--weights", "1"], "1 weights for 2"),
        (["--weights=-1,2"], "must not be negative"),
        (["--weights", "0,0"], "not all zero"),
        (["--last", "1"], "at least two"),
        (["--fisher", "m0.safetensors"], "1 Fisher files for 2 checkpoints"),
        (["--init", "m0.safetensors"], "--init has no meaning for --method fisher"),
    ],
)
def test_arguments_that_make_no_sense(family, tmp_path, capsys, arguments, says):
    paths, _, _ = family(2)
    assert soup(*paths, "--method", "fisher", *arguments, "-o", tmp_path / "o.safetensors") == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_in_a_model(family, tmp_path, capsys, bad):
    paths, _, _ = family(2)
    model = load_file(paths[1])
    model["matrix"].view(-1)[2000] = bad
    save_file(model, paths[1])
    assert soup(*paths, "--method", "fisher", "-o", tmp_path / "o.safetensors") == 2
    error = capsys.readouterr().err
    assert all(words in error for words in (str(paths[1]), "'matrix'", str(bad), "element 2000"))
