"""The ``soup`` command: average saved checkpoints into one model."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import itertools
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO, cast, get_args

from averaging import __version__
from averaging.decay import Decay
from averaging.text import size

if TYPE_CHECKING:
    from averaging.checkpoints import Checkpoint
    from averaging.recipe import Layer
    from averaging.soups.engine import Progress
    from averaging.soups.soup import Soup
    from averaging.soups.team import Team

DESCRIPTION = """\
Average the weights of saved checkpoints.

  soup checkpoints/                      all checkpoints in a folder, written to checkpoints/soup/
  soup checkpoints/ --last 5 -o out/     the five newest
  soup a.ckpt b.ckpt -o out.safetensors  just these
  soup ft/ --method wise-ft --init base/ --alpha 0.5 -o out/
                                         between a model and what it was fine-tuned to
  soup a/ b/ --method slerp --init base/ -o out/
                                         task vectors, merged on the sphere
  soup a/ b/ --method warp --init sft/ --eta 0:1:0.1 -o out/
                                         the same, and back towards sft/: out/eta-0, out/eta-0.1, ...
  soup a/ b/ c/ --method greedy --evaluate my_module:validation_loss -o out/
                                         those that do not make it worse
  soup a/ b/ c/ --method learned --loss my_module:held_out -o out/
                                         coefficients learned on held-out data
  soup inspect a/ b/ --init base/        norms, cosines between task vectors, distances to the mean; and barriers
                                         between them, with --evaluate
  soup runs/ --sweep window=1,2,5,10 --evaluate my_module:validation_loss
                                         the best of many averages
  soup --recipe soup.yaml                what a file says; --recipe out/soup.json -o again/: the same soup again
