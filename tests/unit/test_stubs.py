"""The committed stubs say what protos/ says."""

import re
from pathlib import Path

from google.protobuf import descriptor_pb2
from grpc_tools import protoc

ROOT = Path(__file__).parents[2]
PROTOS = sorted((ROOT / "protos").glob("*.proto"))


def compiled(tmp_path: Path) -> dict[str, descriptor_pb2.FileDescriptorProto]:
    out = tmp_path / "all.desc"
    files = [f"echelon/pb/{p.name}" for p in PROTOS]
    assert protoc.main(["protoc", f"-Iechelon/pb={ROOT / 'protos'}", f"--descriptor_set_out={out}", *files]) == 0
    return {f.name: f for f in descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes()).file}


def test_stubs_are_fresh(tmp_path: Path) -> None:
    assert PROTOS
    for name, wanted in compiled(tmp_path).items():
        module = __import__(name.removesuffix(".proto").replace("/", ".") + "_pb2", fromlist=["DESCRIPTOR"])
        found = descriptor_pb2.FileDescriptorProto()
        module.DESCRIPTOR.CopyToProto(found)
        wanted.ClearField("source_code_info")
        for each in (wanted, found):  # json names are derived
            for message in each.message_type:
                for field in message.field:
                    field.ClearField("json_name")
        assert found == wanted, f"{name} changed: run `make proto`"


def test_every_service_has_its_stub() -> None:
    for proto in PROTOS:
        for service in re.findall(r"^service (\w+)", proto.read_text(), re.M):
            grpc_stub = (ROOT / "echelon/pb" / f"{proto.stem}_pb2_grpc.py").read_text()
            assert f"class {service}Stub" in grpc_stub
