"""Averages of a model's weights, while it trains and afterwards.

`LAWA`, `EMA` and `SWA` are plain averagers for your own loop; `averaging.lightning` and
`averaging.transformers` hold the same names as callbacks for those trainers, and `averaging.soups`
(or the command ``soup``) averages saved checkpoints.

Importing this package imports neither torch nor a trainer: names are resolved on first use (PEP 562).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from averaging.anchors import Reference
    from averaging.apply import applied, load_into
    from averaging.averager import Averager
    from averaging.averagers.bema import BEMA
    from averaging.averagers.elastic_reset import ElasticReset
    from averaging.averagers.ema import EMA
    from averaging.averagers.ema_anchor import EMAAnchor
    from averaging.averagers.lawa import LAWA
    from averaging.averagers.post_hoc_ema import PostHocEMA
    from averaging.averagers.swa import SWA
    from averaging.averagers.swad import SWAD
    from averaging.averagers.trajectory import Trajectory
    from averaging.batchnorm import recalibrate, recalibrated
    from averaging.completeness import latest_complete
    from averaging.diagnosis import diagnose
    from averaging.shard_files import save_whole
    from averaging.weights import Weights, named_weights

__version__ = "0.1.0"

_HOME = {
    "BEMA": "averaging.averagers.bema",
    "EMA": "averaging.averagers.ema",
    "EMAAnchor": "averaging.averagers.ema_anchor",
    "ElasticReset": "averaging.averagers.elastic_reset",
    "LAWA": "averaging.averagers.lawa",
    "PostHocEMA": "averaging.averagers.post_hoc_ema",
    "SWA": "averaging.averagers.swa",
    "SWAD": "averaging.averagers.swad",
    "Trajectory": "averaging.averagers.trajectory",
    "Averager": "averaging.averager",
    "Reference": "averaging.anchors",
    "Weights": "averaging.weights",
    "applied": "averaging.apply",
    "diagnose": "averaging.diagnosis",
    "latest_complete": "averaging.completeness",
    "load_into": "averaging.apply",
    "named_weights": "averaging.weights",
    "recalibrate": "averaging.batchnorm",
    "recalibrated": "averaging.batchnorm",
    "save_whole": "averaging.shard_files",
}

__all__ = [
    "BEMA",
    "EMA",
    "LAWA",
    "SWA",
    "SWAD",
    "Averager",
    "EMAAnchor",
    "ElasticReset",
    "PostHocEMA",
    "Reference",
    "Trajectory",
    "Weights",
    "applied",
    "diagnose",
    "latest_complete",
    "load_into",
    "named_weights",
    "recalibrate",
    "recalibrated",
    "save_whole",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'averaging' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