"""
EPILOG = """\
A checkpoint is a Hugging Face model folder, a PEFT adapter folder, a torch distributed checkpoint (a folder with
.metadata), a .safetensors file, a Lightning .ckpt, or a torch .pt, .pth or .bin file of named tensors. Any other folder
stands for the checkpoints in it, in the order of their steps.
The result is the same kind of thing as its ingredients, or safetensors; soup.json in it (or NAME.soup.json beside it)
records what it was made from. Exit status: 0 done, 2 error (nothing was written), 130 interrupted.
"""


# Each method's own options.
METHODS: dict[str, tuple[str, ...]] = {
    "uniform": ("weights",),
    "wise-ft": ("init", "alpha"),
    "task": ("init", "weights", "scale"),
    "slerp": ("init", "weights", "eta"),
    "warp": ("init", "slerp_weights", "eta"),
    "rewarded": ("lambda",),
    "model-stock": ("init",),
    "ema": ("decay",),
    "fisher": ("fisher", "weights", "floor"),
    "greedy": (),
    "ranked": ("top",),
    "learned": ("loss", "per", "normalize", "lr", "epochs", "seed"),
    "search": ("per", "evaluations", "seed"),
    "lm-cocktail": ("target", "alpha", "temperature"),
}
COEFFICIENTS = ("alpha", "scale", "eta", "lambda")
MOST = 1000  # values in a range
LONGEST = 2000  # letters of a message
ARGUMENTS = {"lambda": "share", "slerp_weights": "weights"}  # what some options are called in Python
SEARCHES = ("greedy", "ranked", "learned", "search", "lm-cocktail")
EVALUATING = ("evaluate", "evaluate_command", "metric", "best", "plot")
OWN = sorted({name for names in METHODS.values() for name in names})
CHOICES = ("like", "dtype", "allow_nonfinite", "only", "skip", "lora", "lora_rank", "force")


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are a single line, as all others of the command."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {_shown(message)}\n")


def parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    p = _Parser(
        prog="soup", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("paths", nargs="*", metavar="PATH", help="checkpoints, or a folder of checkpoints")
    p.add_argument(
        "--recipe",
        metavar="FILE",
        help="take these options from a YAML file, except those given here; or cook the soup of a record, soup.json, "
        "again",
    )
    p.set_defaults(layers=[])  # a recipe's
    p.add_argument("-o", "--output", metavar="OUT", help="where to write (default for one folder: FOLDER/soup)")
    choice = p.add_argument_group("which checkpoints")
    choice.add_argument("--last", type=int, metavar="K", help="only the K newest")
    choice.add_argument("--every", type=int, metavar="N", help="only every N-th, counted back from the newest")
    choice.add_argument("--at", type=_steps, metavar="STEP,...", help="ending at these steps (--sweep, --post-hoc)")
    choice.add_argument("--only", metavar="REGEX", help="average only tensors in whose names this is found")
    choice.add_argument(
        "--skip", metavar="REGEX", help="do not average these; they are the last checkpoint's, or --like's"
    )
    result = p.add_argument_group("how they are averaged")
    result.add_argument("--method", choices=METHODS, help="uniform (default), or what the next options describe")
    result.add_argument("--init", metavar="BASE", help="the model that the others were fine-tuned from")
    result.add_argument(
        "--alpha",
        type=_values,
        metavar="X",
        help="wise-ft: (1 - alpha) BASE + alpha PATH, between 0 and 1 (default 0.5). Of this and the next three, "
        "0:1:0.1 or 0,0.3,1 writes a model for each value into OUT or, with --evaluate, the best",
    )
    result.add_argument(
        "--scale",
        type=_values,
        metavar="X",
        help="task: BASE + scale times the sum of the task vectors PATH - BASE (default 1)",
    )
    result.add_argument(
        "--eta",
        type=_values,
        metavar="X",
        help="slerp, warp: how far from BASE to the merged model to go, between 0 and 1 (default 1, warp 0.3)",
    )
    result.add_argument(
        "--lambda",
        type=_values,
        metavar="X",
        help="rewarded: (1 - lambda) PATH1 + lambda PATH2, between 0 and 1 (default 0.5)",
    )
    result.add_argument(
        "--slerp-weights",
        nargs="+",
        type=_numbers,
        metavar="W",
        help="warp: the share of each in the merged model, after the paths or as W,W,... (default: all alike)",
    )
    result.add_argument(
        "--fisher",
        nargs="+",
        metavar="FILE",
        help="fisher: what averaging.soups.fisher_information wrote for each PATH (default: PATH/fisher.safetensors)",
    )
    result.add_argument(
        "--floor", type=float, help="fisher: the least Fisher of the first, in root mean squares of it (default 1e-6)"
    )
    result.add_argument("--target", metavar="MODEL", help="lm-cocktail: a model whose share is alpha (default 0.5)")
    result.add_argument(
        "--temperature", type=float, help="lm-cocktail: the others' shares are softmax(-loss / temperature) (default 5)"
    )
    result.add_argument("--top", type=int, metavar="N", help="ranked: how many of the best (greedy: all that help)")
    result.add_argument("--decay", type=float, help="ema: the decay per optimizer step")
    result.add_argument(
        "--weights",
        type=_weights,
        metavar="W,W,...",
        help="a weight for each, in the order listed by --dry-run; or a decay of the learning rate that they stand in "
        "for: linear, cosine or inverse_sqrt. With --method task of any sign: --weights=-1",
    )
    result.add_argument(
        "--post-hoc", type=float, metavar="WIDTH", help="the EMA of this relative width, from snapshots of PostHocEMA"
    )
    result.add_argument(
        "--like", metavar="MODEL", help="a checkpoint that the result shall be like, with what the others do not hold"
    )
    result.add_argument(
        "--lora",
        choices=("factors", "product"),
        help="of LoRA adapters combine the factors A and B (default), or their products, which an adapter of "
        "--lora-rank then stands for: exactly, if that is the sum of the ranks",
    )
    result.add_argument("--lora-rank", type=int, metavar="R", help="(default: each module's own)")
    result.add_argument("--dtype", metavar="DTYPE", help="bfloat16, float16, float32 or float64 (default: unchanged)")
    result.add_argument("--allow-nonfinite", action="store_true", help="go on when a checkpoint holds NaN or infinity")
    search = p.add_argument_group(
        "finding the best average, by --sweep of one run's checkpoints, --method greedy, ranked, learned, search or "
        "lm-cocktail"
    )
    search.add_argument(
        "--sweep",
        type=_axis,
        action="append",
        metavar="AXIS=V,V,...",
        help="evaluate averages with each of these values, ending at each checkpoint, and write the best; AXIS is "
        "window (checkpoints), spacing (every so many-th), decay (of an EMA, per optimizer step), weights (linear, "
        "cosine, inverse_sqrt) or post-hoc (widths); more than one --sweep: every combination",
    )
    search.add_argument(
        "--evaluate",
        metavar="MODULE:FUNCTION",
        help="the function that returns the metric of an average; it takes a mapping from names to tensors whose .path "
        "opens with from_pretrained where the checkpoints do. Or, of Hugging Face models: perplexity:TEXT, or "
        "accuracy:FILE of labelled texts, .jsonl or .csv with 'text' and 'label'",
    )
    search.add_argument(
        "--evaluate-command",
        metavar="COMMAND",
        help="a command that prints the metric, or a JSON object of several; {checkpoint} in it is the average's path",
    )
    search.add_argument(
        "--loss",
        metavar="MODULE:FUNCTION",
        help="learned: the function that returns a model, its loss and held-out batches, (model, loss, batches), where "
        "loss(model, batch) is a tensor with a gradient",
    )
    search.add_argument("--per", choices=("model", "layer"), help="learned, search: what has its own coefficients")
    search.add_argument(
        "--normalize", choices=("softmax", "none"), help="learned: positive coefficients of sum one (default), or any"
    )
    search.add_argument("--lr", type=float, help="learned: AdamW's learning rate (default 0.05)")
    search.add_argument("--epochs", type=int, help="learned: how often all batches are gone through (default 5)")
    search.add_argument("--evaluations", type=int, help="search: how many soups are evaluated (default 100)")
    search.add_argument("--seed", type=int, help="learned, search: of the random numbers (default 0)")
    search.add_argument("--metric", metavar="NAME", help="which one, where the evaluation gives several")
    search.add_argument(
        "--minimize", dest="best", action="store_const", const="min", help="the lowest metric is best (default)"
    )
    search.add_argument("--maximize", dest="best", action="store_const", const="max", help="the highest is")
    search.add_argument(
        "--plot",
        nargs="?",
        const="",
        metavar="FILE.png",
        help="draw what was explored; last of all or with FILE, .png, .pdf or .svg (default: such as OUT.sweep.png)",
    )
    run = p.add_argument_group("the run")
    run.add_argument("--dry-run", action="store_true", help="print what would be read and written, and stop")
    run.add_argument("--force", action="store_true", help="replace an existing output")
    run.add_argument("-q", "--quiet", action="store_true", help="print errors only")
    run.add_argument("--debug", action="store_true", help="print the traceback of an error")
    run.add_argument("--version", action="version", version=f"soup {__version__}")
    return p


def inspect_parser() -> argparse.ArgumentParser:
    """The grammar of ``soup inspect``."""
    p = _Parser(
        prog="soup inspect",
        description="Print norms, cosines between task vectors and distances to the mean, for all and by layer.",
    )
    p.add_argument("paths", nargs="+", metavar="PATH", help="checkpoints, or a folder of checkpoints")
    p.add_argument("--init", metavar="BASE", help="the model that they were fine-tuned from")
    p.add_argument("--only", metavar="REGEX", help="only tensors in whose names this is found")
    p.add_argument("--skip", metavar="REGEX", help="not these")
    lines = p.add_argument_group("how a metric behaves along the straight lines between them: are they mode-connected?")
    lines.add_argument("--evaluate", metavar="MODULE:FUNCTION", help="as in soup --help")
    lines.add_argument("--evaluate-command", metavar="COMMAND", help="as in soup --help")
    lines.add_argument("--metric", metavar="NAME", help="which one, where the evaluation gives several")
    lines.add_argument(
        "--minimize", dest="best", action="store_const", const="min", help="the lowest is best (default)"
    )
    lines.add_argument("--maximize", dest="best", action="store_const", const="max", help="the highest is")
    lines.add_argument("--points", type=int, help="models on each line, both ends included (default 11)")
    lines.add_argument("--cache", metavar="FILE", help="keep the results here: nothing is evaluated twice")
    lines.add_argument("--plot", nargs="?", const="inspect.png", metavar="FILE.png", help="draw them (inspect.png)")
    p.add_argument("--force", action="store_true", help="replace an existing picture")
    p.add_argument("-q", "--quiet", action="store_true", help="no progress")
    p.add_argument("--debug", action="store_true", help="print the traceback of an error")
    return p


def main(arguments: Sequence[str] | None = None, *, distributed: bool = False) -> int:
    """Run the command; returns the exit status.

    Args:
        arguments: those of the command line by default.
        distributed: share the work with the other processes that ``torchrun`` started, if it did.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    inspecting = words[:1] == ["inspect"]
    grammar = inspect_parser() if inspecting else parser()
    options = grammar.parse_args(words[inspecting:])
    if not options.paths and options.recipe is None:
        grammar.error("name checkpoints, or a folder of checkpoints, or a --recipe")
    from averaging.soups.team import Team, torchrun

    team = Team()
    try:
        with _warnings_as_lines(), torchrun() if distributed else contextlib.nullcontext(team) as team:
            if team.rank:
                warnings.simplefilter("ignore")  # the first process says it
            if inspecting:
                _alone(team, "soup inspect")
                _inspect(options)
            else:
                _run(options, team)
    except KeyboardInterrupt:
        _say("interrupted; nothing was written")
        return 130
    except (ValueError, OSError, MemoryError) as error:
        if options.debug:
            raise
        if team.rank == 0:  # which is told what went wrong in any other
            told = _explain(error)
            named = None if inspecting or isinstance(error, MemoryError) else options.recipe
            _say(f"error: {told if named is None or named in told else f'{named}: {told}'}")
        return 2
    return 0


