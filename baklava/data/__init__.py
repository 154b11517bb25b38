"""Texts by name, and the token windows that are cut from them."""
