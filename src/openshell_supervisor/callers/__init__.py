"""Who is on the other end of a proxied connection: from the socket's addresses to the program, its ancestors and its hash.

Knows sockets, processes and files of /proc; knows no policy and no proxy. What cannot be told for certain is a problem, never a
guess: the reader of a `Caller` with a problem denies.
"""
