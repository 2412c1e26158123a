"""Curvature matrices, known by their products."""