def _alone(team: Team, what: str) -> None:
    if team.size > 1:
        raise ValueError(f"torchrun shares out the tensors of a soup; {what} runs in one process")


def _inspect(options: argparse.Namespace) -> None:
    from averaging.soups.connectivity import connectivity
    from averaging.soups.inspection import inspect
    from averaging.soups.plots import check_plot

    which = {"only": options.only, "skip": options.skip}
    evaluating = options.evaluate or options.evaluate_command
    if evaluating:
        settings = _evaluating(options, "soup inspect", None)
        check_plot(options.plot, None, options.force)
    else:
        _refuse(options, "soup inspect without --evaluate", "metric", "best", "points", "cache", "plot")
    with _bar(hidden=options.quiet) as progress:
        found = str(inspect(options.paths, options.init, **which, progress=progress))
    if evaluating:
        settings |= {"cache": options.cache, "plot": options.plot, "force": options.force}
        if options.points is not None:
            settings["points"] = options.points
        with _counter(hidden=options.quiet) as progress:
            found += f"\n\n{connectivity(options.paths, **settings, **which, progress=progress)}"
    _print(found)


def _run(options: argparse.Namespace, team: Team) -> None:
    from averaging.soups.soup import cook_all

    began = time.monotonic()
    again = options.recipe is not None and _is_record(options.recipe)
    varied: list[str] = []
    if not again:
        if options.recipe is not None:
            _take_recipe(options)
        varied = [name for name in COEFFICIENTS if isinstance(getattr(options, name), list)]
        if options.sweep:
            _alone(team, "--sweep")
            _sweep(options)
            return
        if options.method in SEARCHES:
            _alone(team, f"--method {options.method}")
            _search(options)
            return
        if varied and (options.evaluate or options.evaluate_command):
            _alone(team, "an evaluation")
            _curve(options, varied[0])
            return
        what = f"--{varied[0]} without --evaluate or --evaluate-command" if varied else "a soup without a search"
        _refuse(options, what, *EVALUATING)
    soups: list[Soup] = []

    def make() -> None:
        soups.extend([_again(options)] if again else _series(options, varied[0]) if varied else [_soup(options)])

    team.gather(make)
    if options.dry_run:
        if team.rank == 0:
            _print("\n".join(map(_describe, soups)))
        return
    with _bar(hidden=options.quiet or team.rank > 0) as progress:
        cook_all(soups, progress, team)
    if not options.quiet and team.rank == 0:
        seconds = time.monotonic() - began
        for soup in soups:
            assert soup.output is not None
            what = "average" if soup.method == "uniform" else soup.method
            count = len(soup.ingredients) - (soup.init is not None)
            lost = "" if soup.adapters is None else f", relative error {soup.facts['error']:.2g}"
            _print(f"{soup.output.path}: {what} of {count}{lost}, {size(soup.output.nbytes)}, {seconds:.1f} s")


