"""Built-in evaluations of Hugging Face models: perplexity and accuracy against plain loops in float64."""

import csv
import json
import math
import sys

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from averaging import cli, soups
from averaging.checkpoints import Checkpoint

WORDS = ["<pad>", "<unk>", "the", "soup", "is", "hot", "cold", "good", "and", "we", "eat"]
TEXT = "the soup is hot and we eat the cold soup and the soup is good " * 6
LABELS = {"bad": 0, "fair": 1, "good": 2}


def tokenizer(**options):
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", **{"pad_token": "<pad>", **options})


def config(**options):
    return LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=24, label2id=LABELS, id2label={i: n for n, i in LABELS.items()},
        **{"pad_token_id": 0, **options},
    )  # fmt: skip


def save(path, seed=0, kind=LlamaForCausalLM, **options):
    torch.manual_seed(seed)
    model = kind(config(**options))
    for parameter in model.parameters():
        parameter.data.mul_(8)  # so that predictions are far from uniform
    model.save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


def plain_loss(path, window, stride):
    """Each token from the tokens before it in the first window that has it and a token before."""
    model = AutoModelForCausalLM.from_pretrained(path).double().eval()
    ids = [WORDS.index(word) for word in TEXT.split()]
    losses = []
    for i in range(1, len(ids)):
        begin = next(b for b in range(0, len(ids), stride) if b < i < b + window)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids[begin:i]])).logits[0, -1]
        losses.append(-torch.log_softmax(logits, -1)[ids[i]].item())
    return sum(losses) / len(losses)


@pytest.mark.parametrize(("window", "stride"), [(None, None), (24, 12), (10, 3), (7, 6), (2, 1), (24, 23)])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_perplexity(tmp_path, text, window, stride, batch_size):
    path = save(tmp_path / "lm")
    seen = []
    measure = soups.Perplexity(
        text, window=window, stride=stride, batch_size=batch_size, progress=lambda *batch: seen.append(batch)
    )
    found = measure(Checkpoint(path))
    expected = plain_loss(path, window or 24, stride or 12)
    assert found["loss"] == pytest.approx(expected, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)
    assert seen == [(i, len(seen)) for i in range(len(seen))]


def test_a_text_that_fits_one_window(tmp_path):
    path = save(tmp_path / "lm")
    (tmp_path / "short.txt").write_text("the soup is hot")
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    ids = torch.tensor([[2, 3, 4, 5]])
    with torch.no_grad():
        expected = model(input_ids=ids, labels=ids).loss.item()
    assert soups.Perplexity(tmp_path / "short.txt")(Checkpoint(path))["loss"] == pytest.approx(expected, rel=1e-5)


ROWS = [("the soup is good", "good"), ("cold soup", 0), ("we eat and we eat the hot soup", "1"), ("good", "good"),
        ("the cold and the hot", "bad"), ("is", 2), ('a "quoted", text', "fair")]  # fmt: skip


def labelled(path):
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerows([("id", "text", "label"), *((i, *row) for i, row in enumerate(ROWS))])
    else:
        path.write_text("\n\n".join(json.dumps({"text": text, "label": label}) for text, label in ROWS))
    return path


