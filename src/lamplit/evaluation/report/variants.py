"""Names that tell results apart: models of one name, and several measurements of one data set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from lamplit.metrics.results import Result

# What can differ between measurements of one model on one data set, the likeliest first
_DIFFERENCES: tuple[Callable[[Result], str], ...] = (
    lambda result: f"column {result.column}" if result.column else "",
    lambda result: result.split.replace("_", " "),
    lambda result: result.dataset,
    lambda result: result.source,
    lambda result: f"resize mode {result.protocol.get('resize_mode', '')}",
    lambda result: f"templates {result.protocol.get('templates', '')}",
    lambda result: "canonical prompts" if result.protocol.get("canonicalized") else "prompts as they are",
    lambda result: f"{result.classes} classes",
    lambda result: result.main_metric,
    lambda result: result.time,
)


def distinguish(results: Sequence[Result]) -> list[Result]:
    """Make every pair of model and measurement unique, so that a report shows all of them.

    Different models of one name get the first digits of their fingerprints. If one model has several results of one
    task, benchmark and language, all results of these get a `variant`: what differs between them.
    """
    named = _rename_models(results)
    groups: dict[tuple[str, str, str], list[int]] = {}
    for i, result in enumerate(named):
        groups.setdefault((result.task, result.benchmark, result.language), []).append(i)
    for rows in groups.values():
        group = [named[i] for i in rows]
        for i, variant in zip(rows, _variants(group), strict=True):
            named[i] = replace(named[i], variant=variant)
    return named


def _rename_models(results: Sequence[Result]) -> list[Result]:
    fingerprints: dict[str, set[str]] = {}
    for result in results:
        fingerprints.setdefault(result.model["name"], set()).add(result.model.get("fingerprint", ""))
    renamed = []
    for result in results:
        name, digits = result.model["name"], result.model.get("fingerprint", "")[:8]
        if len(fingerprints[name]) > 1 and digits:
            result = replace(result, model={**result.model, "name": f"{name} ({digits})"})
        renamed.append(result)
    return renamed


def _variants(group: Sequence[Result]) -> list[str]:
    """Return what tells the results of each model apart in the fewest words; nothing if each model has one."""
    models = [result.model["name"] for result in group]
    chosen: list[list[str]] = [[] for _ in group]
    for difference in _DIFFERENCES:
        if len(set(zip(models, map(tuple, chosen), strict=True))) == len(group):
            break
        found = [difference(result) for result in group]
        if any(
            len({value for value, name in zip(found, models, strict=True) if name == model}) > 1 for model in models
        ):
            for parts, value in zip(chosen, found, strict=True):
                parts.append(value)
    return [", ".join(filter(None, parts)) for parts in chosen]