def _sweep(options: argparse.Namespace) -> None:
    from averaging.soups.sweep import label, plan, sweep

    began = time.monotonic()
    _refuse(options, "--sweep", "post_hoc", "method", *OWN)
    output = _output(options)
    evaluating = _evaluating(options, "--sweep", output)
    axes = dict(options.sweep)
    if len(axes) < len(options.sweep):
        raise ValueError("--sweep names one axis twice; give all its values at once: --sweep window=1,2,5")
    paths = options.paths
    if "post_hoc" not in axes:
        paths = _ingredients(options)
    else:
        _refuse(options, "--sweep post-hoc", "last", "every")
    if options.dry_run:
        plans = plan(paths, axes, options.at, **_choices(options))
        _print("\n".join(f"{label(each.setting)} at step {each.step}" for each in plans))
        _print(f"{len(plans)} averages to evaluate; the best to {output}")
        return
    with _counter(hidden=options.quiet) as progress:
        result = sweep(
            paths,
            output=output,
            **evaluating,
            **axes,
            at=options.at,
            plot=_plot(options, output, "sweep"),
            progress=progress,
            **_choices(options),
        )
    if not options.quiet:
        _print(result.table())
        best, seconds = result.best, time.monotonic() - began
        _print(f"{output}: {best.label} at step {best.step}, best of {len(result.cells)}, {seconds:.1f} s")


