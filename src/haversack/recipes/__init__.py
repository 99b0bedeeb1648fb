"""Recipes: a paper's name, its source, its composition of parts and its published figure; found by walking this package."""
