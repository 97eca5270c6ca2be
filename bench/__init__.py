"""The bench: this supervisor beside stock `mitmdump` and beside no proxy at all, in one run.

`python -m bench` measures, prints one table with the target of each row, and writes the same numbers as JSON.
It imports nothing of the product except, in `decisions`, the decision itself: everything else drives the console script
as a user would, so that what is measured is what is shipped.
"""
