"""Measure a model: own data, known benchmarks, reports."""
