"""Chosen modules become rank-r updates."""
