"""Channels between our own processes: they talk directly, whatever proxies the environment names."""

import grpc

_DIRECT = (("grpc.enable_http_proxy", 0),)  # http_proxy and the like are for traffic that leaves the machines


def open_channel(address: str, *options: tuple[str, int]) -> grpc.aio.Channel:
    """A channel on the running event loop to another process of the deployment, at host:port."""
    return grpc.aio.insecure_channel(address, options=(*_DIRECT, *options))


def open_blocking_channel(address: str, *options: tuple[str, int]) -> grpc.Channel:
    """The same for threads."""
    return grpc.insecure_channel(address, options=(*_DIRECT, *options))
