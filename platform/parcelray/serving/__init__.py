"""Serving: one checkpoint at any visual-token budget behind an OpenAI-compatible endpoint on Ray Serve.

An ingress without a model (validation, keys, images, budgets) stands before deployments that each hold an engine.
"""
