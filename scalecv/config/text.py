"""YAML as a mapping: the safe part of it, without aliases, duplicate keys and deep nesting."""

from typing import Any

import yaml

from scalecv.errors import ConfigError

MAX_BYTES = 1 << 20
MAX_DEPTH = 32


class _UniqueKeyLoader(yaml.SafeLoader):
    """The safe loader, without aliases, duplicate keys and deep nesting."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise ConfigError("YAML aliases (*name) are not accepted; write the value again")
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ConfigError(f"nested deeper than {MAX_DEPTH} levels")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[object] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise ConfigError(f"line {key_node.start_mark.line + 1}: a key must be a word")
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise ConfigError(f"line {key_node.start_mark.line + 1}: key '{key}' stands twice")
            seen.add(key)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str, where: str) -> dict[str, Any]:
    """The mapping in a YAML text.

    Raises: ConfigError: not YAML, not a mapping, too large, or with aliases or duplicate keys.
    """
    if len(text) > MAX_BYTES:
        raise ConfigError(f"{where} has {len(text)} bytes; an experiment has at most {MAX_BYTES}")
    try:
        tree = yaml.load(text, Loader=_UniqueKeyLoader)  # noqa: S506 - a subclass of SafeLoader
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    except (yaml.YAMLError, RecursionError, ValueError, OverflowError) as error:  # the last two: dates, long numbers
        at = getattr(error, "problem_mark", None)
        line = f":{at.line + 1}" if at else ""
        raise ConfigError(f"{where}{line}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{where}: expected keys such as name, task and data, found {type(tree).__name__}")
    return tree
