"""Weights in and out: tables of names, and what is done with them."""
