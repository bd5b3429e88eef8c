"""Soups: averages of saved checkpoints. Importing this imports no torch."""

from averaging.soups.connectivity import Connectivity, connectivity
from averaging.soups.curve import Curve, curve, series
from averaging.soups.ema import ema
from averaging.soups.fisher import fisher, fisher_information
from averaging.soups.greedy import Chosen, greedy, ranked
from averaging.soups.inspection import Inspection, inspect
from averaging.soups.learned import Learned, learned
from averaging.soups.lm_cocktail import Cocktail, lm_cocktail
from averaging.soups.measures import Accuracy, Perplexity
from averaging.soups.model_stock import model_stock
from averaging.soups.post_hoc import post_hoc
from averaging.soups.rewarded import rewarded
from averaging.soups.search import search
from averaging.soups.slerp import slerp
from averaging.soups.sweep import Sweep, sweep
from averaging.soups.task import task
from averaging.soups.uniform import uniform
from averaging.soups.warp import warp
from averaging.soups.wise_ft import wise_ft

__all__ = [
    "Accuracy",
    "Chosen",
    "Cocktail",
    "Connectivity",
    "Curve",
    "Inspection",
    "Learned",
    "Perplexity",
    "Sweep",
    "connectivity",
    "curve",
    "ema",
    "fisher",
    "fisher_information",
    "greedy",
    "inspect",
    "learned",
    "lm_cocktail",
    "model_stock",
    "post_hoc",
    "ranked",
    "rewarded",
    "search",
    "series",
    "slerp",
    "sweep",
    "task",
    "uniform",
    "warp",
    "wise_ft",
]
