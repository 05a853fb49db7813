"""A short run of the fuzzer of the public gRPC port; `python -m tests.property.fuzzed_doors` has the long one."""

from tests.property.fuzzed_doors import FuzzedGateway, checked, fuzz_grpc


def test_generated_messages_are_answered_without_a_failure() -> None:
    with FuzzedGateway() as gateway, checked(gateway):
        ends, failures = fuzz_grpc(gateway, 200, seed=1)
    assert failures == []
    assert ends["OK"] > 20
    assert ends["INVALID_ARGUMENT"] > 50
    assert gateway.scheduler.num_answered > 1, "some requests make sense"
