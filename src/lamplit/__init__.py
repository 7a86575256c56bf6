"""lamplit: lock any image model and teach a text tower to read it (LiT, Zhai et al., CVPR 2022).

Names are loaded when they are first used: `import lamplit` is quick and does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lamplit._version import __version__

if TYPE_CHECKING:
    from lamplit.app.launch import serve
    from lamplit.data.decoding.preprocessing import Preprocessing
    from lamplit.data.named.catalog import fetch
    from lamplit.data.pairs import Pair, Pairs
    from lamplit.data.skipped import Skipped
    from lamplit.data.sources import read_pairs
    from lamplit.errors import (
        ImageError,
        LamplitError,
        MissingExtraError,
        PairsError,
        StoreError,
        TowerError,
        TuneError,
        UsageError,
    )
    from lamplit.evaluation.benchmarks import run_benchmarks
    from lamplit.evaluation.evaluator import evaluate
    from lamplit.evaluation.protocols.known import list_benchmarks
    from lamplit.evaluation.report.writing import Report, write_report
    from lamplit.exports.export_report import ExportReport
    from lamplit.exports.exporting import export
    from lamplit.inspection import describe
    from lamplit.losses.contrastive import sigmoid_loss, softmax_loss
    from lamplit.metrics.ranking import ClassScore
    from lamplit.metrics.results import Measure, Result
    from lamplit.model import LiT, load, merge_lora
    from lamplit.planning.plan_report import Plan, Stage
    from lamplit.planning.planner import plan
    from lamplit.publishing.pushing import PushReport, push
    from lamplit.retrieval.contact_sheet import contact_sheet
    from lamplit.retrieval.indexing import IndexReport, build_index
    from lamplit.retrieval.locating import HeatMap, locate
    from lamplit.retrieval.projection import MapReport, make_map
    from lamplit.retrieval.searcher import Hit, Searcher, search
    from lamplit.store.duplicates import DuplicateGroup, find_duplicates
    from lamplit.store.embed.embedding import embed
    from lamplit.store.embed_report import EmbedReport
    from lamplit.store.exchange import ImportReport, VectorsReport, export_vectors, import_vectors
    from lamplit.store.lance_store import Store
    from lamplit.towers.identity import TowerIdentity
    from lamplit.towers.images.image_tower import ImageTower, open_image_tower
    from lamplit.towers.lock import Locked
    from lamplit.towers.published.big_vision import list_published
    from lamplit.towers.texts.text_tower import TextTower, open_text_tower
    from lamplit.towers.two_towers import LiTOutput
    from lamplit.tuning.comparison import Cell, Comparison, compare
    from lamplit.tuning.run import tune
    from lamplit.tuning.settings import TuneSettings, list_recipes, read_recipe
    from lamplit.tuning.text_teacher import TextsReport, embed_texts
    from lamplit.tuning.tune_report import TuneReport
    from lamplit.zeroshot.calibration_report import CalibrationReport
    from lamplit.zeroshot.class_list import ClassList
    from lamplit.zeroshot.class_making import make_classes
    from lamplit.zeroshot.classifier import ClassifyResult, Prediction, classify

_HOMES = {
    "CalibrationReport": "zeroshot.calibration_report",
    "Cell": "tuning.comparison",
    "ClassList": "zeroshot.class_list",
    "ClassScore": "metrics.ranking",
    "ClassifyResult": "zeroshot.classifier",
    "Comparison": "tuning.comparison",
    "DuplicateGroup": "store.duplicates",
    "EmbedReport": "store.embed_report",
    "ExportReport": "exports.export_report",
    "HeatMap": "retrieval.locating",
    "Hit": "retrieval.searcher",
    "ImageError": "errors",
    "ImageTower": "towers.images.image_tower",
    "ImportReport": "store.exchange",
    "IndexReport": "retrieval.indexing",
    "LamplitError": "errors",
    "LiT": "model",
    "LiTOutput": "towers.two_towers",
    "Locked": "towers.lock",
    "MapReport": "retrieval.projection",
    "Measure": "metrics.results",
    "MissingExtraError": "errors",
    "Pair": "data.pairs",
    "Pairs": "data.pairs",
    "PairsError": "errors",
    "Plan": "planning.plan_report",
    "Prediction": "zeroshot.classifier",
    "Preprocessing": "data.decoding.preprocessing",
    "PushReport": "publishing.pushing",
    "Report": "evaluation.report.writing",
    "Result": "metrics.results",
    "Searcher": "retrieval.searcher",
    "Skipped": "data.skipped",
    "Stage": "planning.plan_report",
    "Store": "store.lance_store",
    "StoreError": "errors",
    "TextTower": "towers.texts.text_tower",
    "TextsReport": "tuning.text_teacher",
    "TowerError": "errors",
    "TowerIdentity": "towers.identity",
    "TuneError": "errors",
    "TuneReport": "tuning.tune_report",
    "TuneSettings": "tuning.settings",
    "UsageError": "errors",
    "VectorsReport": "store.exchange",
    "build_index": "retrieval.indexing",
    "classify": "zeroshot.classifier",
    "compare": "tuning.comparison",
    "contact_sheet": "retrieval.contact_sheet",
    "describe": "inspection",
    "embed": "store.embed.embedding",
    "embed_texts": "tuning.text_teacher",
    "evaluate": "evaluation.evaluator",
    "export": "exports.exporting",
    "export_vectors": "store.exchange",
    "fetch": "data.named.catalog",
    "find_duplicates": "store.duplicates",
    "import_vectors": "store.exchange",
    "list_benchmarks": "evaluation.protocols.known",
    "list_published": "towers.published.big_vision",
    "list_recipes": "tuning.settings",
    "load": "model",
    "locate": "retrieval.locating",
    "make_classes": "zeroshot.class_making",
    "make_map": "retrieval.projection",
    "merge_lora": "model",
    "open_image_tower": "towers.images.image_tower",
    "open_text_tower": "towers.texts.text_tower",
    "plan": "planning.planner",
    "push": "publishing.pushing",
    "read_pairs": "data.sources",
    "read_recipe": "tuning.settings",
    "run_benchmarks": "evaluation.benchmarks",
    "search": "retrieval.searcher",
    "serve": "app.launch",
    "sigmoid_loss": "losses.contrastive",
    "softmax_loss": "losses.contrastive",
    "tune": "tuning.run",
    "write_report": "evaluation.report.writing",
}

__all__ = [
    "CalibrationReport",
    "Cell",
    "ClassList",
    "ClassScore",
    "ClassifyResult",
    "Comparison",
    "DuplicateGroup",
    "EmbedReport",
    "ExportReport",
    "HeatMap",
    "Hit",
    "ImageError",
    "ImageTower",
    "ImportReport",
    "IndexReport",
    "LamplitError",
    "LiT",
    "LiTOutput",
    "Locked",
    "MapReport",
    "Measure",
    "MissingExtraError",
    "Pair",
    "Pairs",
    "PairsError",
    "Plan",
    "Prediction",
    "Preprocessing",
    "PushReport",
    "Report",
    "Result",
    "Searcher",
    "Skipped",
    "Stage",
    "Store",
    "StoreError",
    "TextTower",
    "TextsReport",
    "TowerError",
    "TowerIdentity",
    "TuneError",
    "TuneReport",
    "TuneSettings",
    "UsageError",
    "VectorsReport",
    "__version__",
    "build_index",
    "classify",
    "compare",
    "contact_sheet",
    "describe",
    "embed",
    "embed_texts",
    "evaluate",
    "export",
    "export_vectors",
    "fetch",
    "find_duplicates",
    "import_vectors",
    "list_benchmarks",
    "list_published",
    "list_recipes",
    "load",
    "locate",
    "make_classes",
    "make_map",
    "merge_lora",
    "open_image_tower",
    "open_text_tower",
    "plan",
    "push",
    "read_pairs",
    "read_recipe",
    "run_benchmarks",
    "search",
    "serve",
    "sigmoid_loss",
    "softmax_loss",
    "tune",
    "write_report",
]


def __getattr__(name: str) -> Any:
    """Load a public name from the module that defines it."""
    if name not in _HOMES:
        raise AttributeError(f"module 'lamplit' has no attribute {name!r}")
    return getattr(import_module(f"lamplit.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    """List the public names, and the modules of lamplit that were imported."""
    modules = [name for name, value in globals().items() if getattr(value, "__package__", "").startswith("lamplit")]
    return sorted({*__all__, *modules} - {"_version"})
