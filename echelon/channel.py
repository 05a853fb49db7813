"""How a client's channel to a gateway is set up."""

import ipaddress

ChannelOptions = tuple[tuple[str, int], ...]


def channel_options(address: str, *options: tuple[str, int]) -> ChannelOptions:
    """`options`, and no proxy to this machine itself: http_proxy and the like are for other machines."""
    return (*options, ("grpc.enable_http_proxy", 0)) if _is_here(address) else options


def _is_here(address: str) -> bool:
    """Whether host:port, or one of grpc's own forms such as dns:///host:port, is on the loopback interface."""
    host = address.rpartition("/")[2].removeprefix("ipv4:").removeprefix("ipv6:").removeprefix("dns:")
    host = host[1:].partition("]")[0] if host.startswith("[") else host.rpartition(":")[0] or host
    try:
        number = ipaddress.ip_address(host)
    except ValueError:
        return host.lower() in ("localhost", "localhost.")
    return number.is_loopback or number.is_unspecified
