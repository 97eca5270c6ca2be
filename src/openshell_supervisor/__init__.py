"""openshell-supervisor: the process that stands between an AI agent and the machine it runs on."""

__version__ = "0.1.0"
