"""YAML that remembers where each key stands, and refuses what YAML would silently resolve: a key given twice."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from cluster.errors import ConfigError, Problem

KeyPath = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Document:
    """A mapping with the line (from 1) of each of its keys and items, at any depth. An item's key is its number."""

    value: Mapping[str, Any]
    lines: Mapping[KeyPath, int]

    def line_of(self, path: Sequence[str | int]) -> int | None:
        """The line of a key, or of the nearest section around it where the key is not written."""
        for length in range(len(path), 0, -1):
            line = self.lines.get(tuple(path[:length]))
            if line is not None:
                return line
        return None

    def error(self, path: Path, problems: Iterable[Problem]) -> ConfigError:
        """Of the file at `path`: the problems with their lines, in their order."""
        lined = [replace(problem, line=self.line_of(problem.path.split("."))) for problem in problems]
        return ConfigError(str(path), sorted(lined, key=lambda problem: problem.line or 0))


def read_document(path: Path) -> Document:
    """Parse one file. Raises ConfigError for a missing file, a syntax error, a repeated key, or no mapping."""
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        value = yaml.safe_load(text)
    except OSError as err:
        reason = err.strerror or str(err)
        raise _error(path, Problem(path="file", message=f"cannot be read: {reason}", remedy="check the path")) from err
    except UnicodeDecodeError as err:
        message, line = f"is not UTF-8: {err.reason}", err.object.count(b"\n", 0, err.start) + 1
        raise _error(path, Problem(path="file", message=message, remedy="save as UTF-8", line=line)) from err
    except yaml.MarkedYAMLError as err:
        mark = err.problem_mark
        message = ", ".join(part for part in (err.context, err.problem) if part)
        problem = Problem(path="YAML", message=message, remedy="mend the syntax", line=mark.line + 1 if mark else None)
        raise _error(path, problem) from err
    except yaml.reader.ReaderError as err:
        line = text.count("\n", 0, err.position) + 1
        message = f"character U+{err.character:04X} is not allowed"
        raise _error(path, Problem(path="YAML", message=message, remedy="take it out", line=line)) from err
    except RecursionError as err:
        raise _error(path, Problem(path="YAML", message="is nested too deeply", remedy="flatten it")) from err
    # PyYAML raises it for a value that is not what it looks like or what its tag says, such as a date or !!int.
    except (ValueError, LookupError, TypeError, AttributeError) as err:
        message = f"a value is not what it looks like: {err}"
        raise _error(path, Problem(path="YAML", message=message, remedy="put it in quotes, without a tag")) from err
    if not isinstance(node, yaml.MappingNode) or not isinstance(value, dict):
        raise _error(path, Problem(path="file", message="holds no mapping of keys", remedy="see deploy/demo.yaml"))
    lines: dict[KeyPath, int] = {}
    problems = _collect_lines(node, (), lines)
    if problems:
        raise ConfigError(str(path), problems)
    return Document(value, lines)


def _error(path: Path, problem: Problem) -> ConfigError:
    return ConfigError(str(path), [problem])


def _collect_lines(
    node: yaml.CollectionNode, path: KeyPath, lines: dict[KeyPath, int], *, around: Sequence[yaml.Node] = ()
) -> list[Problem]:
    """Fill `lines` below `node`, which stands in `around`.

    The problems are keys given twice, of which YAML would keep the last, and sections that contain themselves.
    """
    problems = []
    around = (*around, node)
    for key, line, value_node in _entries(node):
        key_path = (*path, key)
        dotted = ".".join(str(part) for part in key_path)
        if key_path in lines:
            message = f"is given twice, first in line {lines[key_path]}"
            problems.append(Problem(path=dotted, message=message, remedy="keep one of them", line=line))
            continue
        lines[key_path] = line
        if any(value_node is parent for parent in around):
            remedy = "write the keys out"
            problems.append(
                Problem(path=dotted, message="is an alias of a section that contains it", remedy=remedy, line=line)
            )
        elif isinstance(value_node, yaml.CollectionNode):
            problems += _collect_lines(value_node, key_path, lines, around=around)
    return problems


def _entries(node: yaml.CollectionNode) -> Iterator[tuple[str, int, yaml.Node]]:
    """Key or number, line and value of each entry."""
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield str(index), item.start_mark.line + 1, item
    else:
        for key_node, value_node in node.value:
            yield str(key_node.value), key_node.start_mark.line + 1, value_node
