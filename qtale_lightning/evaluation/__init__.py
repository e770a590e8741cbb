"""Scoring, threshold selection and counted cost."""
