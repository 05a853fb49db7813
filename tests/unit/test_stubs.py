"""The committed stubs match protos/."""

import importlib
import re
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import DescriptorProto, FileDescriptorProto, FileDescriptorSet
from grpc_tools import protoc

ROOT = Path(__file__).parents[2]
PROTOS = sorted((ROOT / "protos").glob("*.proto"))


def without_json_names(file: FileDescriptorProto) -> FileDescriptorProto:
    """protoc writes derived JSON names; the descriptor of a stub leaves them out."""

    def clear(message: DescriptorProto) -> None:
        for field in message.field:
            field.ClearField("json_name")
        for nested in message.nested_type:
            clear(nested)

    for message in file.message_type:
        clear(message)
    return file


def compile_proto(proto: Path, out: Path) -> FileDescriptorProto:
    arguments = [f"-Iechelon/pb={ROOT / 'protos'}", f"--descriptor_set_out={out}", f"echelon/pb/{proto.name}"]
    assert protoc.main(["protoc", *arguments]) == 0
    return FileDescriptorSet.FromString(out.read_bytes()).file[0]


@pytest.mark.parametrize("proto", PROTOS, ids=lambda p: p.stem)
def test_stub_is_fresh(proto: Path, tmp_path: Path) -> None:
    stub = FileDescriptorProto()
    importlib.import_module(f"echelon.pb.{proto.stem}_pb2").DESCRIPTOR.CopyToProto(stub)
    wanted = compile_proto(proto, tmp_path / "out.desc")
    assert without_json_names(stub) == without_json_names(wanted), f"{proto.name} changed: run `make proto`"


@pytest.mark.parametrize("proto", PROTOS, ids=lambda p: p.stem)
def test_every_service_has_its_stub(proto: Path) -> None:
    grpc_stub = (ROOT / "echelon/pb" / f"{proto.stem}_pb2_grpc.py").read_text()
    for service, methods in re.findall(r"^service (\w+) \{(.*?)^\}", proto.read_text(), re.M | re.S):
        assert f"class {service}Stub" in grpc_stub
        for method in re.findall(r"rpc (\w+)\(", methods):
            assert f"/echelon.v1.{service}/{method}" in grpc_stub
