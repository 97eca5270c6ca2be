"""Why was this denied, and what would change? Questions of people and of CI, answered by the proxy's own `decide`.

`question` puts one question in the proxy's order of checks; `nearest` looks for the rule that almost allowed it; `cases` and
`replay` ask many, from a file; `command` is the command line. Nothing here opens a socket or looks a name up.
"""
