"""Carries out verdicts: accepts, asks, then relays, inspects or refuses. The only room that knows mitmproxy."""
