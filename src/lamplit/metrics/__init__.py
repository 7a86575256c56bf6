"""Arithmetic without a model: ranks, scores, calibration, the few-shot probe, results."""