def _search(options: argparse.Namespace) -> None:
    from averaging.soups.greedy import greedy, ranked
    from averaging.soups.learned import learned
    from averaging.soups.lm_cocktail import lm_cocktail
    from averaging.soups.measures import Measure
    from averaging.soups.search import search

    began = time.monotonic()
    method, own = _method(options)
    what = f"--method {method}"
    _refuse(options, what, "post_hoc")
    if method == "lm-cocktail":
        if isinstance(options.alpha, list):
            raise ValueError(f"{what} takes one --alpha, not a range")
        if options.alpha is not None and options.target is None:
            raise ValueError("--alpha is the share of a --target; name it, or leave --alpha out")
    output = _output(options)
    own |= (_losing if method == "learned" else _evaluating)(options, what, output)
    if own.get("normalize") == "none":
        own["normalize"] = None
    if method == "lm-cocktail" and options.metric is None and isinstance(own["evaluate"], Measure):
        own |= {"metric": "loss", "best": options.best or "min"}
    if method in ("greedy", "learned", "search"):
        own["plot"] = _plot(options, output, method)
    else:
        _refuse(options, what, "plot")
    models = _ingredients(options)
    if options.dry_run:
        _print("\n".join(f"{model.path} ({size(model.nbytes)})" for model in models))
        _print(f"{len(models)} checkpoints to evaluate, and soups of them; what comes of it to {output}")
        return
    methods: dict[str, Callable[..., Any]] = {"greedy": greedy, "ranked": ranked, "lm-cocktail": lm_cocktail}
    methods |= {"learned": learned, "search": search}
    with _counter(hidden=options.quiet) as progress:
        result = methods[method](models, output=output, progress=progress, **own, **_choices(options))
    if not options.quiet:
        _print(result.table())
        if method == "lm-cocktail":
            told = f"{len(result.models)}"
        elif method in ("learned", "search"):
            told = f"{len(models)}, best of {len(result.tried)}, {result.best.metric:.6g}"
        else:
            told = f"{sum(one.kept for one in result.tried)} out of {len(models)}, {result.metric:.6g}"
        _print(f"{output}: {method} soup of {told}, {time.monotonic() - began:.1f} s")


def _series(options: argparse.Namespace, coefficient: str) -> list[Soup]:
    """A soup for each value of the coefficient."""
    from averaging.soups.curve import Family

    if options.output is None:
        raise ValueError(f"say with -o OUT into which folder the models for each value of --{coefficient} go")
    method, paths, values, settings = _along(options, coefficient)
    return Family(method, paths, values, **settings).soups(options.output)


def _curve(options: argparse.Namespace, coefficient: str) -> None:
    from averaging.soups.curve import Family, curve

    began = time.monotonic()
    output = options.output
    evaluating = _evaluating(options, f"--{coefficient}", output)
    method, paths, values, settings = _along(options, coefficient)
    plot = _plot(options, output, "curve")
    if options.dry_run:
        planned = Family(method, paths, values, **settings).values
        _print(f"{coefficient} {', '.join(f'{value:.10g}' for value in planned)}")
        _print(f"{len(values)} soups to evaluate" + (f"; the best to {output}" if output else ""))
        return
    with _counter(hidden=options.quiet) as progress:
        settings |= {"output": output, "plot": plot, "progress": progress, **evaluating}
        result = curve(method, paths, values, **settings)
    if not options.quiet:
        _print(result.table())
        if output is not None and result.best is not None:
            best, seconds = f"{coefficient} {result.best.value:.10g}", time.monotonic() - began
            _print(f"{output}: {best}, best of {len(values)}, {seconds:.1f} s")


def _along(options: argparse.Namespace, coefficient: str) -> tuple[str, list[Checkpoint], list[float], dict[str, Any]]:
    """Method, ingredients, values of the coefficient, and the other arguments."""
    method, own = _method(options)
    values = own.pop(ARGUMENTS.get(coefficient, coefficient))
    own |= {"layers": _layers(options, method), **_choices(options)}
    return method, _ingredients(options), values, own


