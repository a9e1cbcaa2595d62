"""Network addresses as security sees them: which are this machine's own, which belong to trusted proxies, and whom failures count for."""

from __future__ import annotations

import functools
import ipaddress
from functools import lru_cache

from penstock.core.errors import ConfigError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

# A customer of a provider usually has a whole /64, and can take a new address out of it for every attempt.
_IPV6_PREFIX = 64


def is_loopback(host: str) -> bool:
    """True for an address to listen on that only this machine can reach."""
    if host.lower() == "localhost":
        return True
    address = parse_address(host)
    return address is not None and address.is_loopback


def parse_address(text: str) -> Address | None:
    """The address, an IPv4 one also where it comes in IPv6's clothes (::ffff:192.0.2.1); None when it is none."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def parse_networks(text: str) -> tuple[Network, ...]:
    """Addresses and networks separated by commas. Raises ConfigError, so that a typo does not end as a proxy that nobody trusts."""
    networks = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        try:
            networks.append(ipaddress.ip_network(part))
        except ValueError:
            raise ConfigError(
                f"--forwarded-allow-ips takes addresses and networks such as 10.0.0.5,10.1.0.0/16, not {part!r}."
            ) from None
    return tuple(networks)


@lru_cache(maxsize=4096)
# The same few clients ask again and again, and parsing an address costs microseconds of every request.
@functools.lru_cache(maxsize=4096)
def client_block(host: str) -> str:
    """What failed attempts of a client are counted under: its address, for IPv6 the network of 64 bits."""
    address = parse_address(host)
    if isinstance(address, ipaddress.IPv6Address):
        return str(ipaddress.IPv6Network((int(address) >> _IPV6_PREFIX << _IPV6_PREFIX, _IPV6_PREFIX)))
    return str(address) if address is not None else host
