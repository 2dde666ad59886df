"""A random check of the public operators against definitions in fp64 that share no code with the library.

One seeded generator draws each case from its number, so a case is repeated by its number alone.

    cases.py        what a case is made of, and how it is drawn
    tensors.py      values, layouts in memory, targets
    exact.py        the definitions in fp64, with simulated rounding
    plain.py        the same results by plain PyTorch in the dtype of the case
    problems.py     a case as tensors and functions
    comparison.py   results, gradients, and how far they may be from exact
    bad_input.py    arguments that must raise a clear error
    check.py        everything that is asserted of a case; a failing case made smaller
    __main__.py     ``make soak``
"""