def _evaluating(options: argparse.Namespace, what: str, output: str | Path | None) -> dict[str, Any]:
    """What a search takes that writes to ``output``: how soups are evaluated, and where results are kept."""
    from averaging.soups.evaluation import Command, Evaluate
    from averaging.soups.measures import MEASURES

    if (options.evaluate is None) == (options.evaluate_command is None):
        raise ValueError(
            f"{what} needs --evaluate MODULE:FUNCTION, which returns the metric of an average, or --evaluate-command "
            "COMMAND, which prints it; one of them"
        )
    metric, best = options.metric, options.best
    evaluate: Evaluate
    name, _, file = (options.evaluate or "").partition(":")
    if name in MEASURES:
        if not file:
            raise ValueError(f"--evaluate {name}: needs a file: {name}:FILE")
        evaluate = measure = MEASURES[name](file, progress=_batches(name, hidden=options.quiet))
        metric = metric or measure.metric
        best = best or (measure.best if metric == measure.metric else "min")
    else:
        evaluate = Command(options.evaluate_command) if options.evaluate is None else _function(options.evaluate)
    cache = None if output is None else f"{Path(output)}.evaluations.json"
    return {"evaluate": evaluate, "metric": metric, "best": best or "min", "cache": cache}


def _losing(options: argparse.Namespace, what: str, output: str | Path) -> dict[str, Any]:
    """What learning takes that writes to ``output``: the model, its loss and batches, and where the state is."""
    _refuse(options, what, *(name for name in EVALUATING if name != "plot"))
    if options.loss is None:
        raise ValueError(
            f"{what} needs --loss MODULE:FUNCTION, which returns (model, loss, batches); for a metric without a "
            "gradient there is --method search"
        )
    make = _function(options.loss, "--loss")
    try:
        model, loss, batches = make()
    except Exception as error:
        raise ValueError(
            f"--loss {options.loss}: must return (model, loss, batches), but: {type(error).__name__}: {error}"
        ) from error
    return {"model": model, "loss": loss, "batches": batches, "cache": f"{Path(output)}.learned.json"}


def _function(text: str, option: str = "--evaluate") -> Callable[..., Any]:
    """The function that ``text``, MODULE:FUNCTION, names; modules are also looked for in the current folder."""
    module, colon, name = text.partition(":")
    if not (module and colon and name):
        raise ValueError(f"{option} {text}: give MODULE:FUNCTION, such as evaluation:loss")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function = importlib.import_module(module)
        for part in name.split("."):
            function = getattr(function, part)
    except Exception as error:
        raise ValueError(f"{option} {text}: {type(error).__name__}: {error}") from error
    if not callable(function):
        raise ValueError(f"{option} {text}: {name} is not a function")
    return function


def _is_record(path: str) -> bool:
    from averaging.checkpoints.files import read_json
    from averaging.soups.recorded import is_record

    return Path(path).suffix == ".json" and is_record(read_json(Path(path)))


def _again(options: argparse.Namespace) -> Soup:
    from averaging.soups.recorded import recorded

    own = {action.dest for action in parser()._actions} - {"recipe", "output", "force", "dry_run", "quiet", "debug"}
    _refuse(options, "the record of a soup, which is cooked as it was", *(n for n in own if getattr(options, n, None)))
    if options.output is None:
        raise ValueError("say where to write the soup of a record with -o OUT")
    return recorded(options.recipe, options.output, force=options.force)


def _take_recipe(options: argparse.Namespace) -> None:
    """Put the recipe that the options name in the place of those that were not given."""
    from averaging.recipe import read
    from averaging.soups.output import check_place

    values, options.layers = read(options.recipe, parser())
    for name, value in values.items():
        given = getattr(options, name)
        if given is None or given is False or given == []:
            setattr(options, name, value)
    if options.output is not None:
        check_place(options.output, [options.recipe], "recipe")
    if not options.paths:
        raise ValueError(f"{options.recipe} has no ingredients, and no PATH was given")
    if options.layers and (options.sweep or options.post_hoc or options.method in SEARCHES):
        raise ValueError(f"{options.recipe}: layers have no meaning for --sweep, --post-hoc and searches")
    sys.path.insert(0, os.path.abspath(os.path.dirname(options.recipe)))  # the function that --evaluate names


