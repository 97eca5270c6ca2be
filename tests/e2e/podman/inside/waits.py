"""The workload of the stop tests: says that it is there, then ends with 5 on SIGTERM, or never when told "stubborn"."""

import signal
import sys


def main() -> None:
    """Wait for signals."""
    if "stubborn" in sys.argv:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    else:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))
    print("WAITING", flush=True)
    while True:
        signal.pause()


main()
