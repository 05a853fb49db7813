"""Sampling settings as a gateway sends them to a scheduler."""

from typing import Any

from echelon.pb.sampling_pb2 import SamplingParams
from gateway.requests.sampling import built_in_defaults


def resolved_sampling(**given: Any) -> SamplingParams:
    """The settings given, with defaults for all others."""
    sampling = built_in_defaults()
    sampling.MergeFrom(SamplingParams(**given))
    return sampling
