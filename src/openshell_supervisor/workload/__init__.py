"""Spawn, reap, signal, exit code; the environment the workload gets."""
