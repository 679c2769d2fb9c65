"""Serving: an OpenAI-compatible endpoint on Ray Serve that answers at any visual-token budget of one checkpoint.

An ingress without a model (validation, keys, images, budgets) sends requests to deployments whose replicas each run an
engine.
"""
