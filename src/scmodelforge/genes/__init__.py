"""Genes: the tables of human and mouse, the vocabulary of a model, and how the genes of a file meet it."""
