"""The tutorial's plugin is collected where it is installed; tests/test_docs_tutorial.py installs it and holds its exam."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("ftx_hello") else ["ftx-hello"]
