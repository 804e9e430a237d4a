"""Parallelism: a plain model goes in, this rank's part of it and an engine that runs batches through it come out.

`plan` says how each parameter is split, `mesh` who is where, `tensor` what a product means on one of several ranks,
`build` makes a rank's part, `recompute` trades memory for time, `compile` compiles layers, `engine` runs forward and
backward.
"""
