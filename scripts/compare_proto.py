"""Compare proto/sandbox.proto with the descriptors inside a wheel of the public package `openshell`.

Usage: compare_proto.py WHEEL (`pip download --no-deps openshell==0.0.116` gets one). The wheel's code is read and not run.
Prints one line per difference; exit status 1 when a field of ours below 1000 differs, or one of the wheel's policy is missing.
"""

from __future__ import annotations

import ast
import sys
import zipfile
from collections.abc import Iterable, Iterator

from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto, FileDescriptorProto

from openshell_supervisor.policy._generated import sandbox_pb2

MEMBER = "openshell/_proto/sandbox_pb2.py"
OURS_FROM = 1000

Fields = dict[str, tuple[object, ...]]


def in_wheel(path: str) -> FileDescriptorProto:
    """The file descriptor that the wheel's generated module holds as a literal."""
    with zipfile.ZipFile(path) as wheel:
        tree = ast.parse(wheel.read(MEMBER))
    literals = [
        node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, bytes)
    ]
    return FileDescriptorProto.FromString(max(literals, key=len))


def messages(items: Iterable[DescriptorProto], prefix: str = "") -> dict[str, Fields]:
    """Message name to its fields: name to number, type, label, type name and explicit presence."""
    found: dict[str, Fields] = {}
    for message in items:
        name = f"{prefix}{message.name}"
        found[name] = {field.name: _facts(field) for field in message.field}
        found |= messages(message.nested_type, f"{name}.")
    return found


def _facts(field: FieldDescriptorProto) -> tuple[object, ...]:
    return field.number, field.type, field.label, field.type_name, field.proto3_optional


def differences(ours: FileDescriptorProto, theirs: FileDescriptorProto) -> Iterator[str]:
    """What differs in the messages that `SandboxPolicy` reaches."""
    if ours.package != theirs.package:
        yield f"package {ours.package} and {theirs.package}"
    mine, other = messages(ours.message_type), messages(theirs.message_type)
    for name, fields in mine.items():
        if name not in other:
            known = all(not str(facts[3]).endswith(f".{name}") for table in other.values() for facts in table.values())
            yield f"{'added' if known else 'missing'}: message {name}"
            continue
        for field in fields.keys() | other[name].keys():
            left, right = fields.get(field), other[name].get(field)
            if left != right:
                added = right is None and left is not None and int(str(left[0])) >= OURS_FROM
                yield f"{'added' if added else 'differs'}: {name}.{field}: {left} and {right}"


def main(wheel: str) -> int:
    """Print what differs."""
    ours = FileDescriptorProto.FromString(sandbox_pb2.DESCRIPTOR.serialized_pb)
    found = sorted(differences(ours, in_wheel(wheel)))
    sys.stdout.write("".join(f"{line}\n" for line in found) or "nothing differs\n")
    return 1 if any(not line.startswith("added: ") for line in found) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