@pytest.mark.parametrize("name", ["data.jsonl", "data.csv"])
@pytest.mark.parametrize("pads", [True, False])
def test_accuracy(tmp_path, name, pads):
    path = save(tmp_path / "cls", kind=LlamaForSequenceClassification, pad_token_id=0 if pads else None)
    found = soups.Accuracy(labelled(tmp_path / name), batch_size=3)(Checkpoint(path))
    model = AutoModelForSequenceClassification.from_pretrained(path).double().eval()
    right, losses = 0, []
    for text, label in ROWS:
        wanted = LABELS[label] if label in LABELS else int(label)
        with torch.no_grad():
            logits = model(**tokenizer()(text, return_tensors="pt")).logits[0]
        right += int(logits.argmax()) == wanted
        losses.append(-torch.log_softmax(logits, -1)[wanted].item())
    assert found["accuracy"] == right / len(ROWS)
    assert found["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


# ---------------------------------------------------------------------- the command


def soup(*arguments):
    return cli.main([str(argument) for argument in arguments])


def test_greedy_by_perplexity_and_accuracy(tmp_path, text, capsys, monkeypatch):
    paths = [save(tmp_path / f"lm-{i}", seed=i) for i in range(2)]
    alone = [soups.Perplexity(text)(Checkpoint(path))["perplexity"] for path in paths]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    search = [*paths, "--method", "greedy", "--evaluate", f"perplexity:{text}", "-o", tmp_path / "out"]
    assert soup(*search) == 0
    printed = capsys.readouterr()
    assert "perplexity: 0 of" in printed.err
    assert "Loading weights" not in printed.err
    record = json.loads((tmp_path / "out/soup.json").read_text())
    assert record["best"] == "min"
    assert [one["metric"] for one in record["tried"]] == pytest.approx(sorted(alone))
    # Results are known by the content of the text, too.
    known = json.loads((tmp_path / "out.evaluations.json").read_text())
    assert soup(*search, "--force", "-q", "--metric", "loss") == 0
    assert json.loads((tmp_path / "out.evaluations.json").read_text()) == known
    text.write_text(TEXT + "we eat")
    assert soup(*search, "--force", "-q") == 0
    assert len(json.loads((tmp_path / "out.evaluations.json").read_text())) == 2 * len(known)

    paths = [save(tmp_path / f"cls-{i}", seed=i, kind=LlamaForSequenceClassification) for i in range(3)]
    data = labelled(tmp_path / "data.csv")
    alone = [soups.Accuracy(data)(Checkpoint(path))["accuracy"] for path in paths]
    (tmp_path / "soup.yaml").write_text(
        "{method: greedy, ingredients: [cls-0, cls-1, cls-2], evaluate: 'accuracy:data.csv', output: best}"
    )
    assert soup("--recipe", tmp_path / "soup.yaml") == 0
    record = json.loads((tmp_path / "best/soup.json").read_text())
    assert (record["best"], record["tried"][0]["metric"]) == ("max", max(alone))


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("perplexity:missing.txt", None, "no such file or directory: missing.txt"),
        ("perplexity:", None, "--evaluate perplexity: needs a file: perplexity:FILE"),
        ("perplexity:a.txt", b" \n", "a.txt is empty"),
        ("perplexity:a.txt", b"\xff\xfe\x00", "a.txt is not a text in UTF-8"),
        ("perplexity:a.txt", b"soup", "a.txt has 1 tokens, and at least two are needed"),
        ("accuracy:a.txt", b"soup", "labelled texts are in a .jsonl or .csv file"),
        ("accuracy:a.csv", b"text,label\n", "a.csv holds no examples"),
        ("accuracy:a.csv", b"text,class\na,b\n", "a.csv, line 2: needs a 'text' and a 'label'"),
        ("accuracy:a.csv", b"text,label\nsoup\n", "a.csv, line 2: needs a 'text' and a 'label'"),
        ("accuracy:a.csv", b'text,label\n"soup,1\n', "a.csv, after line 1: unexpected end of data"),
        ("accuracy:a.jsonl", b'{"text": "soup", "label": 1}\n[', "a.jsonl, line 2: this is no JSON"),
        ("accuracy:a.jsonl", b"[" * 100_000, "a.jsonl, line 1: this is no JSON"),
        ("accuracy:a.jsonl", b"3", "a.jsonl, line 1: needs a 'text' and a 'label'"),
        ("accuracy:a.jsonl", b'{"text": "soup", "label": true}', "line 1: needs a 'text' and a 'label'"),
        ("accuracy:a.jsonl", b'{"text": "soup", "label": "hot"}', "line 1: the model knows no label 'hot'"),
        ("accuracy:a.jsonl", b'{"text": "soup", "label": 3}', "line 1: the model knows no label '3'"),
        ("accuracy:a.jsonl", json.dumps({"text": "soup " * 25, "label": 1}).encode(), "line 1 has 25 tokens, and the"),
        ("accuracy:a.jsonl", b'{"text": "", "label": 1}', "line 1 has 0 tokens"),
    ],
)
def test_files_that_do_not_fit(tmp_path, monkeypatch, capsys, file, content, says):
    monkeypatch.chdir(tmp_path)
    kind = LlamaForCausalLM if file.startswith("perplexity") else LlamaForSequenceClassification
    paths = [save(tmp_path / name, kind=kind) for name in "ab"]
    if content is not None:
        (tmp_path / file.partition(":")[2]).write_bytes(content)
    capsys.readouterr()
    assert soup(*paths, "--method", "greedy", "--evaluate", file, "-o", "out") == 2
    error = capsys.readouterr().err
    assert says in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_models_that_do_not_fit(tmp_path, text, capsys):
    data = labelled(tmp_path / "data.csv")
    lm, cls = save(tmp_path / "lm"), save(tmp_path / "cls", kind=LlamaForSequenceClassification)
    tied = save(tmp_path / "tied", kind=LlamaForSequenceClassification, tie_word_embeddings=True)
    bare = save(tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).unlink()
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    for measure, path, says in (
        (soups.Accuracy(data), lm, "saved as LlamaForCausalLM is no model for SequenceClassification: it lacks score"),
        (
            soups.Perplexity(text),
            cls,
            "saved as LlamaForSequenceClassification is no model for CausalLM: it lacks l",
        ),
        (soups.Perplexity(text), tied, "is no model for CausalLM: it holds in addition score.weight"),
        (soups.Perplexity(text), bare, "there is no tokenizer beside"),
        (soups.Perplexity(text), tmp_path / "a.safetensors", "opens Hugging Face model folders"),
        (soups.Perplexity(text, window=25), lm, "window=25: the model takes 24 tokens"),
    ):
        with pytest.raises(ValueError, match=says):
            measure(Checkpoint(path))
    for options in ({"batch_size": 0}, {"window": 1}, {"stride": 0}, {"window": 8, "stride": 8}):
        with pytest.raises(ValueError, match=f"{list(options)[-1]}={list(options.values())[-1]}: must be at least"):
            soups.Perplexity(text, **options)


def test_without_transformers(text, monkeypatch):
    from averaging.soups import measures

    monkeypatch.setattr(measures, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"perplexity needs transformers: pip install 'averaging\[transformers\]'"):
        soups.Perplexity(text)
