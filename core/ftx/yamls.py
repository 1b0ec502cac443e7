"""YAML that somebody else may have written: no objects, no doubled keys, and never larger than it looks."""

from __future__ import annotations

from typing import Any

import yaml

#: Characters of a file, and values that it may hold once its aliases are unfolded. A recipe has about a hundred.
LONGEST, MOST = 1 << 20, 20_000


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key that stands there twice: PyYAML keeps the last one and says nothing."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _problem("a key must be a plain word", key)
            if key.value in seen:
                raise _problem(f"the key '{key.value}' stands there twice", key)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def load(text: str) -> Any:
    """The content of one YAML document; yaml.YAMLError, with `problem` and where it can be `problem_mark`, if it is not YAML,
    or is made to fill the memory (aliases of aliases unfold to any size)."""
    if len(text) > LONGEST:
        raise yaml.MarkedYAMLError(problem=f"longer than {LONGEST:,} characters")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _unfolded(node, {}, set())
        return loader.construct_document(node)
    except RecursionError as error:
        raise yaml.MarkedYAMLError(problem="nested too deeply") from error
    except (ValueError, OverflowError) as error:  # a date that is none, a number of thousands of digits
        raise yaml.MarkedYAMLError(problem=str(error).splitlines()[0]) from error


def _unfolded(node: Any, known: dict[int, int], above: set[int]) -> int:
    """How many values a node is with every alias unfolded."""
    if id(node) in above:
        raise _problem("a value refers to itself", node)
    if id(node) in known:
        return known[id(node)]
    below = [one for pair in node.value for one in pair] if isinstance(node, yaml.MappingNode) else node.value if isinstance(node, yaml.SequenceNode) else []
    size = 1 + sum(_unfolded(one, known, above | {id(node)}) for one in below)
    if size > MOST:
        raise _problem(f"more than {MOST:,} values, once its aliases are unfolded", node)
    known[id(node)] = size
    return size


def _problem(text: str, node: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=text, problem_mark=node.start_mark)
