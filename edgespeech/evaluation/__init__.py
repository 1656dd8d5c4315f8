"""Evaluation: word error rate with its interval, the report of an experiment, and its plots."""
