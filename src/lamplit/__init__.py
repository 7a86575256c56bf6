"""lamplit: lock any image model and teach a text tower to read it (LiT, Zhai et al., CVPR 2022).

Names are loaded when they are first used: `import lamplit` is quick, and brings no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lamplit._version import __version__

if TYPE_CHECKING:
    from lamplit.app.launch import serve
    from lamplit.data.catalog import fetch
    from lamplit.data.pairs import Pair, Pairs, read_pairs
    from lamplit.data.preprocessing import Preprocessing
    from lamplit.errors import LamplitError
    from lamplit.evaluation.benchmarks import run_benchmarks
    from lamplit.evaluation.evaluator import evaluate
    from lamplit.evaluation.report.writing import write_report
    from lamplit.exports.exporting import export
    from lamplit.losses.contrastive import sigmoid_loss, softmax_loss
    from lamplit.model import LiT, load, merge_lora
    from lamplit.retrieval.searcher import Searcher, search
    from lamplit.store.duplicates import find_duplicates
    from lamplit.store.embedding import embed
    from lamplit.store.exchange import export_vectors, import_vectors
    from lamplit.store.lance_store import Store
    from lamplit.towers.images.image_tower import open_image_tower
    from lamplit.towers.lock import Locked
    from lamplit.towers.texts.text_tower import open_text_tower
    from lamplit.tuning.comparison import compare
    from lamplit.tuning.run import tune
    from lamplit.tuning.settings import TuneSettings
    from lamplit.zeroshot.class_list import ClassList
    from lamplit.zeroshot.class_making import make_classes
    from lamplit.zeroshot.classifier import classify

_HOMES = {
    "ClassList": "zeroshot.class_list",
    "LamplitError": "errors",
    "LiT": "model",
    "Locked": "towers.lock",
    "Pair": "data.pairs",
    "Pairs": "data.pairs",
    "Preprocessing": "data.preprocessing",
    "Searcher": "retrieval.searcher",
    "Store": "store.lance_store",
    "TuneSettings": "tuning.settings",
    "classify": "zeroshot.classifier",
    "compare": "tuning.comparison",
    "embed": "store.embedding",
    "evaluate": "evaluation.evaluator",
    "export": "exports.exporting",
    "export_vectors": "store.exchange",
    "fetch": "data.catalog",
    "find_duplicates": "store.duplicates",
    "import_vectors": "store.exchange",
    "load": "model",
    "make_classes": "zeroshot.class_making",
    "merge_lora": "model",
    "open_image_tower": "towers.images.image_tower",
    "open_text_tower": "towers.texts.text_tower",
    "read_pairs": "data.pairs",
    "run_benchmarks": "evaluation.benchmarks",
    "search": "retrieval.searcher",
    "serve": "app.launch",
    "sigmoid_loss": "losses.contrastive",
    "softmax_loss": "losses.contrastive",
    "tune": "tuning.run",
    "write_report": "evaluation.report.writing",
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
