"""May this leave? A pure function of facts and a policy generation.

The proxy, `explain` and dry-run call the same `decide.decide`. This room opens no socket, reads no clock and logs nothing.
"""
