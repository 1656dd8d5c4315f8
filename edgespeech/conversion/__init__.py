"""Turning a trained attention model into a hybrid: capture, sweep, replace, distil.

Works on any model whose layers hold their token mixer in an attribute `mixer`, called `mixer(x, lengths)`.
"""
