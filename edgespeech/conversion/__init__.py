"""Turning a trained attention model into a hybrid: capture, sweep, replace, distil.

Works on any model whose layers hold their token mixer in an attribute `mixer`, called `mixer(x, lengths)`.
What a kind of recogniser brings of its own, the forward call and the terms of the loss, is a `Task`: one file each.
"""
