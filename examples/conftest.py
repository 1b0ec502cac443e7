"""The tutorial's plugin is collected where it is installed; tests/test_docs_tutorial.py installs it and holds its exam."""

from importlib.metadata import distributions

collect_ignore = [] if any(one.name == "ftx-hello" for one in distributions()) else ["ftx-hello"]
