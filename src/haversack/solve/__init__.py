"""Picks one choice per group under byte budgets: exactly, fast, along a front, and corrected by measurements.

Knows groups, choices, time points and bytes, and nothing about models.
"""
