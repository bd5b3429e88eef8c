"""Evaluations of Hugging Face models that come with the library: perplexity of a text, accuracy on labelled texts.

They open the model's folder alone, its tokenizer included, and nothing from the network. transformers is imported when
something is evaluated.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from averaging.checkpoints import Checkpoint
from averaging.checkpoints.files import open_regular

if TYPE_CHECKING:
    import torch

Batches = Callable[[int, int], None]
"""Takes the batches done so far, and how many there are in all."""


class Measure:
    """What the evaluations share.

    Attributes:
        metric: which of the numbers decides, unless another one is chosen, and ``best``, whether low or high is best;
            they all come with a ``loss``.
        key: what tells this evaluation's results from others' in a cache: its name, settings and data.
    """

    metric: str
    best: Literal["min", "max"]
    auto: str
    """The class of transformers that opens the models."""

    def __init__(
        self, file: str | os.PathLike[str], batch_size: int, device: str | None, progress: Batches | None
    ) -> None:
        self.file, self.batch_size, self.device, self.progress = Path(file), batch_size, device, progress
        self.__name__ = type(self).__name__.lower()
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: must be at least 1")
        if find_spec("transformers") is None:
            raise ValueError(f"{self.__name__} needs transformers: pip install 'averaging[transformers]'")
        with open(open_regular(self.file), "rb") as opened:
            data = opened.read()
        try:
            self.text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not a text in UTF-8: {error}") from error
        if not self.text.strip():
            raise ValueError(f"{file} is empty")
        self.key = f"{self.__name__} sha256:{hashlib.sha256(data).hexdigest()}"

    @contextmanager
    def _opened(self, checkpoint: Checkpoint) -> Iterator[tuple[Any, Any, torch.device]]:
        """The model, its tokenizer and the device it is on; transformers says nothing meanwhile."""
        import torch
        import transformers

        logging: Any = transformers.utils.logging
        path = checkpoint.path
        if checkpoint.kind != "huggingface" or checkpoint.config is None:
            raise ValueError(f"{self.__name__} opens Hugging Face model folders with a config.json, and this is none")
        bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
        logging.disable_progress_bar()
        logging.set_verbosity_error()
        try:
            try:
                tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
            except Exception as error:
                raise ValueError("there is no tokenizer beside the weights; copy it there from the model's") from error
            model, found = getattr(transformers, self.auto).from_pretrained(
                path, local_files_only=True, output_loading_info=True
            )
            for keys, what in ((found["missing_keys"], "lacks"), (found["unexpected_keys"], "holds in addition")):
                if keys:
                    kinds = ", ".join(checkpoint.config.get("architectures") or ["unknown"])
                    kind = self.auto.removeprefix("AutoModelFor")
                    raise ValueError(f"what was saved as {kinds} is no model for {kind}: it {what} {min(keys)}")
            device = torch.device(self.device or (torch.accelerator.current_accelerator() or "cpu"))
            with torch.inference_mode():
                yield model.to(device).eval(), tokenizer, device
        finally:
            logging.set_verbosity(verbosity)
            if bars:
                logging.enable_progress_bar()

    def _told(self, batches: Sequence[Any]) -> Iterator[Any]:
        """The batches, whose progress is shown."""
        for number, batch in enumerate(batches):
            if self.progress is not None:
                self.progress(number, len(batches))
            yield batch


class Perplexity(Measure):
    """The perplexity of a text under a causal language model, exp of the mean loss of its tokens but the first.

    The text is read in windows that overlap, so that each token is predicted from ``window − stride`` tokens before it
    or more, as far as there are any; each token counts once.

    Args:
        file: the text, in UTF-8.
        window: tokens that the model sees at a time; at most what it can take. ``None``: 1024.
        stride: tokens by which the windows move; half the window if ``None``.
        batch_size: windows at a time.
        device: where the model runs; an accelerator if there is one, by default.
        progress: called before each batch.

    Raises:
        ValueError: the file is empty or no text, or transformers is not installed.
        OSError: the file cannot be read.
    """

    metric, best, auto = "perplexity", "min", "AutoModelForCausalLM"

    def __init__(
        self,
        file: str | os.PathLike[str],
        *,
        window: int | None = None,
        stride: int | None = None,
        batch_size: int = 8,
        device: str | None = None,
        progress: Batches | None = None,
    ) -> None:
        super().__init__(file, batch_size, device, progress)
        if window is not None and window < 2:
            raise ValueError(f"window={window}: must be at least 2 tokens")
        if stride is not None and not 1 <= stride < (window or 1024):
            raise ValueError(f"stride={stride}: must be at least 1 and less than the window")
        self.window, self.stride = window, stride
        self.key += f" window {window} stride {stride}"

    def __call__(self, checkpoint: Checkpoint) -> dict[str, float]:
        """``{"perplexity": …, "loss": …}``, the loss in nats per token.

        Raises:
            ValueError: no tokenizer, another head, fewer than two tokens.
        """
        import torch

        with self._opened(checkpoint) as (model, tokenizer, device):
            ids = torch.tensor(tokenizer(self.text, verbose=False)["input_ids"])
            if len(ids) < 2:
                raise ValueError(f"{self.file} has {len(ids)} tokens, and at least two are needed")
            longest = getattr(model.config, "max_position_embeddings", None)
            if longest is not None and self.window is not None and self.window > longest:
                raise ValueError(f"window={self.window}: the model takes {longest} tokens")
            window = self.window or min(1024, longest or 1024)
            stride = min(self.stride or max(window // 2, 1), window - 1)
            # Of each window: where it begins and ends, and its last tokens, which no window before has predicted.
            windows, predicted = [], 1
            for begin in range(0, len(ids), stride):
                end = min(begin + window, len(ids))
                windows.append((begin, end, end - predicted))
                predicted = end
                if end == len(ids):
                    break
            full = [one for one in windows if one[1] - one[0] == windows[0][1] - windows[0][0]]
            batches = [full[i : i + self.batch_size] for i in range(0, len(full), self.batch_size)]
            batches += [[one] for one in windows[len(full) :]]
            total = 0.0
            for batch in self._told(batches):
                rows = torch.stack([ids[begin:end] for begin, end, _ in batch]).to(device)
                logits = model(input_ids=rows).logits[:, :-1]
                for row, one, (_, _, count) in zip(rows, logits, batch, strict=True):
                    losses = torch.nn.functional.cross_entropy(one[-count:].float(), row[1:][-count:], reduction="none")
                    total += losses.double().sum().item()
            loss = total / (len(ids) - 1)
        return {"perplexity": math.exp(loss) if loss < 700 else math.inf, "loss": loss}


class Accuracy(Measure):
    """The accuracy of a sequence classifier on labelled texts.

    Args:
        file: ``.jsonl``, an object in each line, or ``.csv`` with a header: each with a ``text`` and a ``label``,
            a number or one of the names in the model's configuration.
        batch_size: texts at a time.
        device: where the model runs; an accelerator if there is one, by default.
        progress: called before each batch.

    Raises:
        ValueError: the file is empty, or a line holds something else; transformers is not installed.
        OSError: the file cannot be read.
    """

    metric, best, auto = "accuracy", "max", "AutoModelForSequenceClassification"

    def __init__(
        self,
        file: str | os.PathLike[str],
        *,
        batch_size: int = 32,
        device: str | None = None,
        progress: Batches | None = None,
    ) -> None:
        super().__init__(file, batch_size, device, progress)
        self.examples = list(self._read())
        if not self.examples:
            raise ValueError(f"{file} holds no examples")

    def _read(self) -> Iterator[tuple[int, str, str]]:
        """Line, text and label of each example."""
        if self.file.suffix == ".csv":
            reader = csv.DictReader(io.StringIO(self.text, newline=""), strict=True)
            try:
                rows: list[tuple[int, Any]] = [(reader.line_num, row) for row in reader]
            except csv.Error as error:
                raise ValueError(f"{self.file}, after line {reader.line_num}: {error}") from error
        elif self.file.suffix == ".jsonl":
            rows = []
            for number, line in enumerate(self.text.split("\n"), start=1):
                try:
                    rows += [(number, json.loads(line))] if line.strip() else []
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{self.file}, line {number}: this is no JSON: {error}") from error
        else:
            raise ValueError(f"{self.file}: labelled texts are in a .jsonl or .csv file")
        for number, row in rows:
            text, label = (row.get("text"), row.get("label")) if isinstance(row, dict) else (None, None)
            if not isinstance(text, str) or isinstance(label, bool) or not isinstance(label, str | int):
                raise ValueError(f"{self.file}, line {number}: needs a 'text' and a 'label', a number or a name")
            yield number, text, str(label)

    def __call__(self, checkpoint: Checkpoint) -> dict[str, float]:
        """``{"accuracy": …, "loss": …}``, the loss in nats per text.

        Raises:
            ValueError: no tokenizer, another head, an unknown label, a text longer than the model can take.
        """
        import torch

        with self._opened(checkpoint) as (model, tokenizer, device):
            labels = {str(number): number for number in range(model.config.num_labels)}
            labels |= {str(name): int(number) for name, number in model.config.label2id.items()}
            size = self.batch_size if tokenizer.pad_token is not None and model.config.pad_token_id is not None else 1
            longest = getattr(model.config, "max_position_embeddings", None) or math.inf
            longest = min(longest, tokenizer.model_max_length)
            right, total = 0, 0.0
            for batch in self._told([self.examples[i : i + size] for i in range(0, len(self.examples), size)]):
                for number, _, label in batch:
                    if label not in labels:
                        raise ValueError(f"{self.file}, line {number}: the model knows no label {label!r}")
                texts = [text for _, text, _ in batch]
                encoded = tokenizer(texts, padding=size > 1, return_tensors="pt", verbose=False).to(device)
                for (number, _, _), mask in zip(batch, encoded["attention_mask"], strict=True):
                    if (length := int(mask.sum())) > longest or not length:
                        raise ValueError(
                            f"{self.file}, line {number} has {length} tokens, and the model takes 1 to {longest}"
                        )
                logits = model(**encoded).logits.float()
                wanted = torch.tensor([labels[label] for _, _, label in batch], device=device)
                right += int((logits.argmax(-1) == wanted).sum())
                total += torch.nn.functional.cross_entropy(logits, wanted, reduction="sum").item()
        return {"accuracy": right / len(self.examples), "loss": total / len(self.examples)}


MEASURES: dict[str, type[Perplexity] | type[Accuracy]] = {"perplexity": Perplexity, "accuracy": Accuracy}
