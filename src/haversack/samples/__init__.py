"""Samples to train on: rows read from files, made into tokens, packed into rows of one length, drawn in a seeded order."""