def _soup(options: argparse.Namespace) -> Soup:
    from averaging.soups.ema import EMA
    from averaging.soups.fisher import Fisher
    from averaging.soups.model_stock import ModelStock
    from averaging.soups.post_hoc import rebuilding
    from averaging.soups.rewarded import Rewarded
    from averaging.soups.slerp import Slerp
    from averaging.soups.soup import layered
    from averaging.soups.task import Task
    from averaging.soups.uniform import Uniform
    from averaging.soups.warp import Warp
    from averaging.soups.wise_ft import WiseFT

    if options.post_hoc is not None:
        _refuse(options, "--post-hoc", "last", "every", "method", *OWN)
        if len(options.paths) > 1:
            raise ValueError("--post-hoc takes a single folder, that of PostHocEMA's snapshots")
        if options.at and len(options.at) > 1:
            raise ValueError("--post-hoc makes one average: give --at a single step")
        step = options.at[0] if options.at else None
        return rebuilding(options.paths[0], options.post_hoc, step, _output(options), **_choices(options))
    method, own = _method(options)
    soups = {"uniform": Uniform, "wise-ft": WiseFT, "task": Task, "slerp": Slerp, "model-stock": ModelStock, "ema": EMA}
    soups |= {"warp": Warp, "rewarded": Rewarded, "fisher": Fisher}
    make = partial(cast("Callable[..., Soup]", soups[method]), _ingredients(options), **own, **_choices(options))
    return layered(make, _layers(options, method), output=_output(options))


def _layers(options: argparse.Namespace, method: str) -> list[Layer]:
    """The recipe's layers, with the method's arguments as their options."""
    for layer in options.layers:
        if wrong := layer.options.keys() - (set(METHODS[method]) - {"init", "fisher", "floor"}):
            raise ValueError(f"{layer.place}: {min(wrong)} is nothing that a layer can have of its own with {method}")
        if any(isinstance(layer.options.get(name), list) for name in COEFFICIENTS):
            raise ValueError(f"{layer.place}: a layer has one coefficient, not a range")
    return [replace(layer, options=_arguments(layer.options)) for layer in options.layers]


