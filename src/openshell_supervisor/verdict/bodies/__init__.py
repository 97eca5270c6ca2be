"""Bodies and messages that rules look into: bytes to frozen facts. Pure; it knows of no rule and decides nothing.

A parser either gives facts, perhaps with an `error` that `decide` turns into a denial, or raises `BodyError` for what is refused
before any rule is asked. Whatever two servers could read in two ways is an error here: what was judged must be what is executed.
"""
