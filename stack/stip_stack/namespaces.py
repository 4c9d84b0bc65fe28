"""Hosts on one machine: a network namespace for each, joined by a router that lets through what it is told to.

    with Network({"client": "10.20.6.2", "enclave": "10.20.5.2"}, [Flow("client", "enclave", 7443)]) as network:
        Process("enclave", network.within("enclave", argv), log)

Each host has one interface, a /24 of its own, and the router as its gateway; the router forwards (ip(7), `ip_forward`)
what its nftables rules name and rejects the rest at once. Hosts do not reach the machine's own network, nor it them.
Needs root, iproute2 and nftables.
"""

from __future__ import annotations

import ipaddress
import os
import secrets
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from stip_protocol.errors import ConfigurationError

TOOLS = ("ip", "nft")
ROUTER = "router"


@dataclass(frozen=True, slots=True)
class Flow:
    """TCP connections that one host may open to a port of another."""

    source: str
    target: str
    port: int


def missing() -> str | None:
    """What this machine lacks for a `Network`; None where nothing is missing."""
    if os.geteuid() != 0:
        return "not root"
    if lacking := [tool for tool in TOOLS if shutil.which(tool) is None]:
        return f"no {', '.join(lacking)} (apt-get install iproute2 nftables)"
    name = f"stip-{secrets.token_hex(3)}"
    tried = _run("ip", "netns", "add", name, check=False)
    if tried.returncode != 0:
        return f"no network namespaces here ({tried.stderr.strip()[:80]})"
    _run("ip", "netns", "delete", name)
    return None


class Network:
    """Namespaces that are there while this is open, and their addresses. Names of namespaces are random."""

    def __init__(self, addresses: Mapping[str, str], flows: Sequence[Flow]) -> None:
        """Raises `ConfigurationError` where a flow names an unknown host or two hosts share a network."""
        self.addresses = dict(addresses)
        self.flows = tuple(flows)
        networks = {ipaddress.ip_interface(f"{address}/24").network for address in addresses.values()}
        if len(networks) != len(addresses):
            raise ConfigurationError.because("addresses", "two hosts in one /24", "a network for each host")
        if unknown := {end for flow in flows for end in (flow.source, flow.target)} - addresses.keys():
            raise ConfigurationError.because("flows", ", ".join(sorted(unknown)), ", ".join(addresses))
        tag = secrets.token_hex(3)
        self._names = {host: f"stip-{tag}-{host}" for host in (*addresses, ROUTER)}

    def __enter__(self) -> Self:
        try:
            self._build()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def within(self, host: str, argv: Sequence[str]) -> list[str]:
        """The command that runs `argv` on a host. `ip` becomes the program: signals reach it."""
        return ["ip", "netns", "exec", self._names[host], *argv]

    def _build(self) -> None:
        for name in self._names.values():
            _run("ip", "netns", "add", name)
            _run("ip", "-n", name, "link", "set", "lo", "up")
        router = self._names[ROUTER]
        for number, (host, address) in enumerate(self.addresses.items()):
            gateway = str(ipaddress.ip_interface(f"{address}/24").network[1])
            port = f"host{number}"
            _run("ip", "-n", router, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns",
                 self._names[host])  # fmt: skip
            for name, device, own in ((router, port, gateway), (self._names[host], "eth0", address)):
                _run("ip", "-n", name, "address", "add", f"{own}/24", "dev", device)
                _run("ip", "-n", name, "link", "set", device, "up")
            _run("ip", "-n", self._names[host], "route", "add", "default", "via", gateway)
        # Rules before forwarding: nothing passes in between.
        _run("ip", "netns", "exec", router, "nft", "-f", "-", text=self._rules())
        _run("ip", "netns", "exec", router, "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")

    def _rules(self) -> str:
        allowed = "\n".join(
            f"ip saddr {self.addresses[flow.source]} ip daddr {self.addresses[flow.target]} tcp dport {flow.port} "
            "ct state new accept"
            for flow in self.flows
        )
        return f"""
            table inet stip {{
              chain forward {{
                type filter hook forward priority filter; policy drop;
                ct state established,related accept
                {allowed}
                reject with icmpx type admin-prohibited
              }}
              chain input {{
                type filter hook input priority filter; policy drop;
                ct state established,related accept
              }}
            }}
        """

    def _remove(self) -> None:
        for name in self._names.values():
            _run("ip", "netns", "delete", name, check=False)


def _run(*argv: str, text: str | None = None, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(argv, input=text, capture_output=True, text=True, timeout=30, check=False)
    if check and done.returncode != 0:
        raise ConfigurationError(f"{' '.join(argv[:6])}: {done.stderr.strip()[:300]}")
    return done
