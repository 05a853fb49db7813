"""Channels and ports between our own processes. They talk directly, whatever proxies the environment names.

With an identity, both ends prove that they belong to the deployment (mutual TLS): each has a certificate of its CA, for
the one name that all of them share. Without one, as in tests and benchmarks on one machine, wires are plain.
"""

import grpc

from echelon.pb.process_pb2 import ProcessIdentity

INSIDE_NAME = "inside.echelon"  # in each certificate: addresses change, and belonging to the deployment is what counts
_DIRECT = (("grpc.enable_http_proxy", 0),)  # http_proxy and the like are for traffic that leaves the machines
_NAME = (("grpc.ssl_target_name_override", INSIDE_NAME),)


def open_channel(address: str, *options: tuple[str, int], identity: ProcessIdentity | None = None) -> grpc.aio.Channel:
    """A channel on the running event loop to another process of the deployment, at host:port."""
    if identity is None or not identity.certificate:
        return grpc.aio.insecure_channel(address, options=(*_DIRECT, *options))
    return grpc.aio.secure_channel(address, _credentials(identity), options=(*_DIRECT, *_NAME, *options))


def open_blocking_channel(
    address: str, *options: tuple[str, int], identity: ProcessIdentity | None = None
) -> grpc.Channel:
    """The same for threads."""
    if identity is None or not identity.certificate:
        return grpc.insecure_channel(address, options=(*_DIRECT, *options))
    return grpc.secure_channel(address, _credentials(identity), options=(*_DIRECT, *_NAME, *options))


def listen(server: grpc.aio.Server, address: str, identity: ProcessIdentity) -> int:
    """Let a server listen at host:port; its port. Raises RuntimeError if it cannot."""
    if not identity.certificate:
        return server.add_insecure_port(address)
    pair = [(identity.key, identity.certificate)]
    return server.add_secure_port(address, grpc.ssl_server_credentials(pair, identity.ca, require_client_auth=True))


def _credentials(identity: ProcessIdentity) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(identity.ca, identity.key, identity.certificate)
