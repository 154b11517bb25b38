"""Texts and the token windows that are cut from them."""
