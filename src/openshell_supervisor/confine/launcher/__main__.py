"""The launcher's first instruction: find its own package, behind the standard library, and serve."""

import sys

# …/openshell_supervisor/confine/launcher/__main__.py: four names up is what holds the package. At the end, so that nothing in
# there can stand in for a module of the standard library.
sys.path.append(__file__.rsplit("/", 4)[0])

if __name__ == "__main__":
    from openshell_supervisor.confine.launcher.service import main

    main()
