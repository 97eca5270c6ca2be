"""What is allowed: a policy's types, its file format, and everything that can be wrong with one.

Pure: reading a file is the only I/O, there is no clock, and nothing here knows of requests, of Rego or of the network.
"""
