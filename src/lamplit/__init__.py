"""lamplit: lock any image model and teach a text tower to read it (LiT, Zhai et al., CVPR 2022).

Names are loaded when they are first used: `import lamplit` is quick, and brings no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lamplit._version import __version__

if TYPE_CHECKING:
    from lamplit.app.serving import serve
    from lamplit.benchmarks import run_benchmarks
    from lamplit.class_making import make_classes
    from lamplit.classes import ClassList
    from lamplit.comparison import compare
    from lamplit.data.catalog import fetch
    from lamplit.data.pairs import Pair, Pairs, read_pairs
    from lamplit.duplicates import find_duplicates
    from lamplit.embedding import embed
    from lamplit.errors import LamplitError
    from lamplit.evaluation import evaluate
    from lamplit.exchange import export_vectors, import_vectors
    from lamplit.exports.run import export
    from lamplit.losses import sigmoid_loss, softmax_loss
    from lamplit.model import LiT, load, merge_lora
    from lamplit.preprocessing import Preprocessing
    from lamplit.report.run import write_report
    from lamplit.retrieval import Searcher, search
    from lamplit.store import Store
    from lamplit.towers.image import open_image_tower
    from lamplit.towers.lock import Locked
    from lamplit.towers.text import open_text_tower
    from lamplit.tuning.run import tune
    from lamplit.tuning.settings import TuneSettings
    from lamplit.zeroshot import classify

_HOMES = {
    "ClassList": "classes",
    "LamplitError": "errors",
    "LiT": "model",
    "Locked": "towers.lock",
    "Pair": "data.pairs",
    "Pairs": "data.pairs",
    "Preprocessing": "preprocessing",
    "Searcher": "retrieval",
    "Store": "store",
    "TuneSettings": "tuning.settings",
    "classify": "zeroshot",
    "compare": "comparison",
    "embed": "embedding",
    "evaluate": "evaluation",
    "export": "exports.run",
    "export_vectors": "exchange",
    "fetch": "data.catalog",
    "find_duplicates": "duplicates",
    "import_vectors": "exchange",
    "load": "model",
    "make_classes": "class_making",
    "merge_lora": "model",
    "open_image_tower": "towers.image",
    "open_text_tower": "towers.text",
    "read_pairs": "data.pairs",
    "run_benchmarks": "benchmarks",
    "search": "retrieval",
    "serve": "app.serving",
    "sigmoid_loss": "losses",
    "softmax_loss": "losses",
    "tune": "tuning.run",
    "write_report": "report.run",
}

__all__ = [
    "ClassList",
    "LamplitError",
    "LiT",
    "Locked",
    "Pair",
    "Pairs",
    "Preprocessing",
    "Searcher",
    "Store",
    "TuneSettings",
    "__version__",
    "classify",
    "compare",
    "embed",
    "evaluate",
    "export",
    "export_vectors",
    "fetch",
    "find_duplicates",
    "import_vectors",
    "load",
    "make_classes",
    "merge_lora",
    "open_image_tower",
    "open_text_tower",
    "read_pairs",
    "run_benchmarks",
    "search",
    "serve",
    "sigmoid_loss",
    "softmax_loss",
    "tune",
    "write_report",
]


def __getattr__(name: str) -> Any:
    """Load a public name from the module it lives in."""
    if name not in _HOMES:
        raise AttributeError(f"module 'lamplit' has no attribute {name!r}")
    return getattr(import_module(f"lamplit.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