def _method(options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """The method, and the arguments that are its own."""
    _refuse(options, "a soup without --post-hoc or --sweep", "at")
    method = options.method or "uniform"
    _refuse(options, f"--method {method}", *(name for name in OWN if name not in METHODS[method]))
    for needed in {"init", "decay", "top"} & set(METHODS[method]):
        if getattr(options, needed) is None:
            raise ValueError(f"--method {method} needs --{needed}")
    return method, _arguments({name: getattr(options, name) for name in METHODS[method]})


def _arguments(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options that were given, as the functions take them."""
    given = {ARGUMENTS.get(name, name): value for name, value in options.items() if value is not None}
    if "slerp_weights" in options and "weights" in given:
        given["weights"] = list(itertools.chain.from_iterable(given["weights"]))
    return given


def _ingredients(options: argparse.Namespace) -> list[Checkpoint]:
    from averaging.checkpoints import gather, select

    return select(gather(options.paths), options.last, options.every)


def _choices(options: argparse.Namespace) -> Any:
    """What all methods take."""
    return {name: getattr(options, name) for name in CHOICES}


def _refuse(options: argparse.Namespace, what: str, *names: str) -> None:
    for name in names:
        if getattr(options, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} has no meaning for {what}; leave it out")


def _output(options: argparse.Namespace) -> str | Path:
    from averaging.checkpoints.finding import DEFAULT_OUTPUT, is_searched

    if options.output is not None:
        return str(options.output)
    folder = Path(options.paths[0])
    if len(options.paths) > 1 or not is_searched(folder, alone=True):
        raise ValueError("say where to write with -o OUT (only for a single folder there is a default, FOLDER/soup)")
    return folder / DEFAULT_OUTPUT


def _plot(options: argparse.Namespace, output: str | Path | None, what: str) -> str | None:
    """Where the picture goes, if one is wanted."""
    if options.plot == "" and output is None:
        raise ValueError("--plot has no name to go by without -o OUT; name a file: --plot front.png")
    return f"{Path(str(output))}.{what}.png" if options.plot == "" else cast("str | None", options.plot)


def _describe(soup: Soup) -> str:
    lines = ["read"]
    shares = [f"{c:.4f} × " for c in soup.coefficients or ()] or [""] * len(soup.ingredients)
    for ingredient, share in zip(soup.ingredients, shares, strict=True):
        step = "" if ingredient.step is None else f", step {ingredient.step}"
        lines.append(f"  {share}{ingredient.path} ({size(ingredient.nbytes)}{step})")
    if soup.template is not None:
        lines.append(f"  the rest from {soup.template.path}")
    assert soup.output is not None
    output = soup.output
    lines.append(f"write {output.path}, {len(soup.dtypes)} tensors, {', '.join(sorted(set(soup.dtypes.values())))}")
    lines += [f"  {file.name} ({size(file.nbytes)})" for file in output.files]
    lines += [f"  {path.relative_to(output.model.path)} (copied)" for path in output.copied()]
    lines.append(f"  {output.record_path.name}")
    return "\n".join(lines)


def _axis(text: str) -> tuple[str, list[Any]]:
    from averaging.soups.sweep import AXES

    axis, equals, values = text.partition("=")
    axis = axis.replace("-", "_")
    if axis not in AXES or not equals:
        names = ", ".join(name.replace("_", "-") for name in AXES)
        raise argparse.ArgumentTypeError(f"expected AXIS=V,V,... with AXIS one of {names}, not {text!r}")
    try:
        return axis, [AXES[axis](value) for value in values.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers separated by commas, not {values!r}") from None


def _steps(text: str) -> list[int]:
    try:
        return [int(step) for step in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected steps separated by commas, not {text!r}") from None


def _weights(text: str) -> list[float] | Decay:
    if text in get_args(Decay):
        return cast(Decay, text)
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected numbers separated by commas, or one of {', '.join(get_args(Decay))}, not {text!r}"
        ) from None


def _numbers(text: str) -> list[float]:
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers, not {text!r}") from None


def _values(text: str) -> float | list[float]:
    """A number; or several, V,V,... or FROM:TO:STEP, as near to their decimals as can be."""
    try:
        if ":" not in text:
            numbers = _numbers(text)
            return numbers if len(numbers) > 1 else numbers[0]
        # By way of floats, as a fraction takes all memory for the digits of 1e999999999.
        begin, end, step = (Fraction(repr(float(number))) for number in text.split(":"))
        if not (begin <= end and step > 0):
            raise ValueError
    except (ValueError, ZeroDivisionError, argparse.ArgumentTypeError):
        raise argparse.ArgumentTypeError(
            f"expected a number, several as V,V,... or a range as FROM:TO:STEP, such as 0:1:0.1, not {text!r}"
        ) from None
    count = (end - begin) // step + 1
    if count > MOST:
        raise argparse.ArgumentTypeError(f"{text} is {count} values; expected {MOST} at most")
    return [float(begin + i * step) for i in range(count)]


def _explain(error: BaseException) -> str:
    if isinstance(error, MemoryError):
        return "out of memory"
    if isinstance(error, OSError) and error.strerror:
        reason = error.strerror[0].lower() + error.strerror[1:]
        return f"{reason}: {os.fspath(error.filename)!s}" if error.filename is not None else reason
    return str(error)


def _say(message: str) -> None:
    print(f"soup: {_shown(message)}", file=sys.stderr)


def _shown(message: str) -> str:
    """A message as a line: names may hold line breaks and what a terminal takes for commands, and be of any length."""
    return _escaped(message[:LONGEST]) + ("..." if len(message) > LONGEST else "")


def _escaped(text: str) -> str:
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def _print(text: str) -> None:
    """Print lines in which names may hold anything, as far as the terminal has the letters for them."""
    encoding = sys.stdout.encoding or "utf-8"
    shown = "\n".join(map(_escaped, text.split("\n")))
    print(shown.encode(encoding, "backslashreplace").decode(encoding))


@contextlib.contextmanager
def _warnings_as_lines() -> Iterator[None]:
    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        _say(f"warning: {message}")

    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = show
        yield


@contextlib.contextmanager
def _bar(hidden: bool) -> Iterator[Progress | None]:
    """A progress bar on a terminal, nothing elsewhere."""
    if hidden or not sys.stderr.isatty():
        yield None
        return

    def draw(done: int, total: int) -> None:
        share = done / max(total, 1)
        print(f"\r{'█' * round(30 * share):░<30} {share:4.0%} of {size(total)}", end="", file=sys.stderr, flush=True)

    try:
        yield draw
    finally:
        print("\r\033[K", end="", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _counter(hidden: bool) -> Iterator[Callable[[int, int, str], None] | None]:
    """A line that counts evaluations on a terminal, nothing elsewhere."""
    if hidden or not sys.stderr.isatty():
        yield None
        return

    def draw(done: int, total: int, what: str) -> None:
        print(f"\r\033[K{done} of {total} evaluated, now {what}", end="", file=sys.stderr, flush=True)

    try:
        yield draw
    finally:
        print("\r\033[K", end="", file=sys.stderr, flush=True)


def _batches(name: str, hidden: bool) -> Callable[[int, int], None] | None:
    """A line that counts batches on a terminal; the next line of `_counter` takes its place."""
    if hidden or not sys.stderr.isatty():
        return None
    return lambda done, total: print(f"\r\033[K{name}: {done} of {total} batches", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    # A soup of its own where a training run that torchrun started calls the command `soup`, but one together here.
    sys.exit(main(distributed=True))
