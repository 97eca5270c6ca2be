"""What the supervisor says about itself: OCSF events, their one-line form, and the places they go to.

This room knows nothing of the rooms above it. It never decides, never measures, never reads a setting: it is told,
writes it down in a shape that other people's tools already read, and gives the same fact to every reader.
"""
